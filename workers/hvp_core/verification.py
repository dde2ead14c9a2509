"""Eigenpairs verified by products of their own, and what may be claimed of them."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence

import torch
from torch import Tensor

from hvp_core.eigenpairs import Completeness, Eigenpairs, Outcome, Progress
from hvp_core.krylov_basis import rounding
from hvp_core.lanczos_search import FAILURE, LanczosSearch, Matvec

#: A residual is trusted to this many times what rounding leaves.
_TRUSTED = 10


def verify(search: LanczosSearch, exact: Matvec | None) -> Generator[Progress, None, Eigenpairs]:
    """Rayleigh-Ritz vectors and their true residuals, one product each.

    Args:
        search: That is over.
        exact: The products; None if there are none better than the search's.
    """
    basis, k = search.basis, len(search.index)
    least = rounding(torch.finfo(basis.rows.dtype).eps)  # of the verifying products
    told = search.progress("verifying")
    basis.rotate(search.vectors[:, search.index])
    values, residuals = [], []
    for i in range(k):
        y, rest = basis.rows[i], basis.rows[k]
        w = (exact or search.matvec)(y)
        search.num_products += 1
        squared = float(basis.dots(y.unsqueeze(0), y)[0])
        value = float(basis.dots(y.unsqueeze(0), w)[0]) / squared
        torch.add(w, y, alpha=-value, out=rest)
        values.append(value)
        residuals.append(basis.norm(rest) / math.sqrt(squared))
        yield Progress(
            stage="verifying",
            num_products=search.num_products,
            num_restarts=search.num_restarts,
            ritz_values=told.ritz_values,
            residual_estimates=told.residual_estimates,
        )
    order = _sort(basis.rows, values)
    found = torch.tensor(values, dtype=torch.float64)[order]
    true = torch.tensor(residuals, dtype=torch.float64)[order]
    meets = bool((true <= search.tolerance(_TRUSTED * least)).all())
    noise = float(true.max())
    assert search.first_ritz is not None
    return Eigenpairs(
        eigenvalues=found,
        eigenvectors=basis.rows[:k],
        residuals=true,
        error_bounds=true + least * search.scale if exact else true[:0],
        num_products=search.num_products,
        outcome=_outcome(search, meets, exact is not None),
        completeness=_completeness(search, found, noise) if exact else _nothing_known(search),
        symmetry_defect=basis.symmetry_defect,
        ritz_values=search.first_ritz[0],
        ritz_weights=search.first_ritz[1],
    )


def _completeness(search: LanczosSearch, values: Tensor, noise: float) -> Completeness:
    """What is known of the eigenvalues beyond these, which are known to `noise`."""
    margin, failure = search.margin, min(1.0, FAILURE * search.num_rounds)
    shown = search.is_complete
    if search.basis.whole:
        failure = 0.0
    elif not shown and search.plan.semidefinite and search.plan.which == "SA":
        # The i-th smallest is at most the i-th Ritz value, and not negative.
        shown, margin, failure = True, max(0.0, float(values[-1])), 0.0
    return Completeness(
        shown=shown,
        margin=margin + noise,
        failure_probability=failure,
        num_products=search.num_fresh_products,
    )


def _nothing_known(search: LanczosSearch) -> Completeness:
    return Completeness(
        shown=False,
        margin=math.inf,
        failure_probability=1.0,
        num_products=search.num_fresh_products,
    )


def _outcome(search: LanczosSearch, meets: bool, is_verified: bool) -> Outcome:
    if search.has_converged and not is_verified:
        return "UNVERIFIED"
    if meets:
        return "CONVERGED" if search.is_complete else "MULTIPLICITY_UNCERTAIN"
    return "NOISE_LIMIT" if search.has_converged else "MAX_PRODUCTS"


def _sort(rows: Tensor, values: Sequence[float]) -> Tensor:
    """Bring the first rows of the basis into the order of these values; the permutation."""
    order = torch.tensor(values, dtype=torch.float64).argsort(stable=True)
    spare = rows[len(values)]
    place = list(range(len(values)))  # which of the vectors lies in a row
    for row, vector in enumerate(order.tolist()):
        other = place.index(vector)
        if other != row:
            spare.copy_(rows[row])
            rows[row].copy_(rows[other])
            rows[other].copy_(spare)
            place[row], place[other] = place[other], place[row]
    return order
