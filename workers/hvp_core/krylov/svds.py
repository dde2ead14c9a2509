"""The largest singular values of an operator from its products, with their vectors.

Nothing here knows of models or ranks. A residual certifies a singular value, not the k-th. So
`svds_search` goes on until none of the wanted triplets can be missing, and this module gives each
triplet a product of its own each way, and decides what may be claimed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from hvp_operations.certificates import Completeness, Outcome
from hvp_operations.operation import EARLIER
from hvp_operations.svds import WORKING_PAIRS, SvdsProgress, SvdsResult, SvdsSpec
from torch import Tensor

from hvp_core.krylov.bidiagonal_basis import BidiagonalBasis
from hvp_core.krylov.lanczos_search import FAILURE
from hvp_core.krylov.lanczos_state import Stage, Standing
from hvp_core.krylov.orthogonality import finite_dots, finite_norm, rounding
from hvp_core.krylov.svds_known import Triplets
from hvp_core.krylov.svds_search import SvdsSearch
from hvp_core.krylov.svds_state import Checked, SvdsState
from hvp_core.linop.compositions import Transposed
from hvp_core.linop.linear_operator import LinearOperator
from hvp_core.runs.algorithm import Advance, Algorithm, Budget, Found

#: A residual is trusted to this many times what rounding leaves.
_TRUSTED = 10


@final
@dataclass(frozen=True, kw_only=True)
class Svds(Algorithm[SvdsState]):
    """The search for the k largest singular triplets; every step makes a product each way.

    The outcome is one of those of the search for eigenpairs (`lanczos.py`). The bound of a triplet
    is the larger of its two residuals, and rounding: (σ, u, v) is a triplet of A + E, and E has the
    norm of the larger residual (Davis, Kahan and Weinberger, "Norm-preserving dilations and their
    applications to optimal error bounds", SIAM J. Numer. Anal. 19 (1982)), so that one of the
    min(m, n) singular values of A is no further from σ.

    Cost: at most `max_products` products in all, and 4 m n multiplications for orthogonality in
    each; num_vectors + 1 pairs of vectors.

    Attributes:
        spec: The triplets to find, 1 <= k <= min(m, n); its budgets are those below.
        max_products: Upper bound on products with A and Aᵀ, the 2k of the verification included; at
            least 4k.
        num_vectors: Vectors of either basis, k < num_vectors <= min(m, n) (k = num_vectors only
            where k = min(m, n)).
        known: Triplets of the search that this one goes on from; None where there is none.

    Raises:
        ValueError: tol is 1 or more: any vectors would do.
    """

    spec: SvdsSpec
    max_products: int
    num_vectors: int
    known: Triplets | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.spec.tol < 1:
            raise ValueError(f"tol is {self.spec.tol}; 0 <= tol < 1 is possible")

    @classmethod
    def configure(cls, spec: SvdsSpec, operator: LinearOperator, budget: Budget) -> Svds:
        """See Algorithm."""
        room = budget.num_vectors - WORKING_PAIRS - spec.k
        most = min(operator.domain.dimension, operator.codomain.dimension)
        known = None
        if budget.earlier is not None:
            u, v = (budget.inputs[f"{EARLIER}{side}"] for side in ("u", "v"))
            left, right = (u, v) if _is_tall(operator) else (v, u)
            known = Triplets(budget.earlier, left, right)
        return cls(
            spec=spec,
            max_products=budget.max_products,
            num_vectors=min(room, most),
            known=known,
        )

    def begin(self, operator: LinearOperator) -> SvdsState:
        """See Algorithm."""
        tall = _tall(operator)
        # A fresh run has to have room beside the wanted triplets.
        capacity = min(max(self.num_vectors, self.spec.k + 2), tall.domain.dimension)
        state = SvdsState(
            BidiagonalBasis.begin(
                tall.domain, tall.codomain, capacity, self.spec.seed, operator.noise
            )
        )
        if self.known is not None:
            least = rounding(torch.finfo(tall.domain.dtype).eps)
            tol = self.spec.tol if self.spec.tol > least else 0.0
            state.given = self.known.begin(tall.domain, state.basis, tol)
        return state

    def step(self, operator: LinearOperator, state: SvdsState) -> Advance | None:
        """See Algorithm."""
        stage: Stage
        standing: Standing
        if state.checked is None:
            search = SvdsSearch(
                self.spec.k, self.spec.tol, self.max_products, _tall(operator), state
            )
            stage, standing = search.step()
        elif len(state.checked.values) < min(self.spec.k, state.basis.size):
            _check_next(operator, state)
            stage, standing = "verifying", state.checked.standing
        else:
            return None
        detail = SvdsProgress(
            num_restarts=standing.num_restarts,
            singular_values=standing.ritz_values,
            residual_estimates=standing.residual_estimates,
        )
        return Advance(stage=stage, num_products=state.num_products, detail=detail)

    def result(self, operator: LinearOperator, state: SvdsState) -> Found:
        """See Algorithm."""
        checked = state.checked
        assert checked is not None
        values = torch.tensor(checked.values, dtype=torch.float64)
        order = values.argsort(descending=True, stable=True).tolist()
        found = _claims(self.spec.tol, state, checked, order)
        provenance = {
            "num_lanczos_vectors": str(self.num_vectors),
            "seed": str(self.spec.seed),
            "verified_in": "float64" if found.error_bounds else "not verified",
        }
        u, v = _sides(operator, state)
        return Found(
            result=replace(found, provenance=provenance),
            vectors=(*(u[index] for index in order), *(v[index] for index in order)),
        )


def _is_tall(operator: LinearOperator) -> bool:
    return operator.domain.dimension <= operator.codomain.dimension


def _tall(operator: LinearOperator) -> LinearOperator:
    """The operator, or its transpose, whichever takes the shorter vectors."""
    return operator if _is_tall(operator) else Transposed(operator)


def _sides(operator: LinearOperator, state: SvdsState) -> tuple[Tensor, Tensor]:
    """Rows of the vectors u of the operator's codomain, and of the v of its domain."""
    basis = state.basis
    return (basis.left, basis.right) if _is_tall(operator) else (basis.right, basis.left)


def _check_next(operator: LinearOperator, state: SvdsState) -> None:
    """Make the products with the next triplet's vectors; note its value and its true residuals.

    Raises:
        CurvatureError: NON_FINITE.
    """
    checked = state.checked
    assert checked is not None
    exact = operator.exact()
    checked.is_exact = checked.is_exact and exact is not None
    used = exact or operator
    u, v = (rows[len(checked.values)] for rows in _sides(operator, state))
    for space, vector in ((operator.codomain, u), (operator.domain, v)):
        vector.div_(finite_norm(space, vector))
    (w,) = used.apply([v], borrow=True)
    along = float(finite_dots(operator.codomain, w.unsqueeze(0), u)[0])
    value = max(0.0, along)
    checked.residuals.append(finite_norm(operator.codomain, w.sub(u, alpha=value)))
    (w,) = used.apply_transposed([u], borrow=True)
    other = float(finite_dots(operator.domain, w.unsqueeze(0), v)[0])
    defect = abs(along - other) / state.scale if state.scale else 0.0
    checked.adjoint_defect = max(checked.adjoint_defect, defect)
    checked.transposed_residuals.append(finite_norm(operator.domain, w.sub(v, alpha=value)))
    checked.values.append(value)
    state.num_products += 2


def _claims(tol: float, state: SvdsState, checked: Checked, order: Sequence[int]) -> SvdsResult:
    """The triplets that a search has found, in this order, and what may be claimed of them."""
    basis = state.basis
    least = rounding(torch.finfo(basis.right.dtype).eps)  # of the verifying products
    larger = [max(checked.residuals[index], checked.transposed_residuals[index]) for index in order]
    trusted = max(tol, _TRUSTED * least) * state.scale
    return SvdsResult(
        singular_values=tuple(checked.values[index] for index in order),
        residuals=tuple(checked.residuals[index] for index in order),
        transposed_residuals=tuple(checked.transposed_residuals[index] for index in order),
        error_bounds=(
            tuple(each + least * state.scale for each in larger) if checked.is_exact else ()
        ),
        num_products=state.num_products,
        outcome=_outcome(state, checked, all(each <= trusted for each in larger)),
        completeness=_completeness(state, checked, max(larger)),
        adjoint_defect=checked.adjoint_defect if basis.is_given else basis.adjoint_defect,
    )


def _completeness(state: SvdsState, checked: Checked, noise: float) -> Completeness:
    """What is known of singular values beyond those that were found."""
    if not checked.is_exact or not state.is_complete:
        return Completeness(
            shown=False,
            margin=math.inf,
            failure_probability=1.0,
            num_products=state.num_fresh_products,
        )
    failure = 0.0 if state.basis.whole else min(1.0, FAILURE * max(1, state.num_rounds))
    return Completeness(
        shown=True,
        margin=state.shown_margin + state.given + noise,
        failure_probability=failure,
        num_products=state.num_fresh_products,
    )


def _outcome(state: SvdsState, checked: Checked, meets: bool) -> Outcome:
    if state.has_converged and not checked.is_exact:
        return "UNVERIFIED"
    if meets:
        return "CONVERGED" if state.is_complete else "MULTIPLICITY_UNCERTAIN"
    return "NOISE_LIMIT" if state.has_converged else "MAX_PRODUCTS"
