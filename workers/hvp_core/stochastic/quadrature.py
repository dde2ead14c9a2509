"""Quadrature rules of the measure that a vector sees, from the coefficients of its Lanczos run.

A vector x of norm 1 sees the measure μ = Σ (x·uᵢ)² δ(λ − λᵢ) of a symmetric operator. m steps of
Lanczos give its Gauss rule, exact to degree 2m − 1; the coupling to the next vector gives, for
every point, the rule with m + 1 nodes of which that point is one (Gauss–Radau), exact to degree 2m
(Golub and Meurant, "Matrices, Moments and Quadrature with Applications", Princeton (2010), chapter
6).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, final

import numpy as np
from hvp_operations.shares import gauss_bounds
from numpy.typing import NDArray

#: A prescribed node that is nearly one of the Gauss rule's sends another node far away, where it
#: spoils the weights of all: so far at most, in units of the operator's size.
_FARTHEST = 1e4
#: A point is taken to be no farther outside than this, in the same units: beyond is beyond.
_OUTSIDE = 100.0


Decomposed = tuple[NDArray[np.float64], NDArray[np.float64]]


class Rule(NamedTuple):
    """A quadrature rule of a measure of mass one.

    Attributes:
        nodes: Nodes, ascending.
        weights: Their weights, which are not negative and sum to one.
    """

    nodes: tuple[float, ...]
    weights: tuple[float, ...]


def _decomposed(diagonal: Sequence[float], couplings: Sequence[float]) -> Decomposed:
    """Eigenvalues and eigenvectors of the symmetric tridiagonal matrix with these neighbours."""
    matrix = np.diag(np.asarray(diagonal, np.float64))
    at = np.arange(len(couplings))
    matrix[at + 1, at] = couplings  # the lower half is all that is read
    values, vectors = np.linalg.eigh(matrix)
    return values, vectors


def _rule(found: Decomposed) -> Rule:
    values, vectors = found
    return Rule(tuple(values.tolist()), tuple((vectors[0] ** 2).tolist()))


@final
@dataclass(frozen=True)
class Jacobi:
    """The coefficients of a Lanczos run, as the Jacobi matrix of the measure that its start sees.

    Attributes:
        alphas: The diagonal, one for each product.
        betas: Couplings of each vector to the next, of which the last may be missing.
        is_exhausted: Whether that one vanishes: the Gauss rule is the measure itself, to rounding.
    """

    alphas: Sequence[float]
    betas: Sequence[float]
    is_exhausted: bool

    @property
    def size(self) -> float:
        """At least the norm of the matrix."""
        return max(map(abs, self.alphas)) + 2 * max(self.betas, default=0.0)

    @cached_property
    def _projected(self) -> Decomposed:
        return _decomposed(self.alphas, self.betas[: len(self.alphas) - 1])

    @cached_property
    def gauss(self) -> Rule:
        """The Gauss rule: the Ritz values, and the squared first components of T's eigenvectors."""
        return _rule(self._projected)

    def radau(self, node: float) -> Rule | None:
        """The rule with one node more, and this one among them.

        Args:
            node: The node.

        Returns:
            The rule; that of Gauss where it is the measure itself. None where `node` is so near to
            a node of that rule that rounding would spoil the weights, or the coupling is missing.
        """
        if self.is_exhausted:
            return self.gauss
        if len(self.betas) < len(self.alphas):
            return None
        values, vectors = self._projected
        distances = values - node
        if not distances.all():
            return None
        last = node + float(self.betas[-1] ** 2 * (vectors[-1] ** 2 / distances).sum())
        if not abs(last) <= _FARTHEST * self.size:
            return None
        return _rule(_decomposed([*self.alphas, last], self.betas))


def share_bounds(jacobi: Jacobi, point: float) -> tuple[float, float]:
    """Bounds on the measure below a point, and up to and with it.

    They are those of `gauss_bounds`, and the same inequalities of the rule that has the point for a
    node, which are the best that these coefficients give.

    Args:
        jacobi: The run.
        point: The point; may be infinite.

    Returns:
        At most the measure of (−∞, point), and at least that of (−∞, point].
    """
    nodes, weights = jacobi.gauss
    if jacobi.is_exhausted:
        below = sum(w for node, w in zip(nodes, weights, strict=True) if node < point)
        up_to = sum(w for node, w in zip(nodes, weights, strict=True) if node <= point)
        return below, up_to
    if math.isfinite(point):
        farthest = _OUTSIDE * jacobi.size
        point = min(max(point, -farthest), farthest)
    low, high = gauss_bounds(nodes, weights, point)
    radau = jacobi.radau(point) if math.isfinite(point) else None
    if radau is not None:
        index = min(range(len(radau.nodes)), key=lambda at: abs(radau.nodes[at] - point))
        low = max(low, sum(radau.weights[:index]))
        high = min(high, sum(radau.weights[: index + 1]))
    return low, high
