"""Bounds on the share of a spectral measure below a point, for client and ranks alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

#: Distances δ from an end of an interval at which projectors are compared, by the powers of ε / ‖A‖
#: that ε/δ is: one for an end among eigenvalues, one for an end in a gap.
_DISTANCES = (0.5, 0.8)


def gauss_bounds(
    nodes: Sequence[float], weights: Sequence[float], point: float
) -> tuple[float, float]:
    """Bounds on a measure from its Gauss rule: the inequalities of Chebyshev, Markov and Stieltjes.

    The measure up to a node is at least the weight of the nodes below it, and at most that and its
    own (Szegő, "Orthogonal Polynomials", section 3.41).

    Args:
        nodes: Nodes, ascending.
        weights: Their weights.
        point: The point; may be infinite.

    Returns:
        At most the measure of (−∞, point), and at least that of (−∞, point].
    """
    if math.isinf(point):
        return (0.0, 0.0) if point < 0 else (1.0, 1.0)
    index = sum(node <= point for node in nodes)
    return sum(weights[: max(0, index - 1)]), min(1.0, sum(weights[: index + 1]))


def bounds_with_rounding(
    bounds: Callable[[float], tuple[float, float]], point: float, rounding: float, size: float
) -> tuple[float, float]:
    """Bounds on the measure that a vector x sees of A, from such bounds of Ã = A + E.

    Of the projectors P of A up to t − δ and P̃ of Ã up to t, ‖(1 − P̃)P‖ ≤ ‖E‖/δ (Davis and Kahan;
    Bhatia, "Matrix Analysis", theorem VII.3.1), so that ‖Px‖ ≤ ‖P̃x‖ + ‖E‖/δ ‖(1 − P̃)x‖, for every
    δ.

    Args:
        bounds: As `gauss_bounds`, of Ã, by the point.
        point: The point; may be infinite.
        rounding: ‖E‖, at the most.
        size: ‖A‖.
    """
    if math.isinf(point) or rounding == 0:
        return bounds(point)
    low, high = 0.0, 1.0
    for power in _DISTANCES:
        angle = (rounding / size) ** power
        distance = rounding / angle
        low = max(low, 1 - _turned(1 - bounds(point - distance)[0], angle))
        high = min(high, _turned(bounds(point + distance)[1], angle))
    return low, high


def _turned(share: float, angle: float) -> float:
    """The most of a vector's square that lies in a subspace at this sine of one with a share."""
    share = min(1.0, max(0.0, share))
    return min(1.0, (math.sqrt(share) + angle * math.sqrt(1 - share)) ** 2)
