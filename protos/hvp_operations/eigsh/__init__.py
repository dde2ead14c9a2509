"""k extremal eigenpairs, verified, and whether any of the wanted was missed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import ClassVar, Literal

from hvp_operations.certificates import Completeness, Outcome
from hvp_operations.checking import FIRST_SEED, Names, Seed
from hvp_operations.operation import (
    Cost,
    Detail,
    Extension,
    Facts,
    Input,
    Operation,
    Result,
    Rule,
    Table,
)
from hvp_operations.rules import SEED_RULE, of_basis, of_more

Which = Literal["LA", "SA", "LM", "BE"]
Method = Literal["auto", "lanczos", "two_pass"]

# About 220 bytes of a result are one pair's, and a result travels as one message of 4 MiB.
MAX_EIGENPAIRS = 10_000
#: Vectors that a run holds beside its basis and its eigenvectors: the product, its vector, a random
#: restart, and one to make eigenvectors of the basis.
_WORKING_VECTORS = 4
#: More products in one call share little more, and a basis of as many vectors reaches less far.
MAX_BLOCK_SIZE = 4
MAX_STARTS = 1024
#: Rows of a basis beside the wanted pairs: of Lanczos, with fewer of which restarts lose most of
#: what they have found; and of two passes, two as in any fresh run that looks for what was missed.
#: The recurrence takes one of them, and the row that waits in a basis.
_LEAST_BESIDE, _BESIDE_PASSES = 8, 2


@dataclass(frozen=True)
class EigshSpec:
    """Search for k extremal eigenpairs by Lanczos, and verify them in float64.

    With a block size b > 1 products are taken b at a time, which share what does not depend on
    their vectors, and b copies of a repeated eigenvalue are found at once.

    Attributes:
        k: Number of eigenpairs, 1 ≤ k ≤ n.
        which: `LA` largest, `SA` smallest, `LM` largest in magnitude, `BE` half from each end and
            the odd one from the high end.
        tol: Stop when every wanted pair's estimated residual is at most tol times the largest Ritz
            value's magnitude, 0 ≤ tol < 1; 0 means the dtype's rounding.
        max_products: Upper bound on products, those that show completeness and those of the final
            residuals included; None lets the server choose.
        seed: Seed of the starting vectors, and of those that show completeness.
        num_lanczos_vectors: Rows of the Krylov basis, more than k where k < n; None lets the server
            choose by memory.
        block_size: b, the number of vectors whose products are taken in one call, 1 to 4; None
            lets the server choose, which takes 1.
        v0: Vectors to begin with, for example the eigenvectors of an earlier checkpoint; random
            ones where it is left out. Whatever they are, completeness is shown from random vectors.
        method: `lanczos` keeps a basis, of k + 8 rows or more; `two_pass` keeps none, and makes the
            products of one run twice, which takes k + 2 rows and does not know of blocks; `auto`:
            `lanczos` where memory allows its basis, else `two_pass`.
    """

    k: int = 6
    which: Which = "LM"
    _: KW_ONLY
    tol: float = 0.0
    max_products: int | None = None
    seed: Seed = FIRST_SEED
    num_lanczos_vectors: int | None = None
    block_size: int | None = None
    v0: Names = ()
    method: Method = "auto"

    @property
    def width(self) -> int:
        """Number of vectors whose products are taken in one call."""
        return self.block_size or 1


@dataclass(frozen=True, kw_only=True)
class EigshProgress(Detail):
    """How far the search for eigenpairs or singular values has come.

    Attributes:
        num_restarts: Number of times that the Krylov basis was compressed.
        ritz_values: Ritz values at the wanted end or ends, ascending; of many, the 64 furthest from
            converged.
        residual_estimates: Estimated residual of each Ritz value, at least the rounding of the
            products.
    """

    num_restarts: int = 0
    ritz_values: tuple[float, ...] = ()
    residual_estimates: tuple[float, ...] = ()

    def table(self) -> Table:
        """Ritz values with the estimates of their residuals, the furthest from converged first."""
        pairs = sorted(
            zip(self.ritz_values, self.residual_estimates, strict=False),
            key=lambda pair: -pair[1],
        )
        return Table(
            headings=("Ritz value", "residual estimate"),
            rows=tuple((f"{value:.8g}", f"{estimate:.1e}") for value, estimate in pairs),
        )


@dataclass(frozen=True, kw_only=True)
class EigshResult(Result):
    """The eigenvalues that a search found, and their errors; the eigenvectors are on the server.

    Attributes:
        eigenvalues: Rayleigh quotients of the verifying products, ascending.
        residuals: ‖A y − λ y‖ / ‖y‖ of each pair, from a fresh product in float64.
        outcome: How the search ended.
        symmetry_defect: |u·Av − v·Au| / (‖Au‖ ‖v‖) over the run's own vectors.
        ritz_values: Ritz values of the first basis, before any restart.
        ritz_weights: Squared first components of T's eigenvectors.
        error_bounds: Bound b of each pair: [λ − b, λ + b] holds an eigenvalue of the exact
            operator; empty where nothing is claimed.
        completeness: Whether any of the wanted may have been missed.
    """

    eigenvalues: tuple[float, ...]
    residuals: tuple[float, ...]
    outcome: Outcome
    symmetry_defect: float
    ritz_values: tuple[float, ...]
    ritz_weights: tuple[float, ...]
    error_bounds: tuple[float, ...] = ()
    completeness: Completeness = field(default_factory=Completeness)

    vectors: ClassVar[tuple[str, ...]] = ("eigenvectors",)

    def vector_counts(self) -> Mapping[str, int]:
        """One eigenvector for each eigenvalue."""
        return {"eigenvectors": len(self.eigenvalues)}


def default_max_products(spec: EigshSpec, dimension: int) -> int:
    """The budget of products: the spec's own, or a default where it has none."""
    return spec.max_products or min(10 * dimension, max(300 + spec.k, 3 * spec.k))


def basis_sizes(spec: EigshSpec, dimension: int) -> tuple[int, int]:
    """The smallest basis that will do, and the one to have where memory allows.

    Args:
        spec: The question.
        dimension: n.
    """
    asked = spec.num_lanczos_vectors
    if asked:
        return asked, asked
    of_passes = min(spec.k + _BESIDE_PASSES, dimension)
    if spec.method == "two_pass":
        return of_passes, of_passes
    least, wish = _sizes_of_lanczos(spec, dimension)
    return min(least, of_passes) if _may_choose(spec) else least, wish


def _sizes_of_lanczos(spec: EigshSpec, dimension: int) -> tuple[int, int]:
    """As `basis_sizes`, of the method that keeps its basis."""
    k, most = spec.k, default_max_products(spec, dimension) - spec.k
    wish = min(max(2 * k + 16, 40), dimension, max(most, k + 1))
    return min(k + _LEAST_BESIDE, wish), wish


def _may_choose(spec: EigshSpec) -> bool:
    """Whether two passes will do where the basis does not fit."""
    return spec.method == "auto" and spec.width == 1 and not spec.num_lanczos_vectors


def taken(spec: EigshSpec, num_rows: int, dimension: int) -> Literal["lanczos", "two_pass"]:
    """The method that a spec asks for, or that is chosen.

    Args:
        spec: The question.
        num_rows: Rows that the basis can have.
        dimension: n.
    """
    if spec.method != "auto":
        return spec.method
    is_short = num_rows < _sizes_of_lanczos(spec, dimension)[0]
    return "two_pass" if is_short and _may_choose(spec) else "lanczos"


def beside_basis(spec: EigshSpec) -> int:
    """Vectors that a run holds beside the rows of its basis whose products are known."""
    waiting = max(spec.width, len(spec.v0)) - 1
    return _WORKING_VECTORS + 2 * (spec.width - 1) + waiting + spec.k


def _cost(spec: EigshSpec, facts: Facts) -> Cost:
    least, wish = basis_sizes(spec, facts.num_parameters)
    beside = beside_basis(spec)
    return Cost(
        max_products=default_max_products(spec, facts.num_parameters),
        least_vectors=least + beside,
        wished_vectors=wish + beside,
        results=spec.k,
    )


def _least_basis(spec: EigshSpec, facts: Facts) -> int:
    """Rows that the smallest basis has: a call's more than the pairs, or all that there are."""
    return min(spec.k + spec.width, facts.num_parameters)


_RULES: tuple[Rule[EigshSpec], ...] = (
    Rule(
        field="k",
        reason="K_INVALID",
        holds=lambda spec, facts: 1 <= spec.k <= min(facts.num_parameters, MAX_EIGENPAIRS),
        allowed=lambda spec, facts: (
            f"of an operator of order {facts.num_parameters}, 1 to "
            f"{min(facts.num_parameters, MAX_EIGENPAIRS)} eigenpairs can be asked in one job"
        ),
    ),
    Rule(
        field="tol",
        reason="TOL_INVALID",
        holds=lambda spec, facts: 0 <= spec.tol < 1,
        allowed=lambda spec, facts: (
            "0 <= tol < 1 is possible. It is relative to the largest "
            "eigenvalue's magnitude: with 1, any vector would do"
        ),
    ),
    Rule(
        field="max_products",
        reason="MAX_PRODUCTS_INVALID",
        holds=lambda spec, facts: spec.max_products is None or spec.max_products >= 2 * spec.k,
        allowed=lambda spec, facts: (
            f"a basis of k = {spec.k} and the k residuals take "
            f"{2 * spec.k}; left out, the server chooses"
        ),
    ),
    of_basis(_least_basis, lambda facts: facts.num_parameters),
    Rule(
        field="block_size",
        reason="BLOCK_SIZE_INVALID",
        holds=lambda spec, facts: 1 <= spec.width <= min(MAX_BLOCK_SIZE, facts.num_parameters),
        allowed=lambda spec, facts: (
            f"1 to {MAX_BLOCK_SIZE} are possible, and no more than there are parameters"
        ),
    ),
    Rule(
        field="block_size",
        reason="BLOCK_SIZE_INVALID",
        holds=lambda spec, facts: spec.method != "two_pass" or spec.width == 1,
        allowed=lambda spec, facts: (
            "two_pass takes products one by one; leave block_size out, or use lanczos"
        ),
    ),
    SEED_RULE,
)

OPERATION = Operation(
    name="eigsh",
    summary="Compute k extremal eigenpairs of the Hessian, or the GGN, of a checkpoint's loss.",
    spec=EigshSpec,
    progress=EigshProgress,
    result=EigshResult,
    rules=_RULES,
    cost=_cost,
    headline=lambda spec: f"eigsh {spec.which} k={spec.k}",
    algorithm="hvp_core.krylov.lanczos:Eigsh",
    record="hvp_operations.eigsh.record:EigshResult",
    inputs=(Input(field="v0", least=0, most=MAX_STARTS, taken_from="eigenvectors"),),
    extension=Extension(
        fields=("k", "max_products", "tol", "seed", "num_lanczos_vectors", "block_size", "method"),
        refusal=lambda spec, result: of_more(spec.k, len(result.eigenvalues)),
        new_seed=True,
    ),
)
