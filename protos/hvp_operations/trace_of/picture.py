"""The picture of the trace of a function: how it becomes known, probe by probe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hvp_operations.students_t import student_t

_COLOUR, _GREY = "#1c5fd4", "#8a94a6"


class Estimated(Protocol):
    """The part of the SDK's `TraceOfResult` that is drawn."""

    @property
    def probes(self) -> Sequence[Any]:
        """What each random vector has seen."""

    @property
    def value(self) -> float:
        """The estimate."""

    @property
    def interval(self) -> tuple[float, float]:
        """Both ends of the 95 % interval."""

    @property
    def num_parameters(self) -> int:
        """The order of the operator."""


def draw(result: Estimated, path: str | Path) -> None:
    """Draw value and interval against the number of probes into a file.

    Args:
        result: The result.
        path: Path of the file; its suffix says the format.
    """
    low, value, high = (
        np.array([getattr(each, name) for each in result.probes])
        for name in ("low", "value", "high")
    )
    count = np.arange(1, len(value) + 1)
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(count, value, "o", color=_GREY, markersize=3.5, label="each probe's own")
    axes.plot(count, np.cumsum(value) / count, color=_COLOUR, label="mean of the probes so far")
    if len(count) > 1 and np.isfinite(low).all() and np.isfinite(high).all():
        half = _halves(low), _halves(high)
        means = np.cumsum(low) / count, np.cumsum(high) / count
        axes.fill_between(
            count[1:],
            (means[0] - half[0])[1:],
            (means[1] + half[1])[1:],
            alpha=0.2,
            color=_COLOUR,
            linewidth=0,
            label="95 % interval: probes, steps and rounding",
        )
        # Of two probes it is so wide that nothing else would be seen.
        middle = max(2, min(8, len(count))) - 1
        ends = (means[0] - half[0])[middle], (means[1] + half[1])[middle]
        bottom, top = min(ends[0], value.min()), max(ends[1], value.max())
        margin = 0.05 * (top - bottom) or 1.0
        axes.set_ylim(bottom - margin, top + margin)
    axes.set_xlabel("probes")
    axes.set_ylabel("z·f(A + λI)z, and its mean")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(
        f"{result.value:.6g}, between {result.interval[0]:.6g} and {result.interval[1]:.6g}: "
        f"{len(value)} probes, {result.num_parameters:,} parameters",
        loc="left",
        fontsize="large",
    )
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=160)


def _halves(values: Any) -> Any:
    """Half the width of the 95 % interval of the mean of the first one, two, ... values."""
    return np.array(
        [
            np.inf
            if number == 1
            else student_t(number - 1) * values[:number].std(ddof=1) / np.sqrt(number)
            for number in range(1, len(values) + 1)
        ]
    )
