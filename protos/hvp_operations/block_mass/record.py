"""The SDK's record of the masses of a matrix' blocks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvp_operations.block_mass import MassLevel, Outcome
from hvp_operations.operation import Table
from hvp_operations.trace.record import MEANING as _OF_ESTIMATES
from hvp_operations.wording import clipped, name_of_matrix

_OWN = ("levels", "size")  # of the job alone
_MEANING: Mapping[str, str] = {
    **_OF_ESTIMATES,
    "MAX_PRODUCTS": "the budget of probes or products ran out before the tolerance was met: extend "
    "the job with more of both, or raise rtol",
    "NOISE_LIMIT": "the tolerance is below the rounding of the products: use a wider dtype, or a "
    "larger atol",
    "ZERO_OPERATOR": "all products were zero, and there is no fraction of nothing: look at the "
    "loss, or select other parameters",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockMassResult:
    """Masses of all blocks of a symmetric matrix A, and the share of those off its diagonal.

    The mass of A_ab, the rows of block a and the columns of block b, is ‖A_ab‖², the sum of the
    squares of its elements. Of 100 runs with other seeds, about 95 give an interval that holds the
    off-block fraction of the exact operator. With the outcome `UNVERIFIED` it is that of the
    operator as it was computed, rounding and all.

    Attributes:
        blocks: Names of the B blocks of parameters.
        block_sizes: Their numbers of parameters, (B,) int64.
        masses: Estimates of ‖A_ab‖², (B, B) float64, symmetric; without bias, so that one of a
            small mass may be negative where coarse products are corrected.
        standard_errors: Their standard errors, (B, B) float64.
        off_block_fraction: The mass off the diagonal blocks over the whole mass, as estimated: NaN
            where all products were zero, and maybe a little below 0 where coarse products are
            corrected.
        standard_error: Standard deviation of that fraction over the choice of random vectors.
        low: Lower end of its 95 % interval.
        high: Upper end of the interval.
        rounding: What the rounding of products can have moved the fraction by.
        outcome: `CONVERGED`, `MAX_PRODUCTS`, `NOISE_LIMIT`, `UNVERIFIED` or `ZERO_OPERATOR`.
        num_probes: Random vectors that the masses are made of.
        num_products: Operator products spent.
        num_exact_products: Of them, those with the exact operator, where the others are coarser.
        levels: What a job that extends this one goes on from.
        size: Sum over the probes of the squares by which the rounding of products goes.
        loss: L(θ), in nats.
        provenance: Origin of the figures: versions, digests, dtype, seed.
    """

    blocks: Sequence[str]
    block_sizes: NDArray[np.int64]
    masses: NDArray[np.float64]
    standard_errors: NDArray[np.float64]
    off_block_fraction: float
    standard_error: float
    low: float
    high: float
    rounding: float
    outcome: Outcome
    num_probes: int
    num_products: int
    num_exact_products: int
    levels: Sequence[MassLevel] = field(default=(), repr=False)
    size: float = 0.0
    loss: float
    provenance: Mapping[str, str]

    def __post_init__(self) -> None:
        square = (len(self.blocks), len(self.blocks))
        for name in ("masses", "standard_errors"):
            object.__setattr__(self, name, np.reshape(getattr(self, name), square))
        object.__setattr__(self, "block_sizes", np.asarray(self.block_sizes, np.int64))

    @property
    def interval(self) -> tuple[float, float]:
        """Both ends of the 95 % interval of the off-block fraction."""
        return self.low, self.high

    @property
    def diagonal_fraction(self) -> float:
        """The share of the mass that lies in the diagonal blocks."""
        return 1 - self.off_block_fraction

    @property
    def shares(self) -> NDArray[np.float64]:
        """The share of each block in the whole mass, (B, B); NaN where all products were zero."""
        with np.errstate(invalid="ignore"):
            shares: NDArray[np.float64] = self.masses / self.masses.sum()
        return shares

    @property
    def converged(self) -> bool:
        """Whether the estimate converged: the fraction's standard error meets the tolerance."""
        return self.outcome == "CONVERGED"

    def table(self) -> Table:
        """The fraction, and what each block of parameters has of the mass."""
        told = (self.provenance.get(key) for key in ("operator", "dtype", "precision"))
        value = f"{self.off_block_fraction:.4g} ± {self.standard_error:.2g}"
        return Table(
            title=f"{value} of the mass lies off the {len(self.blocks)} diagonal blocks, 95 % "
            f"interval [{self.low:.4g}, {self.high:.4g}]",
            headings=("block", "parameters", "on the diagonal", "beside it", "most of it with"),
            rows=tuple(self._row(index) for index in range(len(self.blocks))),
            notes=(
                f"{self.outcome}: {_MEANING.get(self.outcome, 'new to this client')}.",
                f"{''.join(f'{each}, ' for each in told if each)}{self.num_probes} probes, "
                f"{self.num_products} products, loss {self.loss:.6g} nats",
            ),
        )

    def _row(self, index: int) -> tuple[str, ...]:
        """A block of parameters, with its shares of the mass in its rows."""
        shares = self.shares[index].copy()
        own, shares[index] = shares[index], -np.inf
        return (
            clipped(self.blocks[index]),
            f"{self.block_sizes[index]:,}",
            f"{own:.3g}",
            f"{shares[np.isfinite(shares)].sum():.3g}",
            clipped(self.blocks[int(np.argmax(shares))]),
        )

    def plot(self, path: str | Path) -> None:
        """Draw the shares of all blocks in the mass as a map of logarithmic colours.

        Args:
            path: Path of the picture; its suffix says the format, as `.png` or `.svg`.

        Raises:
            ValueError: The suffix names no format, or there is no suffix; or all products were
                zero.
            ImportError: matplotlib is not installed.
            OSError: The file cannot be written.
        """
        from hvp_operations.block_mass.picture import draw

        if self.outcome == "ZERO_OPERATOR":
            raise ValueError("all products were zero: there is no mass to draw")
        kind = name_of_matrix(self.provenance.get("operator", "operator"))
        draw(self, kind, path)

    def to_json(self) -> dict[str, Any]:
        """The record as plain numbers, strings, lists and dicts; None for what is not a number."""
        plain = {name: value for name, value in vars(self).items() if name not in _OWN}
        for name, value in plain.items():
            if isinstance(value, np.ndarray):
                plain[name] = value.tolist()
            elif isinstance(value, float) and not math.isfinite(value):
                plain[name] = None
        return {**plain, "blocks": list(self.blocks), "provenance": dict(self.provenance)}
