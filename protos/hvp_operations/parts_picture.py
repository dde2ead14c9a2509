"""The picture of sums over the parts of a diagonal: tensors or layers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.scale import LogScale, SymmetricalLogScale
from numpy.typing import NDArray

_COLOUR, _GREY = "#1c5fd4", "#47536b"
_MOST = 60  # parts that a page has room for
_ROW = 0.2  # inches


def draw_parts(parts: Sequence[Any], title: str, path: str | Path) -> None:
    """Draw the sum over each part, and its mean for one parameter, with 95 % intervals.

    Of more parts than a page has room for, those with the largest sums are drawn, in their order.

    Args:
        parts: One or more, each with `name`, `num_parameters`, `value`, `low` and `high`.
        title: What is drawn, and of which operator.
        path: Path of the file; its suffix says the format.

    Raises:
        ValueError: The suffix names no format, or there is no suffix.
        OSError: The file cannot be written.
    """
    if not Path(path).suffix:
        raise ValueError(f"{str(path)!r} has no suffix to say the format; end it in .png")
    left_out = len(parts) - _MOST
    if left_out > 0:
        least = sorted(abs(each.value) for each in parts)[left_out]
        parts = [each for each in parts if abs(each.value) >= least]
        title += f"\nthe {len(parts)} largest of {len(parts) + left_out} parts"
    figure = Figure(figsize=(9, 1.4 + _ROW * len(parts)), layout="constrained")
    sums, means = figure.subplots(1, 2, sharey=True)
    value, low, high = (
        np.array([getattr(each, name) for each in parts]) for name in ("value", "low", "high")
    )
    size = np.array([each.num_parameters for each in parts])
    rows = np.arange(len(parts))
    sums.barh(rows, value, height=0.7, color=_COLOUR, alpha=0.75)
    means.plot(value / size, rows, "o", color=_COLOUR, markersize=5)
    means.set_xscale(_scale(low / size, value / size))
    for axes, scale, label in ((sums, 1.0, "sum"), (means, 1 / size, "mean, of one parameter")):
        axes.hlines(rows, low * scale, high * scale, color=_GREY, linewidth=1.2)
        axes.set_xlabel(label)
        axes.spines[["top", "right"]].set_visible(False)
    sums.axvline(0, color=_GREY, linewidth=0.8)
    means.grid(axis="y", linewidth=0.4, alpha=0.6)
    sums.set_yticks(rows, [each.name for each in parts], fontsize="small")
    sums.set_ylim(len(parts) - 0.4, -0.6)  # the first on top
    figure.suptitle(f"{title}; lines are 95 % intervals", x=0.01, ha="left")
    figure.savefig(path, dpi=130)


def _scale(low: NDArray[np.float64], value: NDArray[np.float64]) -> Any:
    """A logarithmic scale, whose middle is linear where numbers have both signs."""
    if (low > 0).all():
        return LogScale(None)
    typical = float(np.median(np.abs(value))) or 1.0
    return SymmetricalLogScale(None, linthresh=typical)
