"""The diagonal, estimated by random signs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar, Literal

from hvp_operations.checking import FIRST_SEED, Seed
from hvp_operations.operation import Cost, Detail, Extension, Facts, Operation, Result, Rule, Table
from hvp_operations.rules import SEED_RULE, of_estimates
from hvp_operations.trace import TOGETHER, Outcome, Per, TracePart

Method = Literal["auto", "hutchinson", "xdiag"]

#: Probes with a coarse and an exact product each that correct a coarse estimate, at the fewest.
CORRECTIONS = 4
#: Vectors of the basis of `xdiag`, at most: so many take one sketch, and others follow.
_MOST_ROWS = 64
_DEFAULT_PRODUCTS = 300
#: Products that give an estimate with a standard error. Of a coarse operator `hutchinson` takes
#: two probes, and two more whose coarse products are compared with exact ones.
_LEAST_PRODUCTS = {"auto": 6, "hutchinson": 6, "xdiag": 4}


def beside(num_together: int) -> int:
    """Vectors that a run holds beside the basis of `xdiag`.

    These are the moments of two levels, two each; and a group of probes with its products and one
    to work in, or a few probes with a coarse and an exact product each. At the end the products lie
    there still, with the result twice.

    Args:
        num_together: Random vectors whose products are taken in one call.
    """
    in_flight = max(2 * num_together + 1, 3 * min(num_together, CORRECTIONS))
    return 4 + max(in_flight, num_together + 4)


@dataclass(frozen=True)
class DiagonalSpec:
    """Estimate the diagonal by products with random signs, and the error of each element.

    The run stops when the norm of the standard error is at most rtol times that of the diagonal, or
    at most `atol`.

    Attributes:
        method: `hutchinson` averages z ∘ Az over random signs z; `xdiag` takes the diagonal on a
            sketch of the range exactly and averages over the rest, with each random vector left out
            of the sketch in turn. `auto` takes `xdiag` where there is memory for a sketch, and lets
            the sketch grow for as long as that pays; the result says why.
        rtol: Tolerance on the norm of the standard error, relative to that of the diagonal,
            0 < rtol < 1.
        atol: Tolerance on the norm of the standard error in units of the diagonal's; the larger of
            the two counts.
        max_products: Upper bound on products; None lets the server choose.
        per: `tensor` or `layer` gives sums over the parts of the diagonal from the same products,
            by `hutchinson`; None gives none.
        seed: Seed of the random vectors.
    """

    method: Method = "auto"
    _: KW_ONLY
    rtol: float = 0.1
    atol: float = 0.0
    max_products: int | None = None
    per: Per | None = None
    seed: Seed = FIRST_SEED


@dataclass(frozen=True, kw_only=True)
class DiagonalProgress(Detail):
    """How far the run of an estimate has come.

    Attributes:
        norm: Norm of the diagonal, by the estimate so far.
        standard_error: Norm of its standard error; infinite before there are two samples.
        num_probes: Random vectors so far.
    """

    norm: float = 0.0
    standard_error: float = float("inf")
    num_probes: int = 0

    def table(self) -> Table:
        """The estimate so far."""
        return Table(
            headings=("probes", "norm so far", "standard error"),
            rows=((str(self.num_probes), f"{self.norm:.6g}", f"{self.standard_error:.2g}"),),
        )


@dataclass(frozen=True, kw_only=True)
class DiagonalResult(Result):
    """How far a diagonal can be trusted; it is a vector on the server, as its standard error is.

    Attributes:
        norm: Norm of the diagonal: the root of what the estimate's square is beyond the standard
            error's.
        relative_standard_error: Norm of the standard error over `norm`; infinite where the estimate
            is no more than its error.
        interval_factor: The estimate ± this many standard errors holds 95 % of the elements.
        rounding: Norm of what the rounding of products may have added to the estimate.
        outcome: How the run ended.
        method: The method that was taken; `exact` if all coordinates took their turn.
        reason: Why this method was taken.
        num_probes: Random vectors that the estimate is made of.
        num_exact_products: Products with the exact operator, where the others are coarser.
        parts: Sums over the parts of the diagonal, in canonical order.
        num_samples: Samples of random signs of which the estimate is the plain mean, with which an
            extension goes on; 0 where it is made otherwise.
        num_corrections: Random vectors whose products were taken of both operators, in this run and
            those before it.
    """

    norm: float
    relative_standard_error: float
    interval_factor: float
    rounding: float
    outcome: Outcome
    method: str
    reason: str
    num_probes: int
    num_exact_products: int = 0
    parts: tuple[TracePart, ...] = ()
    num_samples: int = 0
    num_corrections: int = 0

    vectors: ClassVar[tuple[str, ...]] = ("diagonal", "standard_error")

    def vector_counts(self) -> Mapping[str, int]:
        """The estimate, and its standard error."""
        return {"diagonal": 1, "standard_error": 1}


def _max_products(spec: DiagonalSpec) -> int:
    return spec.max_products or _DEFAULT_PRODUCTS


def basis_vectors(num_rows: int) -> int:
    """Vectors that a basis of so many takes, with its products, and a quarter for the signs."""
    return 2 * num_rows + -(-num_rows // 4)


def num_rows(max_products: int, num_vectors: int, dimension: int) -> int:
    """Vectors that the basis of `xdiag` has.

    Args:
        max_products: Products that may be taken: two for each vector of the basis.
        num_vectors: Vectors that there is memory for.
        dimension: n, the length of a vector.
    """
    rows = min(_MOST_ROWS, max_products // 2, dimension)
    while rows and basis_vectors(rows) > num_vectors:
        rows -= 1
    return rows


def _cost(spec: DiagonalSpec, facts: Facts) -> Cost:
    rows, least = 0, beside(1)
    if spec.method == "xdiag" or (spec.method == "auto" and spec.per is None):
        rows = basis_vectors(num_rows(_max_products(spec), 10 * _MOST_ROWS, facts.num_parameters))
    if spec.method == "xdiag":
        least += basis_vectors(2)
    return Cost(
        max_products=_max_products(spec),
        least_vectors=least,
        wished_vectors=max(least, rows + beside(TOGETHER)),
        results=2,
    )


_RULES: tuple[Rule[DiagonalSpec], ...] = (
    *of_estimates("the diagonal's norm"),
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
        holds=lambda spec, facts: spec.per is None or spec.method != "xdiag",
        allowed=lambda spec, facts: (
            "sums over parts are estimated by hutchinson, not by xdiag; leave the method out"
        ),
    ),
    SEED_RULE,
)


def _headline(spec: DiagonalSpec) -> str:
    blocks = f" per {spec.per}" if spec.per else ""
    return f"diagonal{blocks} by {spec.method} to {spec.rtol:g}"


def _refusal(spec: DiagonalSpec, result: DiagonalResult) -> str:
    """Why there is nothing to go on from; "" where there is something."""
    if not result.relative_standard_error:
        return "its standard error is 0: more random vectors would add nothing"
    if result.outcome == "UNVERIFIED" and not result.num_samples:
        return "its products were coarse and not compared with exact ones; ask anew"
    if result.method == "hutchinson" and result.num_exact_products > result.num_corrections:
        return "its answer is another version's; ask anew"
    return ""


OPERATION = Operation(
    name="diagonal",
    summary="Estimate the diagonal, and its sums per layer, with standard errors.",
    spec=DiagonalSpec,
    progress=DiagonalProgress,
    result=DiagonalResult,
    rules=_RULES,
    cost=_cost,
    headline=_headline,
    algorithm="hvp_core.stochastic.diagonal:Diagonal",
    record="hvp_operations.diagonal.record:DiagonalResult",
    has_picture=True,
    extension=Extension(
        fields=("rtol", "atol", "max_products"),
        refusal=_refusal,
        takes_result=True,
        vectors=("diagonal", "standard_error"),
    ),
)
