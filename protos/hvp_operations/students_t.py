"""Quantiles of Student's t, for 95 % intervals."""

from __future__ import annotations

import functools
import math

#: Of so many degrees of freedom and more, Student's t is taken at this many: 1.962, not 1.960.
_MOST_DEGREES = 1000


@functools.cache
def student_t(degrees: int) -> float:
    """The number t that a Student's variable keeps within ± t of zero with a probability of 95 %.

    The probability is a finite sum for whole degrees (Abramowitz and Stegun, "Handbook of
    Mathematical Functions", 26.7.3 and 26.7.4), and grows with t: bisection finds it.

    Args:
        degrees: Degrees of freedom, at least 1; samples less one.
    """
    degrees = min(degrees, _MOST_DEGREES)
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, degrees) < 0.95 else (low, middle)
    return math.sqrt(degrees) * math.tan(high)


def _within(angle: float, degrees: int) -> float:
    """P(|t| ≤ √degrees · tan(angle))."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term = cosine if odd else 1.0
    total = term if degrees > 1 else 0.0
    for power in range(3 if odd else 2, degrees - 1, 2):
        term *= cosine * cosine * (power - 1) / power
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
