"""Eigenpairs verified by products of their own, and what may be claimed of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from hvp_operations.eigsh import Completeness, EigshResult, Outcome
from torch import Tensor

from hvp_core.krylov.krylov_basis import finite_dots, finite_norm, rounding
from hvp_core.krylov.lanczos_search import FAILURE, LanczosSearch
from hvp_core.krylov.lanczos_state import Stage, Verification
from hvp_core.runs.algorithm import Advance

#: A residual is trusted to this many times what rounding leaves.
_TRUSTED = 10


def verification_of(search: LanczosSearch) -> Verification:
    """What a search that is over has verified so far."""
    verification = search.state.verification
    assert verification is not None
    return verification


def is_verified(search: LanczosSearch) -> bool:
    """Whether each pair has had its product."""
    verification = search.state.verification
    return verification is not None and len(verification.values) == _num_pairs(search)


def _num_pairs(search: LanczosSearch) -> int:
    return min(search.spec.k, search.basis.size)


def verify_next(search: LanczosSearch) -> Advance:
    """The product with the next of the Ritz vectors, its Rayleigh quotient and true residual.

    Args:
        search: That is over, and not all of whose pairs have had their product.

    Raises:
        CurvatureError: NON_FINITE.
    """
    state, space, rows = search.state, search.space, search.basis.rows
    verification = verification_of(search)
    exact = search.operator.exact()
    verification.is_exact = verification.is_exact and exact is not None
    y, rest = rows[len(verification.values)], rows[_num_pairs(search)]
    (w,) = (exact or search.operator).apply([y], borrow=True)
    state.num_products += 1
    squared = float(finite_dots(space, y.unsqueeze(0), y)[0])
    value = float(finite_dots(space, y.unsqueeze(0), w)[0]) / squared
    torch.add(w, y, alpha=-value, out=rest)
    verification.values.append(value)
    verification.residuals.append(finite_norm(space, rest) / math.sqrt(squared))
    if is_verified(search):
        _sort(rows, verification)
    stage: Stage = "verifying"
    return Advance(stage=stage, num_products=state.num_products, detail=verification.progress)


def verified(search: LanczosSearch) -> EigshResult:
    """What a search has found, and what may be claimed of it; its vectors are the first rows.

    Args:
        search: All of whose pairs have had their product.
    """
    state, basis = search.state, search.basis
    verification = verification_of(search)
    values, residuals = verification.values, verification.residuals
    is_exact = verification.is_exact
    least = rounding(torch.finfo(basis.rows.dtype).eps)  # of the verifying products
    trusted = search.tolerance(_TRUSTED * least)
    return EigshResult(
        eigenvalues=tuple(values),
        residuals=tuple(residuals),
        error_bounds=tuple(each + least * state.scale for each in residuals) if is_exact else (),
        num_products=state.num_products,
        outcome=_outcome(search, all(each <= trusted for each in residuals), is_exact),
        completeness=_completeness(search) if is_exact else _nothing_known(search),
        symmetry_defect=basis.symmetry_defect,
        ritz_values=tuple(state.ritz_values.tolist()),
        ritz_weights=tuple(state.ritz_weights.tolist()),
    )


def _completeness(search: LanczosSearch) -> Completeness:
    """What is known of the eigenvalues beyond these."""
    state, verification = search.state, verification_of(search)
    noise, largest = max(verification.residuals), verification.values[-1]
    margin, failure = search.margin, min(1.0, FAILURE * state.num_rounds)
    shown = state.is_complete
    if search.basis.whole:
        failure = 0.0
    elif not shown and search.operator.semidefinite and search.spec.which == "SA":
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


def _sort(rows: Tensor, verification: Verification) -> None:
    """Bring pairs and the first rows of the basis into ascending order of the values."""
    values: Sequence[float] = verification.values
    order = torch.tensor(values, dtype=torch.float64).argsort(stable=True).tolist()
    spare = rows[len(values)]
    place = list(range(len(values)))  # which of the vectors lies in a row
    for row, vector in enumerate(order):
        other = place.index(vector)
        if other != row:
            spare.copy_(rows[row])
            rows[row].copy_(rows[other])
            rows[other].copy_(spare)
            place[row], place[other] = place[other], place[row]
    verification.residuals = [verification.residuals[vector] for vector in order]
    verification.values = [values[vector] for vector in order]
