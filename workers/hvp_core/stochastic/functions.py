"""Bounds on z·f(A + λI)z from the Lanczos run of z: what steps and rounding leave open.

Steps
    The error of a Gauss rule has the sign of an even derivative of f, that of a Gauss–Radau rule
    with its node beyond an end of the spectrum the sign of an odd one and of that end (Golub and
    Meurant, "Matrices, Moments and Quadrature with Applications", Princeton (2010), chapter 6). Of
    log, √ and −1/t the even derivatives are negative and the odd ones positive: Gauss is above,
    Radau with its node below the spectrum is below. Of exp all are positive: Gauss is below, Radau
    with its node above the spectrum is above. A projector on an interval has no derivatives; its
    bounds are those of Chebyshev, Markov and Stieltjes (`quadrature.share_bounds`).

Rounding
    A run with products that are rounded, and with full orthogonalisation, is one of Ã = A + E,
    ‖E‖ ≤ ε. Then A − ε ≤ Ã ≤ A + ε as matrices, and log, √ and −1/t are operator monotone (Löwner):
    f(A) lies between f(Ã − ε) and f(Ã + ε), whose quadratures have the same nodes, moved. Where
    Ã − ε has negative eigenvalues, ‖√P − √Q‖ ≤ √‖P − Q‖ is left of √ (Bhatia, "Matrix Analysis",
    theorem X.1.1). Of exp, |x·(e^{A+E} − e^A)x| ≤ ε e^ε ‖x‖ ‖e^A x‖ to first order in E (Duhamel's
    formula, and ‖e^{sA}x‖ is logarithmically convex in s). Of an interval in
    which eigenvalues are counted, see `shares.bounds_with_rounding`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

from hvp_operations.shares import bounds_with_rounding
from hvp_operations.trace_of import TraceOfSpec

from hvp_core.errors import CurvatureError
from hvp_core.stochastic.quadrature import Jacobi, Rule, share_bounds

#: Rounding of a sum of weights.
_SUMS = 1e-14
#: Of more than this, the exponential is no float64.
_MOST_EXPONENT = 700.0


class Ends(NamedTuple):
    """Bounds on the spectrum of A; infinite where none is known."""

    low: float
    high: float


class Bracket(NamedTuple):
    """What is known of x·f(A + λI)x for a vector x of norm 1.

    Attributes:
        value: The estimate.
        low: Bound from below, of the exact operator.
        high: Bound from above.
        krylov_low: Bound from below that holds if products are not rounded.
        krylov_high: Bound from above, likewise.
    """

    value: float
    low: float
    high: float
    krylov_low: float
    krylov_high: float


def bracket(spec: TraceOfSpec, jacobi: Jacobi, ends: Ends, rounding: float) -> Bracket:
    """Bound x·f(A + λI)x.

    Args:
        spec: The function, and λ.
        jacobi: The Lanczos run of A from x.
        ends: Bounds on the spectrum of A.
        rounding: ε, the norm of the perturbation that rounded products amount to.

    Raises:
        CurvatureError: NON_FINITE: the exponential of an eigenvalue overflows.
    """
    match spec.function:
        case "exp":
            return _exp(spec.damping, jacobi, ends, rounding)
        case "count":
            return _count(spec, jacobi, rounding)
        case name:
            g, sign = _MONOTONE[name]
            return _monotone(g, sign, spec.damping, jacobi, ends, rounding)


def needs_positive(spec: TraceOfSpec) -> bool:
    """Whether the function is one of positive matrices alone."""
    return spec.function in _MONOTONE


def is_indefinite(spec: TraceOfSpec, smallest: float, rounding: float) -> bool:
    """Whether a Ritz value shows that A + λI is not as the function needs it.

    A Ritz value is a Rayleigh quotient: no eigenvalue has to have converged.

    Args:
        spec: The function, and λ.
        smallest: The smallest Ritz value of A.
        rounding: ε.
    """
    if not needs_positive(spec):
        return False
    least = smallest + spec.damping
    return least < -rounding if spec.function == "sqrt" else least <= rounding


def needs_ends(spec: TraceOfSpec, is_semidefinite: bool) -> bool:
    """Whether bounds on the spectrum have to be found, which take a run of their own.

    Args:
        spec: The function, and λ.
        is_semidefinite: Whether A is known to have no negative eigenvalue.
    """
    if spec.function in ("count", "exp"):
        return spec.function == "exp"
    is_positive = spec.damping > 0 or (spec.damping == 0 and spec.function == "sqrt")
    return not (is_semidefinite and is_positive)


# Functions of positive matrices ------------------------------------------------------------------


def _log(t: float) -> float:
    return math.log(t) if t > 0 else -math.inf


def _minus_inverse(t: float) -> float:
    return -1 / t if t > 0 else -math.inf


def _sqrt(t: float) -> float:
    return math.sqrt(t) if t > 0 else 0.0


#: An operator monotone function g, and the sign with which it is the one that is asked for.
_MONOTONE: Mapping[str, tuple[Callable[[float], float], int]] = {
    "log": (_log, 1),
    "sqrt": (_sqrt, 1),
    "inverse": (_minus_inverse, -1),
}


def _monotone(
    g: Callable[[float], float],
    sign: int,
    damping: float,
    jacobi: Jacobi,
    ends: Ends,
    rounding: float,
) -> Bracket:
    gauss, end = jacobi.gauss, ends.low - rounding  # which Ã's spectrum is above
    krylov_high, high = (_sum(g, gauss, damping + shift) for shift in (0, rounding))
    rule = gauss if jacobi.is_exhausted else None
    if rule is None and -math.inf < end < gauss.nodes[0]:
        rule = jacobi.radau(end)
    krylov_low, low, further = (
        -math.inf if rule is None else _sum(g, rule, damping + shift)
        for shift in (0, -rounding, rounding)
    )
    if g is _sqrt:
        is_known = ends.low + damping >= 0 or jacobi.is_exhausted
        if end + damping < rounding:  # Ã + λ − ε may have negative eigenvalues
            low = further - math.sqrt(2 * rounding)
        low, krylov_low = (max(0.0, each) if is_known else -math.inf for each in (low, krylov_low))
    if sign < 0:
        low, high, krylov_low, krylov_high = -high, -low, -krylov_high, -krylov_low
    middle = (krylov_low + krylov_high) / 2
    value = middle if math.isfinite(middle) else sign * _sum(g, gauss, damping)
    krylov = sorted((krylov_low, krylov_high))  # where they meet, to the rounding of sums
    return Bracket(value, low, high, krylov[0], krylov[1])


def _sum(g: Callable[[float], float], rule: Rule, shift: float) -> float:
    """The quadrature of g(t + shift)."""
    values = [g(node + shift) for node in rule.nodes]
    if any(math.isinf(value) for value in values):
        return -math.inf
    return math.fsum(weight * value for value, weight in zip(values, rule.weights, strict=True))


# The exponential, and projectors -----------------------------------------------------------------


def _exp(damping: float, jacobi: Jacobi, ends: Ends, rounding: float) -> Bracket:
    gauss, end = jacobi.gauss, ends.high + rounding
    top = gauss.nodes[-1] + damping
    if top > _MOST_EXPONENT:
        raise CurvatureError(
            "NON_FINITE",
            f"the exponential of an eigenvalue of {top:.4g} overflows; give a damping below 0, as "
            f"{-top:.4g}: exp(A + λI) is exp(λ) exp(A)",
        )
    krylov_low = _sum(math.exp, gauss, damping)
    rule = gauss if jacobi.is_exhausted else None
    if rule is None and gauss.nodes[-1] < end < math.inf:
        rule = jacobi.radau(end)
    if rule is None or rule.nodes[-1] + damping > _MOST_EXPONENT:
        return Bracket(krylov_low, 0.0, math.inf, krylov_low, math.inf)
    krylov_low, krylov_high = sorted((krylov_low, _sum(math.exp, rule, damping)))
    # ‖e^A x‖ has the square's quadrature, with the same bound; the largest goes before the sum.
    top = rule.nodes[-1]
    norm = math.exp(top + damping) * math.sqrt(_sum(lambda t: math.exp(2 * t), rule, -top))
    moved = rounding * math.exp(min(rounding, _MOST_EXPONENT)) * norm
    value = (krylov_low + krylov_high) / 2
    return Bracket(
        value, max(0.0, krylov_low - moved), krylov_high + moved, krylov_low, krylov_high
    )


def _count(spec: TraceOfSpec, jacobi: Jacobi, rounding: float) -> Bracket:
    low = -math.inf if spec.low is None else spec.low - spec.damping
    high = math.inf if spec.high is None else spec.high - spec.damping
    krylov = _share(jacobi, low, high, 0.0)
    return Bracket(sum(krylov) / 2, *_share(jacobi, low, high, rounding), *krylov)


def _share(jacobi: Jacobi, low: float, high: float, rounding: float) -> tuple[float, float]:
    """Bounds on the measure of (low, high] of the exact operator."""
    below, above = (
        bounds_with_rounding(partial(share_bounds, jacobi), end, rounding, jacobi.size)
        for end in (low, high)
    )
    least, most = above[0] - below[1], above[1] - below[0]
    return max(0.0, least - _SUMS), min(1.0, max(0.0, most + _SUMS))
