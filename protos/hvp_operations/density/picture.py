"""The picture of a spectral density."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from hvp_operations.wording import name_of_matrix

_POINTS = (800, 20_000)  # of a curve, at least and at most
_PER_KERNEL = 5  # of them within a kernel's standard deviation, so that no peak is overlooked
_TAIL = 0.005  # of the eigenvalues, on either side of the panel that leaves outliers out
_SMALL = 0.25  # of the spectrum: a bulk that takes less gets a panel of its own
_RESOLVED = 3  # nodes that each probe has in a bulk whose shape is known
_FINE = 1 / 50  # of a panel: the kernel's standard deviation in it
_COLOUR = "#1c5fd4"


class Spectrum(Protocol):
    """The part of the SDK's `DensityResult` that is drawn."""

    @property
    def quadratures(self) -> Sequence[Any]:
        """One quadrature for each probe."""

    @property
    def provenance(self) -> Mapping[str, str]:
        """Origin of the figures: versions, digests, dtype, seed."""

    @property
    def num_parameters(self) -> int:
        """The order of the operator."""

    @property
    def nodes(self) -> NDArray[np.float64]:
        """Ritz values, (K, m)."""

    @property
    def weights(self) -> NDArray[np.float64]:
        """Weights of the nodes, (K, m)."""

    def density(self, x: Any, sigma: float | None = None) -> Any:
        """Mean and standard error of the smoothed density at points."""


def draw(result: Spectrum, path: str | Path, sigma: float | None) -> None:
    """Draw the density into a file.

    Args:
        result: The density.
        path: Path of the file; its suffix says the format.
        sigma: The kernel's standard deviation, for a single panel; None chooses it, and whether a
            second panel shows the bulk.
    """
    nodes = result.nodes
    ends = float(nodes.min()), float(nodes.max())
    bulk = _bulk(result)
    is_small = 0 < bulk[1] - bulk[0] < _SMALL * (ends[1] - ends[0])
    is_resolved = is_small and _num_inside(result, bulk) >= _RESOLVED
    panels = [ends, bulk] if is_resolved and sigma is None else [ends]
    figure = Figure(figsize=(9, 4.4 * len(panels)), layout="constrained")
    rows = figure.subplots(len(panels), squeeze=False)[:, 0]
    for axes, (low, high) in zip(rows, panels, strict=True):
        width = sigma or _FINE * (high - low) or 1.0
        margin = max(4 * width, 0.02 * (high - low))
        _panel(axes, result, low - margin, high + margin, width)
    kind = result.provenance.get("operator", "operator")
    name = name_of_matrix(kind)
    figure.suptitle(
        f"Spectral density of {name}, {result.num_parameters:,} parameters",
        x=0.01,
        ha="left",
        fontsize="x-large",
    )
    counts = f"{len(result.quadratures)} probes of {nodes.shape[1]} Lanczos steps each"
    title = f"The whole spectrum, from {counts}"
    if is_small and not is_resolved:
        title += (
            f"\n{1 - 2 * _TAIL:.0%} of the weight is on nodes from {bulk[0]:.2g} to {bulk[1]:.2g}: "
            "so few steps do not resolve the bulk"
        )
    rows[0].set_title(title, loc="left", fontsize="medium")
    for axes in rows[1:]:
        rows[0].axvspan(*axes.get_xlim(), color="#8a94a6", alpha=0.15, linewidth=0)
        axes.set_title(
            f"The grey part of it: {1 - 2 * _TAIL:.0%} of all eigenvalues",
            loc="left",
            fontsize="medium",
        )
    rows[0].legend(frameon=False)
    rows[-1].set_xlabel("eigenvalue")
    figure.savefig(path, dpi=160)


def _bulk(result: Spectrum) -> tuple[float, float]:
    """The interval in which nearly all eigenvalues lie."""
    nodes, weights = result.nodes.ravel(), result.weights.ravel()
    order = nodes.argsort()
    share = weights[order].cumsum() / weights.sum()
    low, high = np.searchsorted(share, (_TAIL, 1 - _TAIL))
    return float(nodes[order][low]), float(nodes[order][min(high, len(order) - 1)])


def _num_inside(result: Spectrum, interval: tuple[float, float]) -> int:
    """How many nodes the probe with the fewest has in an interval."""
    low, high = interval
    return int(((result.nodes >= low) & (result.nodes <= high)).sum(1).min())


def _panel(axes: Any, result: Spectrum, low: float, high: float, width: float) -> None:
    """Draw the part of the spectrum from `low` to `high` in one panel."""
    least, most = _POINTS
    x = np.linspace(low, high, min(most, max(least, int(_PER_KERNEL * (high - low) / width))))
    mean, error = result.density(x, width)
    peak = 1 / (result.num_parameters * width * math.sqrt(2 * math.pi))  # of one eigenvalue
    top = float((mean + 2 * np.where(np.isfinite(error), error, 0)).max())
    bottom = min(peak / 3, top / 100)
    axes.plot(x, mean, color=_COLOUR, label="mean over the probes")
    if np.isfinite(error).all():
        axes.fill_between(
            x,
            np.maximum(mean - 2 * error, bottom / 10),
            mean + 2 * error,
            alpha=0.25,
            color=_COLOUR,
            linewidth=0,
            label="± 2 standard errors",
        )
    axes.axhline(
        peak, color="#8a94a6", linewidth=0.8, linestyle=":", label="peak of one eigenvalue"
    )
    ritz = np.asarray(result.quadratures[0].nodes)
    axes.plot(
        ritz,
        np.full(len(ritz), 0.015),
        "|",
        transform=axes.get_xaxis_transform(),
        color="#47536b",
        markersize=6,
        markeredgewidth=0.7,
        label="nodes of the first probe",
    )
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    axes.set_ylim(bottom, 2 * top)
    axes.set_ylabel(f"density, smoothed by {width:.2g}")
    axes.spines[["top", "right"]].set_visible(False)
