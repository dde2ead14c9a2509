"""The spectrum as one figure: the density of the whole, the six certified ends, how they came."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from hvp_demo.findings import Findings

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH_INCHES = 11.0
HEIGHT_INCHES = 7.2
DOTS_PER_INCH = 160
_PRODUCTS = "Hessian\N{EN DASH}vector products"


@dataclass(frozen=True, kw_only=True)
class Theme:
    """Colours of a figure; positive and negative curvature differ in lightness too."""

    background: str
    ink: str
    quiet: str  # secondary text
    grid: str
    positive: str
    negative: str
    bulk: str


LIGHT = Theme(
    background="#ffffff",
    ink="#1c2430",
    quiet="#5d6878",
    grid="#e3e7ee",
    positive="#1d5fd1",
    negative="#c8511b",
    bulk="#8a94a6",
)
DARK = Theme(
    background="#141a23",
    ink="#e8ecf3",
    quiet="#9aa6b8",
    grid="#2a3342",
    positive="#6ea8ff",
    negative="#f2935c",
    bulk="#7d899c",
)


def draw(findings: Findings, theme: Theme = LIGHT) -> bytes:
    """Draw the figure.

    Args:
        findings: Findings to draw.
        theme: Colours of the figure.

    Returns:
        A PNG of WIDTH_INCHES x HEIGHT_INCHES at DOTS_PER_INCH.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    style = {
        "font.family": ["DejaVu Sans"],
        "font.size": 10,
        "text.color": theme.ink,
        "axes.labelcolor": theme.quiet,
        "axes.edgecolor": theme.grid,
        "axes.facecolor": theme.background,
        "axes.titlecolor": theme.ink,
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.color": theme.quiet,
        "ytick.color": theme.quiet,
        "grid.color": theme.grid,
        "figure.facecolor": theme.background,
    }
    with mpl.rc_context(style):
        spacing = ConstrainedLayoutEngine(w_pad=0.14, h_pad=0.12, wspace=0.05, hspace=0.06)
        figure = Figure(figsize=(WIDTH_INCHES, HEIGHT_INCHES), layout=spacing)
        FigureCanvasAgg(figure)
        rows = [["density", "density"], ["values", "residuals"]]
        panels: dict[str, Axes] = figure.subplot_mosaic(rows)
        _density(panels["density"], findings, theme)
        _values(panels["values"], findings, theme)
        _residuals(panels["residuals"], findings, theme)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH)
    return buffer.getvalue()


def smoothed_counts(
    nodes: npt.NDArray[np.float64],
    counts: npt.NDArray[np.float64],
    grid: npt.NDArray[np.float64],
    *,
    width: float,
) -> npt.NDArray[np.float64]:
    """Sum of Gaussian bumps as high as their counts: neighbours add up.

    Args:
        nodes: (m,) places of the bumps.
        counts: (m,) their heights.
        grid: (g,) where to evaluate.
        width: Standard deviation of a bump, in the unit of nodes and grid.

    Returns:
        (g,) heights.
    """
    scaled = (grid[:, None] - nodes[None, :]) / width
    heights: npt.NDArray[np.float64] = np.exp(-0.5 * scaled**2) @ counts
    return heights


def _density(axes: Axes, findings: Findings, theme: Theme) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    # Gauss quadrature: with a random start sum_i w_i f(θ_i) estimates tr f(H) / n, so n·w_i is the
    # number of eigenvalues that the i-th Ritz value stands for.
    nodes = np.asarray(findings.ritz_values or findings.eigenvalues, dtype=np.float64)
    weights = np.asarray(findings.ritz_weights or [1 / nodes.size] * nodes.size, dtype=np.float64)
    counts = findings.num_parameters * weights
    certified = np.asarray(findings.eigenvalues, dtype=np.float64)
    everything = np.concatenate([nodes, certified])
    low, high = float(everything.min()), float(everything.max())
    # Linear near zero and logarithmic far out, so that the heap at zero, a few large positive
    # outliers and the smaller negative ones all have room.
    unit = max(float(np.median(np.abs(everything))) / 2, 1e-3 * max(abs(low), abs(high)), 1e-12)
    spread = np.arcsinh(np.array([low, high]) / unit)
    margin = 0.06 * (spread[1] - spread[0] or 1.0)
    places = np.linspace(spread[0] - margin, spread[1] + margin, 2000)
    heights = smoothed_counts(np.arcsinh(nodes / unit), counts, places, width=margin / 8)
    grid = unit * np.sinh(places)
    peak = float(counts.max())
    # A Ritz value that stands for less than a hundredth of an eigenvalue has no bump to show.
    floor = min(1e-2, peak * 1e-2)
    axes.set_xscale("asinh", linear_width=unit)
    axes.set_yscale("log")
    axes.set_xlim(grid[0], grid[-1])
    axes.set_ylim(floor, peak * 2e3)
    shade = np.maximum(heights, floor)
    axes.fill_between(grid, floor, shade, color=theme.bulk, alpha=0.22, lw=0)
    axes.vlines(nodes, floor, np.maximum(counts, floor), color=theme.bulk, lw=1.4)
    axes.plot(nodes, np.maximum(counts, floor), "o", ms=3.5, color=theme.bulk)
    axes.axvline(0, color=theme.quiet, lw=0.8, ls=(0, (2, 3)))
    # The certified values stand above the density; their bars are the true residuals.
    level = peak * 30
    for value, residual in zip(findings.eigenvalues, findings.residuals, strict=True):
        colour = theme.positive if value >= 0 else theme.negative
        axes.vlines(value, floor, level, color=colour, lw=0.9, alpha=0.5)
        axes.errorbar(
            value, level, xerr=residual, fmt="D", ms=6, color=colour, capsize=4, lw=1.6, mew=1.2
        )
    for value in {findings.smallest, findings.largest}:
        axes.annotate(
            _number(value, "+.2f"),
            (value, level),
            xytext=(0, 10),
            textcoords="offset points",
            ha="center",
            weight="bold",
            color=theme.positive if value >= 0 else theme.negative,
        )
    axes.xaxis.set_major_locator(FixedLocator(round_ticks(low, high, unit)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _number(value, "g")))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.set_title("Where the eigenvalues are  (heap: all of them, diamonds: the certified ends)")
    axes.set_xlabel("eigenvalue of the Hessian: curvature of the loss  (asinh scale)")
    axes.set_ylabel("eigenvalues per Ritz value")


def _number(value: float, form: str) -> str:
    return format(value, form).replace("-", "\N{MINUS SIGN}")


def round_ticks(low: float, high: float, unit: float) -> list[float]:
    """Ticks at 1, 2, 5 times powers of ten for an asinh axis, thinned to keep labels apart."""
    largest = max(abs(low), abs(high), unit)
    exponents = range(int(np.floor(np.log10(unit))), int(np.ceil(np.log10(largest))) + 1)
    sizes = [step * 10.0**exponent for exponent in exponents for step in (1, 2, 5)]
    signed = sorted({0.0, *sizes, *(-size for size in sizes)})
    kept: list[float] = [0.0]
    apart = 0.045 * float(np.arcsinh(high / unit) - np.arcsinh(low / unit))
    for tick in sorted(signed, key=abs):
        at = np.arcsinh(tick / unit)
        if low <= tick <= high and all(abs(at - np.arcsinh(k / unit)) > apart for k in kept):
            kept.append(tick)
    return sorted(kept)


def _values(axes: Axes, findings: Findings, theme: Theme) -> None:
    from matplotlib.ticker import MaxNLocator

    history = [snapshot for snapshot in findings.history if snapshot.ritz_values]
    for index in range(len(findings.eigenvalues)):
        points = [
            (snapshot.num_products, snapshot.ritz_values[index])
            for snapshot in history
            if len(snapshot.ritz_values) == len(findings.eigenvalues)
        ]
        colour = theme.positive if findings.eigenvalues[index] >= 0 else theme.negative
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, lw=1.6, marker=".", ms=4)
        axes.axhline(findings.eigenvalues[index], color=colour, lw=0.7, ls=(0, (1, 3)), alpha=0.8)
    axes.axhline(0, color=theme.quiet, lw=0.8, ls=(0, (2, 3)))
    axes.grid(axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title("Ritz values settle")
    axes.set_xlabel(_PRODUCTS)
    axes.set_ylabel("Ritz value")


def _residuals(axes: Axes, findings: Findings, theme: Theme) -> None:
    from matplotlib.ticker import MaxNLocator

    tiny = np.finfo(np.float64).tiny
    for index, value in enumerate(findings.eigenvalues):
        points = [
            (snapshot.num_products, max(snapshot.residual_estimates[index], tiny))
            for snapshot in findings.history
            if len(snapshot.residual_estimates) == len(findings.eigenvalues)
        ]
        colour = theme.positive if value >= 0 else theme.negative
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, lw=1.6, marker=".", ms=4)
        axes.plot(
            findings.num_products,
            max(findings.residuals[index], tiny),
            marker="D",
            ms=6,
            color=colour,
            mec=theme.background,
            ls="",
        )
    axes.set_yscale("log")
    axes.grid(axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title("Residuals fall  (line: estimate, diamond: true)")
    axes.set_xlabel(_PRODUCTS)
    axes.set_ylabel("‖Hy \N{MINUS SIGN} λy‖")
