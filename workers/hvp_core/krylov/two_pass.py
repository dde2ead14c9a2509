"""The state of a search in two passes, and what the coefficients of its recurrence tell.

Cullum and Willoughby, "Lanczos Algorithms for Large Symmetric Eigenvalue Computations" (1985): of a
Lanczos run that forgets its vectors, an eigenvalue that has converged comes back as a further Ritz
value, a ghost. Together the Ritz values of an eigenvalue have the weight in the start that it has,
so those that lie close are taken for one, with the projection of the start on all of them; and one
that has come out of rounding shows by its weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor


@final
@dataclass
class TwoPass:
    """Where a search in two passes stands.

    Law: while it is on, the first `num_kept` rows of the basis are Ritz vectors that have
    converged, which the recurrence is kept orthogonal to, all of its rows are Ritz vectors, T is
    diagonal and so is `leaks`. Behind the rows lie the recurrence's last two vectors; in the second
    pass, what it makes of the pairs comes before these and in the place of the rows that had not
    converged.

    Attributes:
        is_on: Whether the products are those of the two passes; otherwise Lanczos makes them.
        num_kept: Number of rows that have converged; -1 between two searches.
        start: Index of the random vector that the recurrence starts with; -1 where that is the sum
            of the pairs that have not converged.
        alphas: Diagonal of the recurrence's tridiagonal matrix, of the first pass.
        betas: Couplings of each vector to the next.
        next_look: Number of products after which the first pass looks at its Ritz values.
        most: Products that the first pass may make.
        weights: Of the second pass, coefficients (steps, u) of the new vectors in those of the
            recurrence; (0, 0) before.
        num_done: Products of the second pass.
        num_left: Of the rows at the end of the passes, number of those that wait for their product.
        num_unsettled: Wanted pairs that had not converged when the passes began.
        unknown: Rows whose true residual is asked for next.
        known: Rows whose true residual is known.
    """

    is_on: bool = False
    num_kept: int = 0
    start: int = -1
    alphas: list[float] = field(default_factory=list)
    betas: list[float] = field(default_factory=list)
    next_look: int = 0
    most: int = 0
    weights: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.float64))
    num_done: int = 0
    num_left: int = 0
    num_unsettled: int = 0
    unknown: list[int] = field(default_factory=list)
    known: list[int] = field(default_factory=list)


@final
@dataclass(frozen=True)
class Seen:
    """What a recurrence that starts with x has seen of an operator's spectrum.

    Attributes:
        values: The values (g,) that its Ritz values stand for, ascending.
        weights: Coefficients (steps, g) in the recurrence's vectors of a vector of norm one for
            each: the part that x has of it.
        residuals: Residual norms (g,) of these vectors, in exact arithmetic.
    """

    values: Tensor
    weights: Tensor
    residuals: Tensor


def seen(alphas: Sequence[float], betas: Sequence[float], apart: float, weightless: float) -> Seen:
    """What the coefficients of a recurrence tell. Cost: 10 j³ for j steps.

    Args:
        alphas: Diagonal of the tridiagonal matrix (j,), not empty.
        betas: Couplings of each vector to the next (j,).
        apart: Values that lie no further apart are one.
        weightless: Weight of a Ritz value in the start that is too little for an eigenvalue.
    """
    diagonal = torch.tensor(alphas, dtype=torch.float64)
    beside = torch.tensor(betas, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(
        torch.diag(diagonal) + torch.diag(beside[:-1], 1) + torch.diag(beside[:-1], -1)
    )
    has_weight = vectors[0].square() > weightless
    values, vectors = values[has_weight], vectors[:, has_weight]
    group = torch.cat((torch.zeros(1), (values.diff() > apart).double())).cumsum(0).long()
    parts = values.new_zeros(int(group[-1]) + 1, len(values))
    parts[group, torch.arange(len(values))] = vectors[0]
    parts /= parts.norm(dim=1, keepdim=True)
    weights, centres = vectors @ parts.T, parts.square() @ values
    spread = (parts * (values - centres[group])).norm(dim=1)
    return Seen(centres, weights, spread + weights[-1].abs() * float(beside[-1]))
