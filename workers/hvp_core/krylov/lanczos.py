"""Extremal eigenpairs of a symmetric operator from its products: thick-restart block Lanczos.

Nothing here knows of models or ranks: the operator is known by its products, and a vector is
whatever part of it this process holds. A residual certifies an eigenvalue, not the k-th. So
`lanczos_search` goes on until none of the wanted pairs can be missing, `verification` gives each
pair a product of its own, and this module decides what may be claimed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, final

import torch
from hvp_operations.certificates import Completeness, Outcome
from hvp_operations.eigsh import EigshProgress, EigshResult, EigshSpec, beside_basis, taken
from torch import Tensor

from hvp_core.errors import CurvatureError
from hvp_core.krylov.krylov_basis import KrylovBasis
from hvp_core.krylov.lanczos_search import FAILURE, LanczosSearch
from hvp_core.krylov.lanczos_state import LanczosState, Sought, Stage, Standing
from hvp_core.krylov.orthogonality import combinations, finite_norm, rounding
from hvp_core.krylov.two_pass_search import TwoPassSearch
from hvp_core.krylov.verification import is_verified, verification_of, verify_next
from hvp_core.linop.linear_operator import LinearOperator
from hvp_core.runs.algorithm import Advance, Algorithm, Budget, Found

#: A residual is trusted to this many times what rounding leaves.
_TRUSTED = 10


@final
@dataclass(frozen=True, kw_only=True)
class Eigsh(Algorithm[LanczosState]):
    """The search for k extremal eigenpairs; every step makes one call, of a block of products.

    The outcome is one of these. `CONVERGED`: every true residual meets the tolerance, or rounding,
    and no pair was missed. `MULTIPLICITY_UNCERTAIN`: the latter could not be shown within the
    budget. `NOISE_LIMIT`: the search had converged and the verifying products do not confirm it;
    more of the same products would not help. `UNVERIFIED`: the search had converged, but there was
    no exact operator to verify it with; nothing is claimed. `MAX_PRODUCTS`: none of these. Error
    bounds are those of the operator's `exact()`.

    Cost: at most `max_products` products, and 4 m n multiplications for orthogonality in each;
    num_vectors + max(block_size, number of starts) vectors of memory. To show that none was missed
    takes about as many products as it takes to separate the wanted ends from the rest: some ten
    where they stand far apart.

    Attributes:
        spec: The eigenpairs to find, 1 <= k <= n; its budgets are those below.
        max_products: Upper bound on products, the k of the verification included; at least 2k.
        num_vectors: Rows of the basis, k < num_vectors <= n (k = num_vectors only where k = n).
        starts: Vectors to begin with, (local,) each; a random one where there are none.
        method: Whether the basis is kept, or what does not fit into it is made in two passes.

    Raises:
        ValueError: tol is 1 or more: every vector of the space would do.
    """

    spec: EigshSpec
    max_products: int
    num_vectors: int
    starts: Sequence[Tensor] = ()
    method: Literal["lanczos", "two_pass"] = "lanczos"

    def __post_init__(self) -> None:
        if not 0 <= self.spec.tol < 1:
            raise ValueError(f"tol is {self.spec.tol}; 0 <= tol < 1 is possible")

    @classmethod
    def configure(cls, spec: EigshSpec, operator: LinearOperator, budget: Budget) -> Eigsh:
        """See Algorithm."""
        dimension = operator.domain.dimension
        num_rows = min(budget.num_vectors - beside_basis(spec), dimension)
        return cls(
            spec=spec,
            max_products=budget.max_products,
            num_vectors=num_rows,
            starts=budget.inputs["v0"],
            method=taken(spec, num_rows, dimension),
        )

    def begin(self, operator: LinearOperator) -> LanczosState:
        """See Algorithm.

        Raises:
            CurvatureError: V0_INVALID: a start is zero.
        """
        space, spec = operator.domain, self.spec
        if any(finite_norm(space, start) == 0 for start in self.starts):
            raise CurvatureError("V0_INVALID", "a vector of v0 is zero; leave it out")
        starts, width = self.starts, spec.width
        if len(starts) > width:
            starts = combinations(space, starts, width)
        # A fresh run has to have room for two vectors beside the wanted ones.
        capacity = min(max(self.num_vectors, spec.k + max(2, width)), space.dimension)
        return LanczosState(
            KrylovBasis.begin(
                space,
                capacity,
                spec.seed,
                operator.noise,
                width=width,
                starts=starts,
                room=len(self.starts),
            )
        )

    def step(self, operator: LinearOperator, state: LanczosState) -> Advance | None:
        """See Algorithm."""
        search = self._search(operator, state)
        stage: Stage
        standing: Standing
        if state.verification is None:
            in_two = self.method == "two_pass"
            stage, standing = (TwoPassSearch(search) if in_two else search).step()
        elif not is_verified(search):
            verify_next(search)
            stage, standing = "verifying", state.verification.standing
        else:
            return None
        detail = EigshProgress(**vars(standing))
        return Advance(stage=stage, num_products=state.num_products, detail=detail)

    def result(self, operator: LinearOperator, state: LanczosState) -> Found:
        """See Algorithm."""
        found = _claims(self._search(operator, state))
        provenance = {
            "method": self.method,
            "num_lanczos_vectors": str(self.num_vectors),
            "block_size": str(self.spec.width),
            "seed": str(self.spec.seed),
            "verified_in": "float64" if found.error_bounds else "not verified",
        }
        return Found(
            result=replace(found, provenance=provenance),
            vectors=tuple(state.basis.rows[: len(found.eigenvalues)]),
        )

    def _search(self, operator: LinearOperator, state: LanczosState) -> LanczosSearch:
        sought = Sought(k=self.spec.k, which=self.spec.which, tol=self.spec.tol)
        return LanczosSearch(
            sought, self.max_products, self.spec.width, self.starts, operator, state
        )


def _claims(search: LanczosSearch) -> EigshResult:
    """The pairs that a search has found, and what may be claimed of them.

    The eigenvectors are the first rows of the basis.

    Args:
        search: A search all of whose pairs have had their product.
    """
    state, basis = search.state, search.basis
    verification = verification_of(search)
    values, residuals = verification.values, verification.residuals
    is_exact = verification.is_exact
    least = rounding(torch.finfo(basis.rows.dtype).eps)  # of the verifying products
    # Where terms cancel, rounding may be more than this: it is then the limit, and told as such.
    trusted = max(search.sought.tol, _TRUSTED * least) * state.scale
    rounded = least * state.rounded_by
    return EigshResult(
        eigenvalues=tuple(values),
        residuals=tuple(residuals),
        error_bounds=tuple(each + rounded for each in residuals) if is_exact else (),
        num_products=state.num_products,
        outcome=_outcome(search, all(each <= trusted for each in residuals), is_exact),
        completeness=_completeness(search) if is_exact else _nothing_known(search),
        symmetry_defect=basis.symmetry_defect,
        ritz_values=tuple(state.ritz_values.tolist()),
        ritz_weights=tuple(state.ritz_weights.tolist()),
    )


def _completeness(search: LanczosSearch) -> Completeness:
    """What is known of eigenvalues beyond those that were found."""
    state, verification = search.state, verification_of(search)
    noise, largest = max(verification.residuals), verification.values[-1]
    margin, failure = search.margin, min(1.0, FAILURE * state.num_rounds)
    shown = state.is_complete
    if search.basis.whole:
        failure = 0.0
    elif not shown and search.operator.semidefinite and search.sought.which == "SA":
        # The i-th smallest is at most the i-th Ritz value, and not negative.
        shown, margin, failure = True, max(0.0, largest), 0.0
    return Completeness(
        shown=shown,
        margin=margin + noise,
        failure_probability=failure,
        num_products=state.num_fresh_products,
    )


def _nothing_known(search: LanczosSearch) -> Completeness:
    return Completeness(
        shown=False,
        margin=math.inf,
        failure_probability=1.0,
        num_products=search.state.num_fresh_products,
    )


def _outcome(search: LanczosSearch, meets: bool, is_exact: bool) -> Outcome:
    state = search.state
    if state.has_converged and not is_exact:
        return "UNVERIFIED"
    if meets:
        return "CONVERGED" if state.is_complete else "MULTIPLICITY_UNCERTAIN"
    return "NOISE_LIMIT" if state.has_converged else "MAX_PRODUCTS"
