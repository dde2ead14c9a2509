"""The state of a search for singular triplets between two steps."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from hvp_core.krylov.bidiagonal_basis import BidiagonalBasis
from hvp_core.krylov.completeness import Deflated, Recurrence
from hvp_core.krylov.lanczos_state import Standing


@final
@dataclass
class Checked:
    """The products of their own that each triplet gets when the search is over.

    Attributes:
        standing: Where the search stood when it ended.
        is_exact: Whether the products are as exact as the vectors' dtype can hold them; otherwise
            nothing may be claimed.
        values: σ = u·Av of the triplets that have had their products.
        residuals: ‖Av − σu‖ of the same triplets.
        transposed_residuals: ‖Aᵀu − σv‖ of the same triplets.
        adjoint_defect: Largest |u·Av − v·Aᵀu| / ‖A‖ of the same triplets, with the norm as the run
            knows it.
    """

    standing: Standing
    is_exact: bool = True
    values: list[float] = field(default_factory=list)
    residuals: list[float] = field(default_factory=list)
    transposed_residuals: list[float] = field(default_factory=list)
    adjoint_defect: float = 0.0


@final
@dataclass
class SvdsState:
    """The whole state of a search under way.

    Law: while `fresh` is there, the first `num_deflated` vectors of the bases are the triplets that
    it is set against, the wanted ones among them. From the end of the search on, the first vectors
    of the bases are the wanted triplets.

    Attributes:
        basis: The two Krylov bases, and the operator projected to them.
        scale: The largest Ritz value met: the operator's norm as far as it is known.
        num_products: Products so far, with A and with Aᵀ.
        num_restarts: Times the bases were compressed for want of room.
        fresh: The fresh run that looks for missed triplets; None while there is none.
        deflated: The triplets that were taken out of the operator before the fresh run.
        reference: Wanted values when the fresh run began, (k,) float64, descending.
        num_beyond: Triplets beside the wanted ones that have to settle before the next fresh run.
        num_rounds: Number of fresh runs so far.
        num_fresh_products: Number of products spent on fresh runs.
        given: ‖ΔA‖ at most, where known triplets were taken without a product: they are those of
            A + ΔA, and so is what is shown.
        shown_margin: The margin to which it is shown that none is missing.
        is_complete: Whether it is shown that none of the wanted triplets is missing.
        has_converged: Whether the residuals of the wanted triplets met the tolerance.
        checked: The verification of the triplets; None while the search goes on.
    """

    basis: BidiagonalBasis
    scale: float = 0.0
    num_products: int = 0
    num_restarts: int = 0
    fresh: Recurrence | None = None
    deflated: Deflated | None = None
    reference: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    num_beyond: int = 0
    num_rounds: int = 0
    num_fresh_products: int = 0
    given: float = 0.0
    shown_margin: float = math.inf
    is_complete: bool = False
    has_converged: bool = False
    checked: Checked | None = None
