"""Whether eigenvalues beyond the known ones can have been missed, from one fresh random start.

Lanczos from a random vector x that nothing depends on sees every eigenvector u of an operator B of
order n with the weight c² = (u·x)², and c is small only by bad luck: P(|c| ≤ s) ≤ s √(2n/π) for x
uniform on the sphere. What the recurrence has measured bounds c² from above: if p̂₀ ... p̂ⱼ are its
orthonormal polynomials, then c² ≤ 1 / K(λ), K(t) = Σ p̂ᵢ(t)², for an eigenvalue λ of B
(Christoffel's function; Szegő, "Orthogonal Polynomials", section 3.41). Beyond the largest Ritz
value K grows, so that where K(t) ≥ 2n / (π δ²) no eigenvalue of B lies beyond t, unless something
happened that has probability δ. It need not be said in advance how long the run will be: the luck
is the start's.

B is a symmetric operator A without a subspace, B = P A P with P = I − QQᵀ, and A Q = Q T + E with E
orthogonal to Q. The number of eigenvalues of A beyond t > μ, where B has none beyond μ, is at most
that of T + EᵀE / (t − μ), by Sylvester's law of inertia for the Schur complement of B − t.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

_HUGE = 1e100
_HALVINGS = 50  # of the interval in which a bound is looked for: to rounding


@final
@dataclass
class Recurrence:
    """Coefficients of a Lanczos run from a fresh random start, as long as it gets.

    Attributes:
        dimension: n, the order of the operator.
        noise: Size of rounding errors relative to the largest coefficient. Their direction is taken
            to be random: they have a part of 1/√n along any one eigenvector.
        alphas: Diagonal of the run's tridiagonal matrix.
        betas: Couplings of each vector to the next.
    """

    dimension: int
    noise: float
    alphas: list[float] = field(default_factory=list)
    betas: list[float] = field(default_factory=list)

    def append(self, alpha: float, beta: float) -> None:
        """Note the coefficients of one step; a coupling below rounding is raised to it."""
        self.alphas.append(alpha)
        size = max(map(abs, (*self.alphas, *self.betas, beta)), default=0.0)
        self.betas.append(max(beta, self.noise * size / math.sqrt(self.dimension), 1e-300))

    def has_beyond(self, t: float) -> bool:
        """Whether a Ritz value is t or more: then a polynomial changes its sign (Sturm)."""
        return self._christoffel(t) < 0

    def mirrored(self) -> Recurrence:
        """The same run of −B."""
        return Recurrence(
            self.dimension, self.noise, [-alpha for alpha in self.alphas], list(self.betas)
        )

    def reaches(self, t: float, target: float) -> bool:
        """Whether t is beyond every Ritz value and K(t) ≥ target."""
        return self._christoffel(t) >= target

    def _christoffel(self, t: float) -> float:
        """K(t); -1 where t is not beyond every Ritz value."""
        before, now, total, coupling = 0.0, 1.0, 1.0, 0.0
        for alpha, beta in zip(self.alphas, self.betas, strict=True):
            before, now = now, ((t - alpha) * now - coupling * before) / beta
            coupling = beta
            if now <= 0:
                return -1.0
            if now > _HUGE:  # enough for any bound; the signs are those of the ratios
                before, now, total = before / now, 1.0, math.inf
            total += now * now
        return total

    def bound(self, failure: float, within: float = 0.0) -> float:
        """A bound beyond which B has no eigenvalue, but with probability `failure`.

        It is infinite where the run is too short to give one.

        Args:
            failure: The probability.
            within: A bound is looked for up to here at least; also one far above what the run has
                seen is of use, if the wanted eigenvalues are larger still.
        """
        if not self.alphas:
            return math.inf
        target = 2 * self.dimension / (math.pi * failure**2)
        low = max(self.alphas)
        high = max(within, low + 4 * max(map(abs, (*self.alphas, *self.betas))))
        if not self.reaches(high, target):
            return math.inf
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            if self.reaches(middle, target):
                high = middle
            else:
                low = middle
        return high


@final
@dataclass(frozen=True)
class Deflated:
    """The subspace that was taken out of the operator before the fresh run.

    Attributes:
        projected: T, the operator projected to the subspace, (r, r) float64.
        leaks: Rows gᵢ, (c, r) float64, with E = Σ vᵢ gᵢᵀ for unit vectors vᵢ.
    """

    projected: Tensor
    leaks: Tensor

    def mirrored(self) -> Deflated:
        """The same subspace taken out of −A."""
        return Deflated(-self.projected, self.leaks)

    def most_beyond(self, t: float, bound: float) -> int:
        """Most eigenvalues that A can have beyond t, if B has none beyond `bound` < t."""
        if not len(self.projected):
            return 0
        # The vᵢ need not be orthogonal: (Σ |gᵢ·s|)² ≤ Σ ‖gᵢ‖ · Σ (gᵢ·s)² / ‖gᵢ‖.
        norms = self.leaks.norm(dim=1).clamp_min(1e-300)
        squared = norms.sum() * self.leaks.T @ (self.leaks / norms[:, None])
        values = torch.linalg.eigvalsh(self.projected + squared / (t - bound))
        return int((values > t).sum())


@final
@dataclass(frozen=True)
class Claim:
    """A has at most `most` eigenvalues beyond `t`."""

    t: float
    most: int


def hold(claims: Sequence[Claim], deflated: Deflated, bound: float) -> bool:
    """Whether all claims hold, if B has no eigenvalue beyond `bound`.

    Args:
        claims: How many eigenvalues A has beyond some values, at most.
        deflated: The subspace that was taken out of A.
        bound: A bound on the eigenvalues of B, as `Recurrence.bound` gives it.
    """
    return all(
        bound < claim.t and deflated.most_beyond(claim.t, bound) <= claim.most
        for claim in sorted(claims, key=lambda claim: claim.t)
    )
