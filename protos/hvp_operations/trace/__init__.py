"""The trace, estimated by random vectors."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Literal

from hvp_operations.checking import FIRST_SEED, Seed
from hvp_operations.operation import Cost, Detail, Extension, Facts, Operation, Result, Rule, Table
from hvp_operations.rules import SEED_RULE, of_estimates

Method = Literal["auto", "hutchinson", "hutch++", "xtrace", "xnystrace"]
Per = Literal["tensor", "layer"]
Outcome = Literal["CONVERGED", "MAX_PRODUCTS", "NOISE_LIMIT", "UNVERIFIED"]

#: Random vectors whose products are taken in one call, at most.
TOGETHER = 8
#: Vectors that a call's random vectors and their products take, and one to work in.
WORKING_VECTORS = 2 * TOGETHER + 1
#: Vectors that a method with a basis has at the least: two of the basis, and three to work in.
LEAST_VECTORS = 5
_DEFAULT_PRODUCTS = 300
#: Vectors of a basis: so many take one batch of `xtrace` or `xnystrace`, and others follow.
_MOST_ROWS = 64
#: Products that give an estimate with a standard error. Of a coarse operator `hutchinson` takes
#: two probes, and two more whose coarse products are compared with exact ones.
_LEAST_PRODUCTS = {"auto": 6, "hutchinson": 6, "hutch++": 4, "xtrace": 4, "xnystrace": 2}
#: Products for each vector of the basis.
_PRODUCTS_A_ROW = {"hutch++": 3, "xtrace": 2, "xnystrace": 1}


@dataclass(frozen=True)
class TraceSpec:
    """Estimate the trace by products with random vectors, with a 95 % interval.

    The run stops when the standard error is at most rtol · |value|, or at most `atol`.

    Attributes:
        method: `hutchinson` averages z·Az over random signs z; `hutch++` takes the trace on a
            sketch of the range exactly and averages over the rest; `xtrace` does so with each
            random vector left out in turn; `xnystrace`, of a matrix without negative eigenvalues,
            needs half the products of that. `auto` chooses, and the result says why.
        rtol: Tolerance on the standard error, relative to the value, 0 < rtol < 1.
        atol: Tolerance on the standard error in units of the trace; the larger of the two counts.
        max_products: Upper bound on products; None lets the server choose.
        per: `tensor` or `layer` gives traces of the diagonal blocks from the same products, by
            `hutchinson`; None gives that of the whole alone.
        seed: Seed of the random vectors.
    """

    method: Method = "auto"
    _: KW_ONLY
    rtol: float = 0.01
    atol: float = 0.0
    max_products: int | None = None
    per: Per | None = None
    seed: Seed = FIRST_SEED


@dataclass(frozen=True, kw_only=True)
class TraceProgress(Detail):
    """How far the run of an estimate has come.

    Attributes:
        value: The estimate so far.
        standard_error: Its standard error; infinite before there are two samples.
        num_probes: Random vectors so far.
    """

    value: float = 0.0
    standard_error: float = float("inf")
    num_probes: int = 0

    def table(self) -> Table:
        """The estimate so far."""
        return Table(
            headings=("probes", "trace so far", "standard error"),
            rows=((str(self.num_probes), f"{self.value:.6g}", f"{self.standard_error:.2g}"),),
        )


@dataclass(frozen=True, kw_only=True)
class TracePart:
    """Trace of one diagonal block.

    Attributes:
        name: Name of the tensor or of the layer.
        num_parameters: Order of the block.
        value: The estimate.
        standard_error: Standard deviation of `value` over the choice of random vectors.
        low: Lower end of the block's own 95 % interval.
        high: Upper end of the interval.
    """

    name: str
    num_parameters: int
    value: float
    standard_error: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Level:
    """Running means of samples of the whole and of each part.

    Attributes:
        means: Mean of each.
        squares: Sum of squared distances from the mean, of each.
        count: Number of samples.
    """

    means: tuple[float, ...] = ()
    squares: tuple[float, ...] = ()
    count: int = 0


@dataclass(frozen=True, kw_only=True)
class TraceResult(Result):
    """The trace, and how far it can be trusted.

    Attributes:
        value: The estimate.
        standard_error: Standard deviation of `value` over the choice of random vectors, as they
            show it; 0 where the trace was computed without them.
        low: Lower end of the 95 % interval.
        high: Upper end of the interval.
        rounding: The part of the interval's half-width that is for rounding in the products.
        outcome: How the run ended.
        method: The method that was taken; `exact` if all coordinates took their turn.
        reason: Why this method was taken.
        num_probes: Random vectors that the value is made of.
        num_exact_products: Products with the exact operator, where the others are coarser.
        parts: Traces of the diagonal blocks, in canonical order.
        levels: Running means of `hutchinson`, with which an extension goes on: of forms of random
            vectors, and of differences between exact and coarse ones; none of other methods.
        size: Sum of the sizes by which the rounding of these forms goes.
    """

    value: float
    standard_error: float
    low: float
    high: float
    rounding: float
    outcome: Outcome
    method: str
    reason: str
    num_probes: int
    num_exact_products: int = 0
    parts: tuple[TracePart, ...] = ()
    levels: tuple[Level, ...] = ()
    size: float = 0.0


def _max_products(spec: TraceSpec) -> int:
    return spec.max_products or _DEFAULT_PRODUCTS


def num_rows(method: str, max_products: int) -> int:
    """The most vectors that a method's basis has in one batch; 0 for a method without a basis."""
    each = _PRODUCTS_A_ROW.get(method)
    return min(_MOST_ROWS, max_products // each) if each else 0


def _cost(spec: TraceSpec, facts: Facts) -> Cost:
    method = spec.method
    if method == "auto" and spec.per is None:
        wished = "xtrace" if facts.may_be_negative else "xnystrace"
        least = 2
    else:
        wished, least = method, LEAST_VECTORS if method in _PRODUCTS_A_ROW else 2
    rows = min(num_rows(wished, _max_products(spec)), facts.num_parameters)
    return Cost(
        max_products=_max_products(spec),
        least_vectors=least,
        wished_vectors=max(least, rows + WORKING_VECTORS),
    )


_RULES: tuple[Rule[TraceSpec], ...] = (
    Rule(
        field="method",
        reason="METHOD_UNSUPPORTED",
        holds=lambda spec, facts: spec.method != "xnystrace" or not facts.may_be_negative,
        allowed=lambda spec, facts: (
            f"it needs a matrix without negative eigenvalues, and the {facts.kind} may have some; "
            "use xtrace"
        ),
    ),
    *of_estimates("the trace"),
    Rule(
        field="max_products",
        reason="MAX_PRODUCTS_INVALID",
        holds=lambda spec, facts: (
            spec.max_products is None or spec.max_products >= _LEAST_PRODUCTS[spec.method]
        ),
        allowed=lambda spec, facts: (
            f"{spec.method} takes at least {_LEAST_PRODUCTS[spec.method]} for an estimate with a "
            "standard error; left out, the server chooses"
        ),
    ),
    Rule(
        field="per",
        reason="PER_UNSUPPORTED",
        holds=lambda spec, facts: spec.per is None or spec.method in ("auto", "hutchinson"),
        allowed=lambda spec, facts: (
            f"traces of blocks are estimated by hutchinson, not by {spec.method}; leave the method "
            "out"
        ),
    ),
    SEED_RULE,
)


def _headline(spec: TraceSpec) -> str:
    blocks = f" per {spec.per}" if spec.per else ""
    return f"trace{blocks} by {spec.method} to {spec.rtol:g}"


OPERATION = Operation(
    name="trace",
    summary="Estimate the trace, of the whole or per layer, with an interval.",
    spec=TraceSpec,
    progress=TraceProgress,
    result=TraceResult,
    rules=_RULES,
    cost=_cost,
    headline=_headline,
    algorithm="hvp_core.stochastic.trace:Trace",
    record="hvp_operations.trace.record:TraceResult",
    has_picture=True,
    extension=Extension(
        fields=("rtol", "atol", "max_products"),
        refusal=lambda spec, result: (
            ""
            if result.levels
            else f"the samples of {result.method} are not kept; only a job by hutchinson can be "
            "extended"
        ),
        takes_result=True,
    ),
)
