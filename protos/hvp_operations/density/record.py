"""The SDK's record of a spectral density: quadratures, and the figures computed from them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hvp_operations.density import Quadrature
from hvp_operations.operation import Table
from hvp_operations.shares import bounds_with_rounding, gauss_bounds
from hvp_operations.students_t import student_t

_AT_ONCE = 1 << 21  # values of a kernel in memory: a few tens of MB
# Unit roundoff of the operands of matrix products, where it is more than the dtype's.
_EPS = {"tf32": 2.0**-11, "bfloat16": 2.0**-8}
_ROUNDING_POWER = 0.85  # as of a Krylov basis: 1e-6 in float32, 5e-14 in float64
_WIDTH = 1 / 50  # of the spectrum: the kernel's standard deviation where none is given


class Estimate(NamedTuple):
    """A mean over the probes with its standard error.

    Attributes:
        value: The mean.
        standard_error: Sample standard deviation over √K; infinite for a single probe.
    """

    value: NDArray[np.float64]
    standard_error: NDArray[np.float64]


class Count(NamedTuple):
    """An estimated number of eigenvalues, with its two sources of error and an interval for both.

    Attributes:
        value: The estimate.
        standard_error: Standard error over the probes; infinite for a single probe.
        resolution: How far the finite number of steps can have moved the value, at most.
        low: Lower end of a 95 % interval, of the operator as it was computed with.
        high: Upper end of the interval.
    """

    value: float
    standard_error: float
    resolution: float
    low: float
    high: float

    @property
    def interval(self) -> tuple[float, float]:
        """Both ends of the 95 % interval."""
        return self.low, self.high


class Distance(NamedTuple):
    """How far two spectra are apart, and what of it may be due to either estimate.

    Attributes:
        value: The distance, in units of the eigenvalues.
        standard_error: How far random probes move the value, about: it is of this size for two
            estimates of the same spectrum.
        resolution: How far the finite number of steps can have moved it, at most.
    """

    value: float
    standard_error: float
    resolution: float


@dataclass(frozen=True, kw_only=True, eq=False)
class DensityResult:
    """Spectral density of an operator of order n, as K quadratures.

    Each probe x of norm 1 sees the spectral measure Σ (x·uᵢ)² δ(λ − λᵢ); its mean over random
    probes is the density, (1/n) Σ δ(λ − λᵢ). Lanczos gives the Gauss quadrature of each probe's
    measure. Standard errors are the spread over the probes; the smearing by a finite number of
    steps comes on top where the kernel is narrower than the distance between nodes.

    Attributes:
        quadratures: One quadrature for each probe: nodes, and weights that sum to one.
        orthogonality_defect: Largest entry of |QᵀQ − I| of the Lanczos bases; 1 where memory was
            short and they were not kept orthogonal.
        num_products: Operator products spent.
        loss: L(θ), in nats.
        provenance: Origin of the figures: versions, digests, dtype, seed.
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
        """(K, m) Ritz values, ascending in each row; a probe that ended early repeats its last.

        One that rounding cannot tell from zero is zero: many matrices have a null space.
        """
        nodes = self._rows([quadrature.nodes for quadrature in self.quadratures], "edge")
        return np.where(np.abs(nodes) <= self._rounding * np.abs(nodes).max(), 0.0, nodes)

    @property
    def weights(self) -> NDArray[np.float64]:
        """(K, m) weights of `nodes`; each row sums to one, and a repeated node weighs nothing."""
        return self._rows([quadrature.weights for quadrature in self.quadratures], "constant")

    def expectation(self, values: NDArray[np.float64]) -> Estimate:
        """Mean of f(λ) over the spectrum, (1/n) Σ f(λᵢ).

        Args:
            values: f at `nodes`, (K, m), or with leading dimensions (..., K, m).

        Returns:
            The estimate, of the shape of the leading dimensions; n times it estimates tr f(A).

        Raises:
            ValueError: `values` has another shape.
        """
        if np.shape(values)[-2:] != self.nodes.shape:
            raise ValueError(f"values are {np.shape(values)}; give (..., {self.nodes.shape})")
        each = (values * self.weights).sum(-1)
        probes = each.shape[-1]
        if probes == 1:
            return Estimate(each[..., 0], np.full(each.shape[:-1], np.inf))
        return Estimate(each.mean(-1), each.std(-1, ddof=1) / math.sqrt(probes))

    def density(self, x: ArrayLike, sigma: float | None = None) -> Estimate:
        """The density, smoothed with a Gaussian kernel; it integrates to one.

        Args:
            x: Points (p,), or of any other shape, which the estimate has too.
            sigma: Standard deviation of the kernel, in units of the eigenvalues; default a fiftieth
                of the width of the spectrum.

        Returns:
            Mean and standard error (p,) of the smoothed density over the probes, per unit of the
            eigenvalues.
        """
        width = self._width(sigma)
        points, nodes = np.asarray(x, np.float64), self.nodes
        value, error = np.empty(points.size), np.empty(points.size)
        step = max(1, _AT_ONCE // nodes.size)
        for start in range(0, points.size, step):
            here = slice(start, start + step)
            distance = points.reshape(-1)[here, None, None] - nodes
            kernel = np.exp(-0.5 * (distance / width) ** 2) / (width * math.sqrt(2 * math.pi))
            value[here], error[here] = self.expectation(kernel)
        return Estimate(value.reshape(points.shape), error.reshape(points.shape))

    def moments(self, degree: int) -> Estimate:
        """(1/n) tr Aʲ for j = 0, ..., degree: exact for each probe up to twice the steps less one.

        Args:
            degree: The highest degree j, at most twice the steps less one.

        Returns:
            Mean and standard error (degree + 1,) over the probes.

        Raises:
            ValueError: The degree is negative, or beyond what the steps give.
        """
        most = 2 * self.nodes.shape[1] - 1
        if isinstance(degree, bool) or not isinstance(degree, (int, np.integer)):
            raise ValueError(f"degree is {degree!r}; a whole number of 0 to {most} is possible")
        if not 0 <= degree <= most:
            raise ValueError(f"degree is {degree}; with these steps 0 to {most} are possible")
        power, found = np.ones_like(self.nodes), []
        for _ in range(degree + 1):
            found.append(self.expectation(power))
            power = power * self.nodes
        return Estimate(
            np.array([each.value for each in found]),
            np.array([each.standard_error for each in found]),
        )

    def trace(self) -> Estimate:
        """The trace of A, with its standard error over the probes."""
        mean = self.expectation(self.nodes)
        return Estimate(*(self.num_parameters * part for part in mean))

    def count(self, low: float, high: float) -> Count:
        """How many eigenvalues lie in (low, high].

        A probe's quadrature puts what its measure has between two nodes on these nodes. The measure
        up to a point differs from the quadrature's by at most the weight of the node below it one
        way, and of the node above it the other (the inequalities of Chebyshev, Markov and
        Stieltjes; Szegő, "Orthogonal Polynomials", section 3.41). So a value of which `resolution`
        is a large part tells little: the number of negative eigenvalues, where many lie close to
        zero.

        The interval is made of the same bounds of each probe, and of rounding to the dtype: its
        ends are those of the 95 % intervals of the means of the lower bounds and of the upper ones.
        Where an end is among eigenvalues it is wide; in a gap it is that of the probes alone.

        Args:
            low: May be minus infinity.
            high: May be infinity.

        Returns:
            The estimate with both its errors, and the interval.

        Raises:
            ValueError: low is not below high.
        """
        if not low < high:
            raise ValueError(f"({low}, {high}] holds nothing; give low < high")
        inside = (self.nodes > low) & (self.nodes <= high)
        share = self.expectation(inside.astype(np.float64))
        unknown = [_unresolved(quadrature, low, high) for quadrature in self.quadratures]
        n = self.num_parameters
        ends = self._share_interval(low, high)
        return Count(
            n * float(share.value),
            n * float(share.standard_error),
            n * float(np.mean(unknown)),
            n * ends[0],
            n * ends[1],
        )

    def _share_interval(self, low: float, high: float) -> tuple[float, float]:
        """Ends of the 95 % interval of the share of eigenvalues in (low, high]."""
        size = max(max(map(abs, each.nodes)) for each in self.quadratures)
        rounding, least, most = self._rounding * size, [], []
        for each in self.quadratures:
            bounds = partial(gauss_bounds, each.nodes, each.weights)
            below, above = (
                bounds_with_rounding(bounds, end, rounding, size) for end in (low, high)
            )
            least.append(max(0.0, above[0] - below[1]))
            most.append(min(1.0, above[1] - below[0]))
        count = len(least)
        if count == 1:
            return 0.0, 1.0
        t = student_t(count - 1) / math.sqrt(count)
        return (
            max(0.0, float(np.mean(least) - t * np.std(least, ddof=1))),
            min(1.0, float(np.mean(most) + t * np.std(most, ddof=1))),
        )

    def distance(self, other: DensityResult) -> Distance:
        """The Wasserstein-1 distance of two spectra: the area between their distributions.

        For two matrices of the same order it is the mean distance of eigenvalues, (1/n) Σ |λᵢ − μᵢ|
        with both in order, and at most the norm of the matrices' difference. Of other orders,
        shares of eigenvalues take their place. Both spectra are taken as the means over their
        probes; a value of a few standard errors or less does not tell them apart.

        Args:
            other: The other spectrum.

        Returns:
            The distance with what either estimate leaves open.
        """
        points = np.unique(np.concatenate((self.nodes.ravel(), other.nodes.ravel())))
        widths = np.diff(points)
        (one, one_error, one_open), (two, two_error, two_open) = (
            each._distribution(points[:-1]) for each in (self, other)
        )
        return Distance(
            float(np.abs(one - two) @ widths),
            float(np.hypot(one_error, two_error) @ widths) if len(widths) else 0.0,
            float((one_open + two_open) @ widths),
        )

    def _distribution(self, points: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
        """Share of eigenvalues up to each point: mean, standard error, what steps leave open."""
        shares, unknown = [], []
        for nodes, weights in zip(self.nodes, self.weights, strict=True):
            below = np.searchsorted(nodes, points, side="right")
            around = np.concatenate(([0.0], weights, [0.0]))
            shares.append(np.concatenate(([0.0], np.cumsum(weights)))[below])
            unknown.append(np.maximum(around[below], around[below + 1]))
        error = np.std(shares, axis=0, ddof=1) if len(shares) > 1 else np.full(len(points), np.inf)
        return np.mean(shares, axis=0), error / math.sqrt(len(shares)), np.mean(unknown, axis=0)

    def table(self) -> Table:
        """Trace, spread and ends of the spectrum."""
        trace, square = self.trace(), self.expectation(self.nodes**2)
        negative = [part / self.num_parameters for part in self.count(-math.inf, 0)]
        rows = (
            ("trace", _pair(trace)),
            ("mean eigenvalue", _pair(self.expectation(self.nodes))),
            ("mean square", _pair(square)),
            (
                "share of eigenvalues ≤ 0",
                f"{negative[0]:.3g} ± {negative[1]:.2g}, resolved to {negative[2]:.2g}",
            ),
            ("largest Ritz value", f"{self.nodes.max():.6g}"),
            ("smallest Ritz value", f"{self.nodes.min():.6g}"),
        )
        told = (self.provenance.get(key) for key in ("operator", "dtype", "precision"))
        return Table(
            title=f"{_several(len(self.quadratures), 'probe')}, "
            f"{_several(self.nodes.shape[1], 'step')}, {self.num_products} products, "
            f"loss {self.loss:.6g} nats",
            headings=("", "estimate ± standard error"),
            rows=rows,
            notes=(
                "Standard errors are over the probes. What finitely many steps smear comes on top: "
                "of a share, as much as it says.",
                f"{''.join(f'{each}, ' for each in told if each)}orthogonality defect "
                f"{self.orthogonality_defect:.1e}",
            ),
        )

    def to_json(self) -> dict[str, Any]:
        """The record as plain numbers, strings, lists and dicts."""
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

        Where nearly all eigenvalues lie in a small part of the spectrum, a second panel shows that
        part, smoothed accordingly less.

        Args:
            path: Path of the picture; its suffix says the format, as `.png` or `.svg`.
            sigma: As for `density`, for a single panel.

        Raises:
            ValueError: The suffix names no format, or there is no suffix.
            ImportError: matplotlib is not installed.
            OSError: The file cannot be written.
        """
        if not Path(path).suffix:
            raise ValueError(f"{str(path)!r} has no suffix to say the format; end it in .png")
        from hvp_operations.density.picture import draw

        draw(self, path, sigma)

    def _width(self, sigma: float | None) -> float:
        if sigma is None:
            spread = float(self.nodes.max() - self.nodes.min())
            return _WIDTH * spread or 1.0  # of a multiple of the identity any will do
        if not 0 < sigma < math.inf:
            raise ValueError(f"sigma is {sigma}; a width above 0 is possible")
        return float(sigma)

    @property
    def _rounding(self) -> float:
        """Size that rounding gives a vanishing eigenvalue, relative to the largest one."""
        eps = _EPS.get(self.provenance.get("precision", ""))
        if eps is None:
            eps = float(np.finfo(self.provenance.get("dtype", "float64")).eps)
        return float(eps**_ROUNDING_POWER)

    @staticmethod
    def _rows(rows: Sequence[Sequence[float]], mode: Any) -> NDArray[np.float64]:
        longest = max(map(len, rows))
        return np.array(
            [np.pad(np.asarray(row, np.float64), (0, longest - len(row)), mode) for row in rows]
        )


def _several(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _pair(estimate: Estimate) -> str:
    return f"{float(estimate.value):.6g} ± {float(estimate.standard_error):.2g}"


def _unresolved(quadrature: Quadrature, low: float, high: float) -> float:
    """Bound on the error of the quadrature's measure of (low, high]."""
    nodes, weights = np.asarray(quadrature.nodes), (0.0, *quadrature.weights, 0.0)

    def around(x: float) -> tuple[float, float]:
        below = int(np.searchsorted(nodes, x, side="right"))
        return (weights[below], weights[below + 1]) if math.isfinite(x) else (0.0, 0.0)

    (low_below, low_above), (high_below, high_above) = around(low), around(high)
    return max(high_below + low_above, high_above + low_below)
