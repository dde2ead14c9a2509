"""Extremal eigenpairs of a symmetric operator from its products: thick-restart Lanczos.

Nothing here knows of models or ranks: the operator is a function, and a vector is whatever part of
it this process holds. A residual certifies an eigenvalue, not the k-th: `lanczos_search` goes on
until none of the wanted can be missing, and `verification` says what may be claimed.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass
from typing import Any

from hvp_operations.eigsh import (
    WORKING_VECTORS,
    Completeness,
    EigshProgress,
    EigshResult,
    EigshSpec,
)
from torch import Tensor

from hvp_core.algorithm import Advance, Algorithm, Budget, Found
from hvp_core.eigenpairs import Eigenpairs, Plan, Progress
from hvp_core.krylov_basis import Dots
from hvp_core.lanczos_search import LanczosSearch, Matvec
from hvp_core.linear_operator import LinearOperator
from hvp_core.verification import verify


def eigsh(
    matvec: Matvec,
    start: Tensor,
    dimension: int,
    plan: Plan,
    *,
    dots: Dots,
    random: Callable[[int], Tensor],
    agree: Callable[[Any], Any] = lambda found: found,
    verifier: Callable[[], Matvec | None] | None = None,
) -> Generator[Progress, None, Eigenpairs]:
    """Run Lanczos as a generator: it yields after every product and returns the eigenpairs.

    Args:
        matvec: v -> Av, on what this process holds of a vector, (local,). What it returns is not
            written to.
        start: Starting vector (local,), not zero.
        dimension: n, the length of a whole vector.
        plan: What to find.
        dots: (rows (m, local), vector (local,)) -> inner products (m,) float64 of whole vectors.
        random: seed -> a random vector (local,), Gaussian: nothing else may depend on it.
        agree: One answer from those of all processes: two machines may solve the same small
            eigenproblem with other signs, and each would rotate its part of the basis its own way.
        verifier: Asked when the search is over, gives v -> Av as exact as the vector's dtype can
            hold it, or None where that cannot be afforded; by default matvec is as exact. Error
            bounds are of this operator.

    Yields:
        Progress after every product.

    Returns:
        The pairs. Their outcome is `CONVERGED` when every true residual meets the tolerance, or
        rounding, and none was missed; `MULTIPLICITY_UNCERTAIN` when the latter could not be shown
        within the budget; `NOISE_LIMIT` when the search had converged and the verifying products
        do not confirm it: more of the same products would not help; `UNVERIFIED` when there were
        none such: nothing is claimed; else `MAX_PRODUCTS`.

    Raises:
        CurvatureError: NON_FINITE.

    Cost: at most plan.max_products products, and 4 m n multiplications for orthogonality in each;
    (num_vectors + 1) vectors of memory. To show that none was missed takes about as many products
    as it takes to separate the wanted ends from the rest: some ten where they stand far apart.
    """
    search = LanczosSearch(matvec, start, dimension, plan, dots, random, agree)
    yield from search.iterate()
    exact = matvec if verifier is None else verifier()
    return (yield from verify(search, exact))


_PAIRS_TOLD = 64  # of a search that is under way


@dataclass
class EigshState:
    """A search under way."""

    steps: Generator[Progress, None, Eigenpairs]
    pairs: Eigenpairs | None = None


@dataclass(frozen=True)
class Eigsh(Algorithm[EigshState]):
    """The search as an algorithm."""

    plan: Plan
    seed: int

    @classmethod
    def configure(cls, spec: EigshSpec, operator: LinearOperator, budget: Budget) -> Eigsh:
        """See Algorithm."""
        room = budget.num_vectors - WORKING_VECTORS - spec.k
        return cls(
            Plan(
                k=spec.k,
                which=spec.which,
                tol=spec.tol,
                max_products=budget.max_products,
                num_vectors=min(room, operator.domain.dimension),
                semidefinite=operator.semidefinite,
                noise=operator.noise,
            ),
            spec.seed,
        )

    def begin(self, operator: LinearOperator) -> EigshState:
        """See Algorithm."""
        space = operator.domain

        def random(index: int) -> Tensor:
            # Far from the seeds that people choose, and different for each index.
            return space.random((self.seed + index * 0x9E3779B97F4A7C15) % 2**64, "gaussian")

        def exact() -> Matvec | None:
            exact = operator.exact()
            return None if exact is None else lambda v: exact.apply([v], borrow=True)[0]

        return EigshState(
            eigsh(
                lambda v: operator.apply([v], borrow=True)[0],
                random(0),
                space.dimension,
                self.plan,
                dots=space.dots,
                random=random,
                agree=space.agree,
                verifier=exact,
            )
        )

    def step(self, operator: LinearOperator, state: EigshState) -> Advance | None:
        """See Algorithm."""
        try:
            progress = next(state.steps)
        except StopIteration as stop:
            state.pairs = stop.value
            return None
        values, estimates = _furthest_from_done(progress)
        return Advance(
            stage=progress.stage,
            num_products=progress.num_products,
            detail=EigshProgress(
                num_restarts=progress.num_restarts,
                ritz_values=values,
                residual_estimates=estimates,
            ),
        )

    def result(self, operator: LinearOperator, state: EigshState) -> Found:
        """See Algorithm."""
        pairs = state.pairs
        assert pairs is not None
        return Found(
            result=EigshResult(
                eigenvalues=tuple(pairs.eigenvalues.tolist()),
                residuals=tuple(pairs.residuals.tolist()),
                num_products=pairs.num_products,
                outcome=pairs.outcome,
                error_bounds=tuple(pairs.error_bounds.tolist()),
                completeness=Completeness(**asdict(pairs.completeness)),
                symmetry_defect=pairs.symmetry_defect,
                ritz_values=tuple(pairs.ritz_values.tolist()),
                ritz_weights=tuple(pairs.ritz_weights.tolist()),
                provenance={
                    "num_lanczos_vectors": str(self.plan.num_vectors),
                    "seed": str(self.seed),
                    "verified_in": "float64" if len(pairs.error_bounds) else "not verified",
                },
            ),
            vectors=tuple(pairs.eigenvectors),
        )


def _furthest_from_done(progress: Progress) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Some pairs, in their order: an event is stored for each product, and k may be thousands."""
    estimates = progress.residual_estimates
    worst = sorted(range(len(estimates)), key=lambda index: -estimates[index])[:_PAIRS_TOLD]
    return (
        tuple(progress.ritz_values[index] for index in sorted(worst)),
        tuple(estimates[index] for index in sorted(worst)),
    )
