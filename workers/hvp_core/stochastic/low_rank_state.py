"""What a run that makes a low-rank matrix knows between two steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

from torch import Tensor

from hvp_core.krylov.completeness import Recurrence
from hvp_core.krylov.krylov_basis import KrylovBasis
from hvp_core.krylov.lanczos_state import LanczosState
from hvp_core.runs.snapshot import vectors_of_the_space


@final
@dataclass
class Check:
    """A short Lanczos run on what the approximation leaves of the operator.

    Attributes:
        basis: The basis of the run.
        run: Its coefficients.
    """

    basis: KrylovBasis
    run: Recurrence


@final
@dataclass
class LowRankState:
    """What a run knows.

    Attributes:
        rows: The products of the random vectors; then U, (·, local).
        num_rows: Number of leading rows that hold something.
        size: Root of the sum of the squared norms of the products of the random vectors.
        eigenvalues: Eigenvalues of A_k, ascending; empty before they are known.
        shift: What was added to the diagonal while computing.
        orthogonality: ‖UᵀU − I‖₂.
        search: The search for eigenpairs, while it goes on.
        outcome: How the run ends, as far as that is decided.
        check: The run that bounds the error; None before it begins.
        num_products: Products so far.
        num_exact: Of them, those of the exact operator where the others are coarser.
        num_check: Of them, those that bound the error.
        is_exact: Whether there was memory for the exact operator wherever it was needed.
    """

    rows: Tensor = field(metadata=vectors_of_the_space("num_rows"))
    num_rows: int = 0
    size: float = 0.0
    eigenvalues: list[float] = field(default_factory=list)
    shift: float = 0.0
    orthogonality: float = 0.0
    search: LanczosState | None = None
    outcome: str = "CONVERGED"
    check: Check | None = None
    num_products: int = 0
    num_exact: int = 0
    num_check: int = 0
    is_exact: bool = True
