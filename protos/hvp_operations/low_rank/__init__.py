"""A low-rank matrix near an operator, with a bound on the error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar, Literal

from hvp_operations import eigsh
from hvp_operations.checking import FIRST_SEED, Seed
from hvp_operations.eigsh import EigshSpec
from hvp_operations.operation import Cost, Detail, Extension, Facts, Operation, Result, Rule, Table
from hvp_operations.rules import SEED_RULE, of_more
from hvp_operations.solve import MAX_PRECONDITIONER_VECTORS
from hvp_operations.trace import TOGETHER

Method = Literal["auto", "nystrom", "eigsh"]
Outcome = Literal["CONVERGED", "MAX_PRODUCTS", "NOISE_LIMIT", "UNVERIFIED"]

#: As many as a solve takes for a preconditioner.
MAX_VECTORS = MAX_PRECONDITIONER_VECTORS
#: Products that bound the error: of Lanczos on what is left of the operator.
CHECK_PRODUCTS = 10
#: Vectors that bounding the error takes beside the approximation: a basis, and three to work in.
_CHECK_VECTORS = CHECK_PRODUCTS + 5


@dataclass(frozen=True)
class LowRankSpec:
    """Approximate the operator by a matrix of rank k that stays on the ranks.

    The result A_k = U diag(eigenvalues) Uᵀ is a matrix to compute with: `L @ v`, `L.solve(b, λ)`,
    `L.logdet(λ)`, and a preconditioner of `solve`. How far it is from A is bounded by products with
    a random vector that it does not depend on.

    Attributes:
        k: Number of vectors, 1 ≤ k ≤ n.
        method: `nystrom`, of a matrix without negative eigenvalues such as a GGN: what A does to
            random vectors, k + oversampling products in all; `eigsh`: the k eigenpairs of largest
            magnitude by Lanczos, the best there is, for more products. `auto` takes `nystrom` where
            it can.
        oversampling: Of `nystrom`: random vectors beyond k, 0 or more; each makes it better.
        tol: Of `eigsh`: residual of a pair that will do, relative to the largest eigenvalue's
            magnitude, 0 ≤ tol < 1.
        max_products: Upper bound on products, those that bound the error included; None lets the
            server choose.
        seed: Seed of the random vectors.
    """

    k: int = 20
    method: Method = "auto"
    _: KW_ONLY
    oversampling: int = 10
    tol: float = 1e-3
    max_products: int | None = None
    seed: Seed = FIRST_SEED


@dataclass(frozen=True, kw_only=True)
class LowRankProgress(Detail):
    """Where an approximation stands.

    Attributes:
        num_vectors: Vectors of the sketch, or of the search, that have had their product.
        error: ‖A − A_k‖ is at least this, as far as it is known.
    """

    num_vectors: int = 0
    error: float = 0.0

    def table(self) -> Table:
        """The vectors so far, and the error once it is looked at."""
        error = (f"{self.error:.3g}",) if self.error else ()
        return Table(
            headings=("vectors", "error, at least")[: 1 + len(error)],
            rows=((str(self.num_vectors), *error),),
        )


@dataclass(frozen=True, kw_only=True)
class LowRankResult(Result):
    """The eigenvalues of the approximation and its error; its vectors are on the server.

    Attributes:
        eigenvalues: Eigenvalues of A_k, ascending.
        outcome: How the run ended.
        method: The method that was taken.
        reason: Why this method was taken.
        error: ‖A − A_k‖₂ is at least this.
        error_bound: It is at most this, but with `failure_probability`.
        failure_probability: Probability that the bound is wrong, over a random vector that A_k does
            not depend on.
        is_exact: Whether error and bound are those of the exact operator.
        orthogonality: ‖UᵀU − I‖₂.
        shift: Of `nystrom`: what was added to the diagonal while computing, and taken off again.
        num_check_products: Products that bound the error.
        num_exact_products: Products with the exact operator, where the others are coarser.
    """

    eigenvalues: tuple[float, ...]
    outcome: Outcome
    method: str
    reason: str
    error: float
    error_bound: float
    failure_probability: float
    is_exact: bool
    orthogonality: float
    shift: float = 0.0
    num_check_products: int = 0
    num_exact_products: int = 0

    vectors: ClassVar[tuple[str, ...]] = ("eigenvectors",)

    def vector_counts(self) -> Mapping[str, int]:
        """One vector for each eigenvalue."""
        return {"eigenvectors": len(self.eigenvalues)}


def taken(spec: LowRankSpec, is_semidefinite: bool) -> Literal["nystrom", "eigsh"]:
    """The method that a spec asks for, or that is chosen."""
    if spec.method == "auto":
        return "nystrom" if is_semidefinite else "eigsh"
    return spec.method


def num_samples(spec: LowRankSpec, dimension: int) -> int:
    """Random vectors of a Nyström approximation."""
    return min(spec.k + spec.oversampling, dimension)


def num_checks(dimension: int) -> int:
    """Products that bound the error."""
    return min(CHECK_PRODUCTS, dimension)


def search_spec(spec: LowRankSpec, dimension: int) -> EigshSpec:
    """The search for eigenpairs that `eigsh` makes."""
    budget = spec.max_products and spec.max_products - num_checks(dimension)
    return EigshSpec(k=spec.k, which="LM", tol=spec.tol, max_products=budget, seed=spec.seed)


def _least_products(spec: LowRankSpec, facts: Facts) -> int:
    """The fewest products that a method takes."""
    n = facts.num_parameters
    if taken(spec, not facts.may_be_negative) == "nystrom":
        return num_samples(spec, n) + num_checks(n)
    return 2 * spec.k + num_checks(n)


def _cost(spec: LowRankSpec, facts: Facts) -> Cost:
    n = facts.num_parameters
    beside = _CHECK_VECTORS + spec.k  # the result is copied out of the run
    if taken(spec, not facts.may_be_negative) == "nystrom":
        rows = num_samples(spec, n)
        return Cost(
            max_products=rows + num_checks(n),
            least_vectors=rows + beside,
            wished_vectors=rows + max(beside, 2 * TOGETHER + 1),
            results=spec.k,
        )
    search = eigsh.OPERATION.cost(search_spec(spec, n), facts)
    return Cost(
        max_products=search.max_products + num_checks(n),
        least_vectors=search.least_vectors + beside,
        wished_vectors=search.wished_vectors + beside,
        results=spec.k,
    )


_RULES: tuple[Rule[LowRankSpec], ...] = (
    Rule(
        field="k",
        reason="K_INVALID",
        holds=lambda spec, facts: 1 <= spec.k <= min(facts.num_parameters, MAX_VECTORS),
        allowed=lambda spec, facts: (
            f"of an operator of order {facts.num_parameters}, 1 to "
            f"{min(facts.num_parameters, MAX_VECTORS)} vectors are possible"
        ),
    ),
    Rule(
        field="method",
        reason="METHOD_UNSUPPORTED",
        holds=lambda spec, facts: spec.method != "nystrom" or not facts.may_be_negative,
        allowed=lambda spec, facts: (
            f"it needs a matrix without negative eigenvalues, and the {facts.kind} may have some; "
            "use eigsh"
        ),
    ),
    Rule(
        field="oversampling",
        reason="OVERSAMPLING_INVALID",
        holds=lambda spec, facts: 0 <= spec.oversampling <= MAX_VECTORS,
        allowed=lambda spec, facts: f"0 to {MAX_VECTORS} random vectors beyond k are possible",
    ),
    Rule(
        field="tol",
        reason="TOL_INVALID",
        holds=lambda spec, facts: 0 <= spec.tol < 1,
        allowed=lambda spec, facts: (
            "0 <= tol < 1 is possible. It is relative to the largest eigenvalue's magnitude"
        ),
    ),
    Rule(
        field="max_products",
        reason="MAX_PRODUCTS_INVALID",
        holds=lambda spec, facts: (
            spec.max_products is None or spec.max_products >= _least_products(spec, facts)
        ),
        allowed=lambda spec, facts: (
            f"{taken(spec, not facts.may_be_negative)} with k = {spec.k} takes "
            f"{_least_products(spec, facts)} at the least, {num_checks(facts.num_parameters)} of "
            "them to bound the error; left out, the server chooses"
        ),
    ),
    SEED_RULE,
)


def _refusal(spec: LowRankSpec, result: LowRankResult) -> str:
    """Why there is nothing to go on from; "" where there is something."""
    known = len(result.eigenvalues)
    if fewer := of_more(spec.k, known):
        return fewer
    if not result.is_exact:
        return "its products were coarse and not compared with exact ones; ask anew"
    if result.method == "nystrom" and spec.k + spec.oversampling == known:
        return "no random vector would be added: ask for a larger k, or some oversampling"
    return ""


OPERATION = Operation(
    name="low_rank",
    summary="Approximate the operator by a low-rank matrix, a preconditioner of solve.",
    spec=LowRankSpec,
    progress=LowRankProgress,
    result=LowRankResult,
    rules=_RULES,
    cost=_cost,
    headline=lambda spec: f"low_rank {spec.method} k={spec.k}",
    algorithm="hvp_core.stochastic.low_rank:LowRank",
    record="hvp_operations.low_rank.record:LowRankResult",
    extension=Extension(
        fields=("k", "oversampling", "tol", "max_products", "seed"),
        refusal=_refusal,
        takes_result=True,
        vectors=("eigenvectors",),
        new_seed=True,
    ),
)
