"""What the SDK gives of a spectral density: the quadratures, and what is made of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hvp_operations.density import Quadrature
from hvp_operations.operation import Table

_WIDTH = 1 / 50  # of the spectrum: the kernel's standard deviation where none is given
_POINTS = 500  # of a picture


class Estimate(NamedTuple):
    """A mean over the probes with its standard error.

    Attributes:
        value: The mean.
        standard_error: Sample standard deviation over √K; infinite for a single probe.
    """

    value: NDArray[np.float64]
    standard_error: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class DensityResult:
    """Spectral density of an operator of order n, as K quadratures.

    Each probe x of norm 1 sees the spectral measure Σ (x·uᵢ)² δ(λ − λᵢ); its mean over random
    probes is the density, (1/n) Σ δ(λ − λᵢ). Lanczos gives the Gauss quadrature of each probe's
    measure. What is said of errors is the spread over the probes; the smearing by a finite number
    of steps comes on top where the kernel is narrower than the spectrum's width over the number of
    steps.

    Attributes:
        quadratures: One for each probe: nodes and weights, which sum to one.
        orthogonality_defect: Largest entry of |QᵀQ − I| of the bases; 1 where they were not kept.
        num_products: Operator products spent.
        loss: L(θ), nats.
        provenance: What the figures rest on: versions, digests, dtype, seed.
    """

    quadratures: Sequence[Quadrature]
    orthogonality_defect: float
    num_products: int
    loss: float
    provenance: Mapping[str, str]

    @property
    def num_parameters(self) -> int:
        """n, the order of the operator."""
        return int(self.provenance["num_parameters"])

    @property
    def nodes(self) -> NDArray[np.float64]:
        """(K, m) Ritz values, ascending in each row; a probe that ended early repeats its last."""
        return self._rows([quadrature.nodes for quadrature in self.quadratures], "edge")

    @property
    def weights(self) -> NDArray[np.float64]:
        """(K, m) weights of `nodes`; each row sums to one, and what is repeated weighs nothing."""
        return self._rows([quadrature.weights for quadrature in self.quadratures], "constant")

    def expectation(self, values: NDArray[Any]) -> Estimate:
        """Mean of f(λ) over the spectrum, (1/n) Σ f(λᵢ).

        Args:
            values: f at `nodes`, (K, m), or with more dimensions before these: (..., K, m).

        Returns:
            The estimate, of the shape of the dimensions before; times n it is tr f(A).
        """
        each = (values * self.weights).sum(-1)
        probes = each.shape[-1]
        if probes == 1:
            return Estimate(each[..., 0], np.full(each.shape[:-1], np.inf))
        return Estimate(each.mean(-1), each.std(-1, ddof=1) / math.sqrt(probes))

    def density(self, x: ArrayLike, sigma: float | None = None) -> Estimate:
        """The density, smoothed with a Gaussian kernel; it integrates to one.

        Args:
            x: Points (p,).
            sigma: Standard deviation of the kernel, in units of the eigenvalues; default a fiftieth
                of the width of the spectrum.

        Returns:
            Mean and standard error (p,) over the probes, of the smoothed density.
        """
        width = self._width(sigma)
        points = np.asarray(x, np.float64)[..., None, None]
        kernel = np.exp(-0.5 * ((points - self.nodes) / width) ** 2)
        return self.expectation(kernel / (width * math.sqrt(2 * math.pi)))

    def moments(self, degree: int) -> Estimate:
        """(1/n) tr Aʲ for j = 0, ..., degree: exact for each probe up to twice the steps less one.

        Args:
            degree: The highest.

        Returns:
            Mean and standard error (degree + 1,) over the probes.
        """
        powers = np.arange(degree + 1)[:, None, None]
        return self.expectation(self.nodes[None] ** powers)

    def trace(self) -> Estimate:
        """Tr A, with its standard error over the probes."""
        mean = self.expectation(self.nodes)
        return Estimate(*(self.num_parameters * part for part in mean))

    def count(self, low: float, high: float) -> Estimate:
        """How many eigenvalues lie in (low, high], as far as the quadratures resolve its ends."""
        inside = (self.nodes > low) & (self.nodes <= high)
        share = self.expectation(inside.astype(np.float64))
        return Estimate(*(self.num_parameters * part for part in share))

    def table(self) -> Table:
        """Trace, spread and ends of the spectrum."""
        trace, square = self.trace(), self.moments(2)
        rows = (
            ("trace", _pair(trace)),
            ("mean eigenvalue", _pair(self.expectation(self.nodes))),
            ("mean square", _pair(Estimate(square.value[2], square.standard_error[2]))),
            ("negative eigenvalues, of all", _pair(self.expectation((self.nodes < 0) * 1.0))),
            ("largest Ritz value", f"{self.nodes.max():.6g}"),
            ("smallest Ritz value", f"{self.nodes.min():.6g}"),
        )
        told = (self.provenance.get(key) for key in ("operator", "dtype", "precision"))
        return Table(
            title=f"{len(self.quadratures)} probes, {self.nodes.shape[1]} steps, "
            f"{self.num_products} products, loss {self.loss:.6g} nats",
            headings=("", "estimate ± standard error"),
            rows=rows,
            notes=(
                "Standard errors are over the probes; they hold for the operator that was computed "
                "with, and say nothing of what finitely many steps smear.",
                f"{''.join(f'{each}, ' for each in told if each)}orthogonality defect "
                f"{self.orthogonality_defect:.1e}",
            ),
        )

    def to_json(self) -> dict[str, Any]:
        """Make plain numbers, strings, lists and dicts of it."""
        return {
            "quadratures": [
                {"nodes": list(each.nodes), "weights": list(each.weights)}
                for each in self.quadratures
            ],
            "orthogonality_defect": self.orthogonality_defect,
            "num_products": self.num_products,
            "loss": self.loss,
            "provenance": dict(self.provenance),
        }

    def plot(self, path: str | Path, sigma: float | None = None) -> None:
        """Draw the density on a logarithmic scale, with the band of two standard errors.

        Args:
            path: Of the picture; its suffix says the format, as `.png` or `.svg`.
            sigma: As for `density`.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from matplotlib.figure import Figure

        width = self._width(sigma)
        nodes = self.nodes
        x = np.linspace(nodes.min() - 4 * width, nodes.max() + 4 * width, _POINTS)
        mean, error = self.density(x, width)
        floor = 1 / (self.num_parameters * width * math.sqrt(2 * math.pi))  # one eigenvalue's peak
        figure = Figure(figsize=(9, 5), layout="constrained")
        axes = figure.add_subplot()
        if np.isfinite(error).all():
            axes.fill_between(
                x,
                np.maximum(mean - 2 * error, floor / 100),
                mean + 2 * error,
                alpha=0.25,
                color="#1c5fd4",
                linewidth=0,
                label="± 2 standard errors over the probes",
            )
        axes.plot(x, mean, color="#1c5fd4", label=f"mean of {len(self.quadratures)} probes")
        axes.axhline(
            floor, color="#8a94a6", linewidth=0.8, linestyle=":", label="a single eigenvalue"
        )
        axes.set_yscale("log")
        axes.set_ylim(bottom=floor / 10)
        kind = self.provenance.get("operator", "operator")
        axes.set_xlabel(f"eigenvalue of the {kind}")
        axes.set_ylabel(f"density, smoothed by {width:.3g}")
        axes.set_title(
            f"Spectral density, {self.num_parameters:,} parameters, {nodes.shape[1]} Lanczos steps",
            loc="left",
        )
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        figure.savefig(path, dpi=160)

    def _width(self, sigma: float | None) -> float:
        if sigma is None:
            spread = float(self.nodes.max() - self.nodes.min())
            return _WIDTH * spread or 1.0  # of a multiple of the identity any will do
        if not sigma > 0:
            raise ValueError(f"sigma is {sigma}; a width above 0 is possible")
        return float(sigma)

    @staticmethod
    def _rows(rows: Sequence[Sequence[float]], mode: Any) -> NDArray[np.float64]:
        longest = max(map(len, rows))
        return np.array(
            [np.pad(np.asarray(row, np.float64), (0, longest - len(row)), mode) for row in rows]
        )


def _pair(estimate: Estimate) -> str:
    return f"{float(estimate.value):.6g} ± {float(estimate.standard_error):.2g}"
