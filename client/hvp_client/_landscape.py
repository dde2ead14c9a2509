"""The loss along directions: what was measured, and what slope and curvature predict."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from hvp_client._exceptions import InvalidArgumentError

_COLOUR, _GREY = "#1c5fd4", "#666666"
_SAME = 1e-9  # relative difference of steps that are meant to be one, as linspace rounds them
_FINE = 200  # points of a curve that is known everywhere


def checked_grid(grid: Any, num_directions: int) -> tuple[NDArray[np.float64], ...]:
    """The steps along each direction.

    Args:
        grid: Numbers (m,) for one direction; for two a pair of such arrays.
        num_directions: Number of directions, 1 or 2.

    Raises:
        InvalidArgumentError: `POINTS_INVALID`: anything else.
    """
    axes = (grid,) if num_directions == 1 else tuple(grid)
    steps = tuple(np.asarray(axis, dtype=np.float64) for axis in axes)
    fine = all(each.ndim == 1 and len(each) and np.isfinite(each).all() for each in steps)
    if num_directions not in (1, 2) or len(steps) != num_directions or not fine:
        raise InvalidArgumentError(
            "the grid of one direction is a sequence of finite numbers, that of two a pair of such "
            "sequences; more than two directions make no picture",
            reason="POINTS_INVALID",
            field="grid",
        )
    return steps


@final
@dataclass(frozen=True)
class LossAlong:
    """The loss at θ + Σ aᵢ dᵢ on a grid of one or two directions, beside its expansion at θ.

    Attributes:
        kind: The matrix A that predicts the curvature, as `hessian`.
        steps: For each direction the coefficients aᵢ.
        losses: The losses, (m₁,) or (m₁, m₂), in nats; infinite or NaN where the function is.
        loss: L(θ).
        slopes: ∇L·dᵢ, (K,).
        curvatures: dᵢ·A dⱼ, (K, K).
    """

    kind: str
    steps: tuple[NDArray[np.float64], ...]
    losses: NDArray[np.float64]
    loss: float
    slopes: NDArray[np.float64]
    curvatures: NDArray[np.float64]

    @cached_property
    def predicted(self) -> NDArray[np.float64]:
        """L(θ) + Σ aᵢ ∇L·dᵢ + ½ Σ aᵢ aⱼ dᵢ·A dⱼ, in the shape of `losses`."""
        return self._expansion(self.steps)

    def _expansion(self, steps: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
        a = np.stack(np.meshgrid(*steps, indexing="ij"), axis=-1)
        quadratic = np.einsum("...i,ij,...j->...", a, self.curvatures, a)
        return np.asarray(self.loss + a @ self.slopes + 0.5 * quadratic)

    def measured_curvature(self, direction: int = 0) -> float:
        """The second derivative of the measured losses along a direction, at θ.

        It is (L(h) − 2 L(0) + L(−h)) / h² with the smallest step h for which the grid has both h
        and −h; where it has 2h and −2h too, their difference removes the error of order h².

        Args:
            direction: Index of the direction; the others are at step 0.

        Raises:
            InvalidArgumentError: `POINTS_INVALID`: the grid has no such steps.
        """
        line = self._through_zero(direction)
        found = {h: _nearest(line, -h) for h in sorted(line) if h > 0}
        back = {h: opposite for h, opposite in found.items() if opposite is not None}
        if not back:
            raise InvalidArgumentError(
                "the grid has no steps h and -h through zero; take one that is symmetric, such as "
                "numpy.linspace(-1, 1, 21)",
                reason="POINTS_INVALID",
                field="grid",
            )

        def second(h: float) -> float:
            return (line[h] - 2 * self.loss + line[back[h]]) / h**2

        h = next(iter(back))
        double = _nearest(back, 2 * h)
        return second(h) if double is None else (4 * second(h) - second(double)) / 3

    def _through_zero(self, direction: int) -> dict[float, float]:
        values = self.losses
        if len(self.steps) == 2:
            other = self.steps[1 - direction]
            place = np.flatnonzero(np.abs(other) <= _SAME * np.abs(other).max())
            if not len(place):
                return {}
            values = np.take(values, place[0], axis=1 - direction)
        return dict(zip(self.steps[direction].tolist(), values.tolist(), strict=True))

    def plot(self, path: str | Path) -> None:
        """Draw the losses and their prediction into a file; its suffix says the format.

        One direction gives two curves, two directions two maps of contours with the same levels.
        """
        from matplotlib.figure import Figure

        if len(self.steps) == 1:
            figure = Figure(figsize=(6.4, 4.2), layout="constrained")
            axes = figure.subplots()
            (a,) = self.steps
            fine = np.linspace(a.min(), a.max(), _FINE)
            curve = self._expansion([fine])
            axes.plot(fine, curve, color=_GREY, linestyle="--", label="slope and curvature at θ")
            axes.plot(a, self.losses, color=_COLOUR, marker=".", label="measured")
            axes.set(xlabel="step along the direction", ylabel="loss, nats")
            low, high = _range(self.losses)
            axes.set_ylim(low - 0.08 * (high - low), high + 0.08 * (high - low))
            axes.legend(frameon=False)
            axes.spines[["top", "right"]].set_visible(False)
        else:
            figure = Figure(figsize=(9.6, 4.2), layout="constrained")
            pair = figure.subplots(1, 2, sharex=True, sharey=True)
            levels = np.linspace(*_range(self.losses), 16)
            lines = [np.linspace(each.min(), each.max(), _FINE) for each in self.steps]
            maps: dict[str, tuple[Sequence[NDArray[np.float64]], NDArray[np.float64]]] = {
                "measured": (self.steps, self.losses),
                "slope and curvature at θ": (lines, self._expansion(lines)),
            }
            for axes, (title, (at, values)) in zip(pair, maps.items(), strict=True):
                drawn = axes.contourf(*at, values.T, levels=levels, extend="both")
                axes.plot(0, 0, "+", color="white")
                axes.set(title=title, xlabel="step along the first direction")
            pair[0].set_ylabel("step along the second")
            figure.colorbar(drawn, ax=pair, label="loss, nats")
        figure.savefig(path, dpi=150)

    def __repr__(self) -> str:
        points = " x ".join(str(len(each)) for each in self.steps)
        low, high = _range(self.losses)
        return f"<LossAlong {points} points, {low:.6g} to {high:.6g} nats, L(θ) = {self.loss:.6g}>"


def _nearest(line: Iterable[float], step: float) -> float | None:
    """The step of a line that is this one to rounding; None where there is none."""
    return next((each for each in line if abs(each - step) <= _SAME * abs(step)), None)


def _range(losses: NDArray[np.float64]) -> tuple[float, float]:
    finite = losses[np.isfinite(losses)]
    if not len(finite):
        return 0.0, 1.0
    low, high = float(finite.min()), float(finite.max())
    return (low, high) if high > low else (low, low + max(abs(low), 1.0) * 1e-6)


def points_of(steps: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """All points of a grid, (points, K), the last direction's step changing fastest."""
    return np.stack([each.ravel() for each in np.meshgrid(*steps, indexing="ij")], axis=1)
