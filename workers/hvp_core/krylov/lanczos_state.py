"""The state of a search for extremal eigenpairs between two products."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, final

import torch
from torch import Tensor

from hvp_core.krylov.completeness import Deflated, Recurrence
from hvp_core.krylov.krylov_basis import KrylovBasis
from hvp_core.krylov.two_pass import TwoPass

Which = Literal["LA", "SA", "LM", "BE"]
Stage = Literal["iterating", "first_pass", "second_pass", "completeness", "verifying"]


@final
@dataclass(frozen=True, kw_only=True)
class Sought:
    """Which eigenpairs a search is for, and when it has them.

    Attributes:
        k: Number of eigenpairs.
        which: `LA` largest, `SA` smallest, `LM` largest in magnitude, `BE` half from each end and
            the odd one from the high end.
        tol: The largest residual that counts as converged, relative to the largest Ritz value's
            magnitude.
    """

    k: int
    which: Which
    tol: float


@final
@dataclass(frozen=True, kw_only=True)
class Standing:
    """Where a search stands; no estimate is below what its products can show.

    Attributes:
        num_restarts: Times the basis was compressed.
        ritz_values: Ritz values of the wanted pairs, or of those furthest from done, ascending.
        residual_estimates: Estimated residual norm of each of these pairs.
    """

    num_restarts: int
    ritz_values: tuple[float, ...]
    residual_estimates: tuple[float, ...]


@final
@dataclass
class Verification:
    """The products of their own that each pair gets when the search is over.

    Attributes:
        standing: Where the search stood when it ended.
        is_exact: Whether the products are as exact as the vectors' dtype can hold them; otherwise
            nothing may be claimed.
        values: Rayleigh quotients of the pairs that have had their product.
        residuals: Residual norms ‖Ay − θy‖ / ‖y‖ of the same pairs.
    """

    standing: Standing
    is_exact: bool = True
    values: list[float] = field(default_factory=list)
    residuals: list[float] = field(default_factory=list)


@final
@dataclass
class LanczosState:
    """The whole state of a search under way.

    Law: what `fresh` is set against (`deflated`, the first `basis.origin` rows) stays as it is for
    as long as the fresh run lasts, and holds the wanted pairs. From the end of the search on, the
    first rows of the basis are the wanted Ritz vectors, while T still belongs to the rows before.

    Attributes:
        basis: The Krylov basis, and the operator projected to it.
        scale: max |θ| met: the operator's norm as far as it is known.
        size: What rounding goes by where that is more (`LinearOperator.size`).
        num_products: Products so far.
        num_restarts: Times the basis was compressed for want of room.
        ritz_values: Ritz values of the first basis, as it was before any restart or fresh start,
            (m,) float64; (0,) until then.
        ritz_weights: Squared overlaps of their Ritz vectors with the starting vector, (m,) float64.
        fresh: The fresh run that looks for missed eigenpairs; None while there is none.
        deflated: The pairs that were taken out of the operator before the fresh run.
        reference: Wanted values when the fresh run began, (k,) float64.
        num_given: Number of vectors that wait for their products because the run was given them.
        has_slid: Whether the basis has lost some of the fresh run's vectors.
        must_move: Whether the fresh run has seen something that the basis does not show yet.
        blur: The smallest gap that the fresh run can resolve, in units of what rounding leaves.
        num_rounds: Number of fresh runs so far.
        num_fresh_products: Number of products spent on fresh runs.
        is_complete: Whether it is shown that none of the wanted pairs is missing.
        has_converged: Whether the residuals of the wanted pairs met the tolerance.
        verification: The verification of the pairs; None while the search goes on.
        two_pass: The state of a search in two passes; None before it begins, and of one that keeps
            its basis.
    """

    basis: KrylovBasis
    scale: float = 0.0
    size: float = 0.0
    num_products: int = 0
    num_restarts: int = 0
    ritz_values: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    ritz_weights: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    fresh: Recurrence | None = None
    deflated: Deflated | None = None
    reference: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    num_given: int = 0
    has_slid: bool = False
    must_move: bool = False
    blur: int = 1
    num_rounds: int = 0
    num_fresh_products: int = 0
    is_complete: bool = False
    has_converged: bool = False
    verification: Verification | None = None
    two_pass: TwoPass | None = None

    @property
    def rounded_by(self) -> float:
        """What the rounding of products is relative to."""
        return max(self.scale, self.size)


def wanted(values: Tensor, k: int, which: Which) -> Tensor:
    """Indices, in ascending order, of the k wanted among ascending values (m,)."""
    m = len(values)
    k = min(k, m)
    if which == "LA":
        return torch.arange(m - k, m)
    if which == "SA":
        return torch.arange(k)
    if which == "LM":
        return values.abs().argsort(descending=True)[:k].sort().values
    low = k // 2
    return torch.cat((torch.arange(low), torch.arange(m - (k - low), m)))
