"""The picture of a matrix' blocks: the share of each in the whole mass."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray

from hvp_operations.wording import clipped

_NOTHING = "#e3e6ec"  # of an estimate that is not above zero
_DECADES = 8  # of the scale, at most
_WRITTEN = 14  # blocks whose shares are written out
_TICKS = 48  # names that an edge has room for
_NAME = 34  # characters of one


class Masses(Protocol):
    """The part of the SDK's `BlockMassResult` that is drawn."""

    @property
    def blocks(self) -> Sequence[str]:
        """Names of the blocks of parameters."""

    @property
    def shares(self) -> NDArray[np.float64]:
        """Shares of the matrix' blocks in the whole mass."""

    @property
    def off_block_fraction(self) -> float:
        """The share off the diagonal blocks."""

    @property
    def interval(self) -> tuple[float, float]:
        """Its 95 % interval."""


def draw(result: Masses, matrix: str, path: str | Path) -> None:
    """Draw the shares as a map with a logarithmic scale of colours.

    Args:
        result: The result, not of a zero matrix.
        matrix: What the matrix is called.
        path: Path of the file; its suffix says the format.

    Raises:
        ValueError: The suffix names no format, or there is no suffix.
        OSError: The file cannot be written.
    """
    if not Path(path).suffix:
        raise ValueError(f"{str(path)!r} has no suffix to say the format; end it in .png")
    shares, count = result.shares, len(result.blocks)
    side = min(14.0, max(4.0, (0.62 if count <= _WRITTEN else 0.24) * count))
    names = [clipped(name, _NAME) for name in result.blocks]
    edge = 0.075 * max(map(len, names)) + 0.5
    figure = Figure(figsize=(side + edge + 1.2, side + edge + 0.9), layout="constrained")
    axes = figure.subplots()
    top = float(shares.max())
    least = max(float(shares[shares > 0].min()), top / 10**_DECADES)
    norm = LogNorm(least if least < top else top / 10, top)
    axes.set_facecolor(_NOTHING)
    image = axes.imshow(
        np.ma.masked_less_equal(shares, 0).clip(min=least), norm=norm, cmap="viridis"
    )
    step = -(-count // _TICKS)
    ticks = np.arange(0, count, step)
    axes.set_xticks(ticks, names[::step], rotation=90, fontsize="small")
    axes.set_yticks(ticks, names[::step], fontsize="small")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if count <= _WRITTEN:
        _write(axes, shares, norm)
    bar = figure.colorbar(image, ax=axes, shrink=0.8, pad=0.02)
    bar.set_label("share of the whole mass")
    low, high = result.interval
    figure.suptitle(
        f"Mass of {matrix} by blocks of parameters\n{result.off_block_fraction:.3g} of it is off "
        f"the diagonal; 95 % interval {low:.3g} to {high:.3g}",
        x=0.01,
        ha="left",
    )
    figure.savefig(path, dpi=130)


def _write(axes: Axes, shares: NDArray[np.float64], norm: LogNorm) -> None:
    """Write each share into its square."""
    for (row, column), share in np.ndenumerate(shares):
        is_bright = share > 0 and norm(share) > 0.6
        text = f"{100 * share:.2g} %" if share >= 1e-4 else f"{share:.0e}"
        axes.text(
            column,
            row,
            text if share > 0 else "0",
            ha="center",
            va="center",
            fontsize="x-small",
            color="#16202e" if is_bright or share <= 0 else "white",
        )
