"""Extremal eigenpairs of a symmetric operator from its products: thick-restart Lanczos.

Nothing here knows of models or ranks: the operator is known by its products, and a vector is
whatever part of it this process holds. A residual certifies an eigenvalue, not the k-th:
`lanczos_search` goes on until none of the wanted can be missing, and `verification` says what may
be claimed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

from hvp_operations.eigsh import WORKING_VECTORS, EigshSpec

from hvp_core.krylov.krylov_basis import KrylovBasis
from hvp_core.krylov.lanczos_search import LanczosSearch
from hvp_core.krylov.lanczos_state import EigshState
from hvp_core.krylov.verification import is_verified, verified, verify_next
from hvp_core.linop.linear_operator import LinearOperator
from hvp_core.runs.algorithm import Advance, Algorithm, Budget, Found


@final
@dataclass(frozen=True, kw_only=True)
class Eigsh(Algorithm[EigshState]):
    """The search for k extremal eigenpairs; every step makes one product.

    The outcome is `CONVERGED` when every true residual meets the tolerance, or rounding, and none
    was missed; `MULTIPLICITY_UNCERTAIN` when the latter could not be shown within the budget;
    `NOISE_LIMIT` when the search had converged and the verifying products do not confirm it: more
    of the same products would not help; `UNVERIFIED` when there were none such: nothing is claimed;
    else `MAX_PRODUCTS`. Error bounds are of the operator's `exact()`.

    Cost: at most `max_products` products, and 4 m n multiplications for orthogonality in each;
    (num_vectors + 1) vectors of memory. To show that none was missed takes about as many products
    as it takes to separate the wanted ends from the rest: some ten where they stand far apart.

    Attributes:
        spec: What to find, 1 <= k < n, or k = n; its budgets are those below.
        max_products: Upper bound on products, the k of the verification included; at least 2k.
        num_vectors: Rows of the basis, k < num_vectors <= n (k = num_vectors only where k = n).

    Raises:
        ValueError: tol is 1 or more: every vector of the space would do.
    """

    spec: EigshSpec
    max_products: int
    num_vectors: int

    def __post_init__(self) -> None:
        if not 0 <= self.spec.tol < 1:
            raise ValueError(f"tol is {self.spec.tol}; 0 <= tol < 1 is possible")

    @classmethod
    def configure(cls, spec: EigshSpec, operator: LinearOperator, budget: Budget) -> Eigsh:
        """See Algorithm."""
        room = budget.num_vectors - WORKING_VECTORS - spec.k
        return cls(
            spec=spec,
            max_products=budget.max_products,
            num_vectors=min(room, operator.domain.dimension),
        )

    def begin(self, operator: LinearOperator) -> EigshState:
        """See Algorithm."""
        space = operator.domain
        # A fresh run has to have room for two vectors beside the wanted ones.
        capacity = min(max(self.num_vectors, self.spec.k + 2), space.dimension)
        return EigshState(KrylovBasis.begin(space, capacity, self.spec.seed, operator.noise))

    def step(self, operator: LinearOperator, state: EigshState) -> Advance | None:
        """See Algorithm."""
        search = self._search(operator, state)
        if state.verification is None:
            return search.step()
        return None if is_verified(search) else verify_next(search)

    def result(self, operator: LinearOperator, state: EigshState) -> Found:
        """See Algorithm."""
        found = verified(self._search(operator, state))
        provenance = {
            "num_lanczos_vectors": str(self.num_vectors),
            "seed": str(self.spec.seed),
            "verified_in": "float64" if found.error_bounds else "not verified",
        }
        return Found(
            result=replace(found, provenance=provenance),
            vectors=tuple(state.basis.rows[: len(found.eigenvalues)]),
        )

    def _search(self, operator: LinearOperator, state: EigshState) -> LanczosSearch:
        return LanczosSearch(self.spec, self.max_products, operator, state)
