"""Eigenpairs verified by products of their own."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hvp_core.krylov.lanczos_search import LanczosSearch
from hvp_core.krylov.lanczos_state import Verification
from hvp_core.krylov.orthogonality import finite_dots, finite_norm


def verification_of(search: LanczosSearch) -> Verification:
    """The verification of a search that is over."""
    verification = search.state.verification
    assert verification is not None
    return verification


def is_verified(search: LanczosSearch) -> bool:
    """Whether each pair has had its product."""
    verification = search.state.verification
    return verification is not None and len(verification.values) == _num_pairs(search)


def _num_pairs(search: LanczosSearch) -> int:
    return min(search.sought.k, search.basis.size)


def verify_next(search: LanczosSearch) -> None:
    """Make the product with the next Ritz vector; note its Rayleigh quotient and true residual.

    Args:
        search: A search that is over, and not all of whose pairs have had their product.

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
    state.size = max(state.size, (exact or search.operator).size)
    squared = float(finite_dots(space, y.unsqueeze(0), y)[0])
    value = float(finite_dots(space, y.unsqueeze(0), w)[0]) / squared
    torch.add(w, y, alpha=-value, out=rest)
    verification.values.append(value)
    verification.residuals.append(finite_norm(space, rest) / math.sqrt(squared))
    if is_verified(search):
        _sort(rows, verification)


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
