"""The trace of a function of an operator, by stochastic Lanczos quadrature."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import Literal

from hvp_operations.checking import FIRST_SEED, Seed
from hvp_operations.density import MAX_NODES, MAX_STEPS, WORKING_VECTORS, Quadrature
from hvp_operations.operation import Cost, Detail, Extension, Facts, Operation, Result, Rule, Table
from hvp_operations.rules import SEED_RULE, of_estimates
from hvp_operations.trace import Level

Function = Literal["log", "exp", "inverse", "sqrt", "count"]
Outcome = Literal[
    "CONVERGED", "MAX_PRODUCTS", "MAX_STEPS", "NOISE_LIMIT", "UNVERIFIED", "INDEFINITE"
]

#: Lanczos runs that go in lockstep, at most, where the operator does not say less.
TOGETHER = 8
#: The fewest that do: two probes, or one and the run that finds the spectrum's end.
FEWEST_TOGETHER = 2
#: Steps of a probe, at most, where the spec leaves them open; most need far fewer.
_DEFAULT_STEPS = 100
#: Steps without which memory is said to be too short to begin.
_LEAST_STEPS = 8
_DEFAULT_PRODUCTS = 1000
#: Runs that give an estimate with a standard error: two probes, and one for the spectrum's end.
_FEWEST_RUNS = 3


@dataclass(frozen=True)
class TraceOfSpec:
    """Estimate tr f(A + λI) by stochastic Lanczos quadrature, with a 95 % interval.

    Lanczos from a random vector z gives bounds on z·f(A + λI)z that close in as it goes on. The run
    takes as many steps as make them narrow beside the spread over the vectors, and as many vectors
    as the tolerance needs. What the steps leave open, what rounding does and the spread over the
    vectors are all in the interval.

    Attributes:
        function: `log` (the log determinant), `exp`, `inverse` or `sqrt`; `count`: the number of
            eigenvalues in (low, high]. `log` and `inverse` need A + λI to be positive definite,
            `sqrt` to have no negative eigenvalue; where a Ritz value shows that it is not, the
            run ends at once and the result says so.
        damping: λ, which is added to the diagonal.
        low: Of `count`, the lower end of the interval, which does not belong to it; by default
            there is none.
        high: Of `count`, the upper end, which does; by default there is none.
        num_steps: Upper bound on the Lanczos steps of each vector; None lets the server choose.
        rtol: Tolerance on standard error and quadrature error together, relative to the value,
            0 < rtol < 1.
        atol: Tolerance on them in units of the value; the larger of the two counts. Of `count` it
            is at least 0.25.
        max_products: Upper bound on products; None lets the server choose.
        seed: Seed of the random vectors.
    """

    function: Function = "log"
    _: KW_ONLY
    damping: float = 0.0
    low: float | None = None
    high: float | None = None
    num_steps: int | None = None
    rtol: float = 0.01
    atol: float = 0.0
    max_products: int | None = None
    seed: Seed = FIRST_SEED


@dataclass(frozen=True, kw_only=True)
class TraceOfProgress(Detail):
    """How far the run of an estimate has come.

    Attributes:
        value: The estimate so far.
        standard_error: Its standard error; infinite before there are two probes.
        num_probes: Probes that are done.
        num_steps: Lanczos steps of the probes at hand.
    """

    value: float = 0.0
    standard_error: float = float("inf")
    num_probes: int = 0
    num_steps: int = 0

    def table(self) -> Table:
        """The estimate so far."""
        return Table(
            headings=("probes done", "steps of the others", "value so far", "standard error"),
            rows=(
                (
                    str(self.num_probes),
                    str(self.num_steps),
                    f"{self.value:.6g}",
                    f"{self.standard_error:.2g}",
                ),
            ),
        )


@dataclass(frozen=True, kw_only=True)
class TraceOfProbe:
    """What one random vector z has seen: z·f(A + λI)z.

    Attributes:
        value: The estimate.
        low: Bound from below on what an unending run with exact products would give; minus infinity
            where there is none.
        high: Bound from above.
        quadrature: Gauss quadrature of the spectral measure of A that z sees, without λ.
    """

    value: float
    low: float
    high: float
    quadrature: Quadrature


@dataclass(frozen=True, kw_only=True)
class TraceOfResult(Result):
    """The value, and how far it can be trusted.

    Attributes:
        value: The estimate of tr f(A + λI); NaN where there is no such number.
        standard_error: Standard deviation of `value` over the choice of random vectors, as they
            show it.
        low: Lower end of the 95 % interval; minus infinity where nothing bounds it.
        high: Upper end of the interval.
        quadrature_error: What finitely many steps leave open: half the mean width of the probes'
            bounds.
        rounding: The part of the interval's half-width that is for rounding in the products.
        outcome: How the run ended.
        num_probes: Random vectors that the value is made of.
        num_steps: The most steps that a probe had.
        smallest: Smallest Ritz value of A, without λ: A has an eigenvalue that is not above it.
        largest: Largest Ritz value of A.
        num_exact_products: Products with the exact operator, where the operator's own are coarser.
        probes: What each random vector has seen, in the order of their seeds.
        levels: Running means over the probes, with which an extension goes on: of value, low, high,
            and what of high − low is for steps and for rounding, for the matrix over its order;
            none where there is no value, or one of coarse products alone.
        spectrum_low: Bound below the spectrum of A, which the probes' bounds rest on; infinite
            where they need none.
        spectrum_high: Bound above it.
    """

    value: float
    standard_error: float
    low: float
    high: float
    quadrature_error: float
    rounding: float
    outcome: Outcome
    num_probes: int
    num_steps: int
    smallest: float
    largest: float
    num_exact_products: int = 0
    probes: tuple[TraceOfProbe, ...] = ()
    levels: tuple[Level, ...] = ()
    spectrum_low: float = -math.inf
    spectrum_high: float = math.inf


def most_steps(spec: TraceOfSpec, dimension: int) -> int:
    """Steps that a probe may have where there is memory for them."""
    return min(spec.num_steps or _DEFAULT_STEPS, dimension)


def vectors_of(num_steps: int) -> int:
    """Vectors that a Lanczos run of so many steps holds, the one after the last among them."""
    return num_steps + 1 + WORKING_VECTORS


def max_products(spec: TraceOfSpec) -> int:
    """The budget of products: the spec's own, or a default where it has none."""
    return spec.max_products or max(
        _DEFAULT_PRODUCTS, (TOGETHER + 1) * (spec.num_steps or _LEAST_STEPS)
    )


def _least_products(spec: TraceOfSpec) -> int:
    return _FEWEST_RUNS * (spec.num_steps or 2)


def _cost(spec: TraceOfSpec, facts: Facts) -> Cost:
    steps = most_steps(spec, facts.num_parameters)
    return Cost(
        max_products=max_products(spec),
        least_vectors=FEWEST_TOGETHER * vectors_of(min(steps, _LEAST_STEPS)),
        wished_vectors=TOGETHER * vectors_of(steps),
    )


def _is_interval(spec: TraceOfSpec) -> bool:
    return spec.low is None or spec.high is None or spec.low < spec.high


def _only_counts(spec: TraceOfSpec, end: float | None) -> bool:
    return end is None or spec.function == "count"


_RULES: tuple[Rule[TraceOfSpec], ...] = (
    Rule(
        field="low",
        reason="LOW_INVALID",
        holds=lambda spec, facts: _only_counts(spec, spec.low) and _is_interval(spec),
        allowed=lambda spec, facts: (
            f"low is an end of the interval of a count, and {spec.function} has none; leave it out"
            if spec.function != "count"
            else f"it has to be below high, which is {spec.high}"
        ),
    ),
    Rule(
        field="high",
        reason="HIGH_INVALID",
        holds=lambda spec, facts: _only_counts(spec, spec.high),
        allowed=lambda spec, facts: (
            f"high is an end of the interval of a count, and {spec.function} has none; leave it out"
        ),
    ),
    Rule(
        field="num_steps",
        reason="NUM_STEPS_INVALID",
        holds=lambda spec, facts: spec.num_steps is None or 1 <= spec.num_steps <= MAX_STEPS,
        allowed=lambda spec, facts: f"1 to {MAX_STEPS} are possible; left out, the server chooses",
    ),
    *of_estimates("the value"),
    Rule(
        field="max_products",
        reason="MAX_PRODUCTS_INVALID",
        holds=lambda spec, facts: (
            spec.max_products is None or _least_products(spec) <= spec.max_products <= MAX_NODES
        ),
        allowed=lambda spec, facts: (
            f"{_least_products(spec)} to {MAX_NODES} are possible, for {_FEWEST_RUNS} runs of "
            "Lanczos at the least; left out, the server chooses"
        ),
    ),
    SEED_RULE,
)


def _headline(spec: TraceOfSpec) -> str:
    argument = "A" if spec.damping == 0 else f"A {'-+'[spec.damping > 0]} {abs(spec.damping):g} I"
    if spec.function == "count":
        low = "-inf" if spec.low is None else f"{spec.low:g}"
        high = "inf" if spec.high is None else f"{spec.high:g}"
        return f"count of eigenvalues of {argument} in ({low}, {high}]"
    return f"trace of {spec.function}({argument}) to {spec.rtol:g}"


def _refusal(spec: TraceOfSpec, result: TraceOfResult) -> str:
    """Why there is nothing to go on from; "" where there is something."""
    if result.outcome == "INDEFINITE":
        return (
            f"there is no value: A has an eigenvalue of {result.smallest:.6g} or less; ask anew "
            f"with a damping above {-result.smallest:.6g}"
        )
    if not result.levels:
        return "its probes were not taken of the exact operator, or are another version's; ask anew"
    if math.isinf(result.quadrature_error):
        return "the steps of its probes bound nothing; ask anew with more steps"
    budget = max_products(spec)
    if budget < result.num_steps:
        return (
            f"max_products is {budget}, and a probe takes up to {result.num_steps} steps; give "
            f"{result.num_steps} or more"
        )
    known = sum(len(each.quadrature.nodes) for each in result.probes)
    if known + budget > MAX_NODES:
        return (
            f"its probes have {known} nodes, and a result holds {MAX_NODES}: give max_products of "
            f"at most {MAX_NODES - known}"
        )
    return ""


OPERATION = Operation(
    name="trace_of",
    summary="Estimate the trace of a function: log determinant, exp, inverse, sqrt, or a count.",
    spec=TraceOfSpec,
    progress=TraceOfProgress,
    result=TraceOfResult,
    rules=_RULES,
    cost=_cost,
    headline=_headline,
    algorithm="hvp_core.stochastic.trace_of:TraceOf",
    record="hvp_operations.trace_of.record:TraceOfResult",
    has_picture=True,
    extension=Extension(
        fields=("rtol", "atol", "max_products", "num_steps"), refusal=_refusal, takes_result=True
    ),
)
