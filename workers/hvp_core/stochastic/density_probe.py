"""A probe of the spectral density: Lanczos from a random vector, and the quadrature it ends in."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

import torch
from hvp_operations.density import Quadrature
from torch import Tensor

from hvp_core.krylov.orthogonality import finite_dots, finite_norm, orthogonalise, rounding
from hvp_core.runs.snapshot import vectors_of_the_space
from hvp_core.stochastic.quadrature import Jacobi
from hvp_core.vectors.vector_space import Distribution, VectorSpace


@final
@dataclass
class Probe:
    """A run of the recurrence β₊ q₊ = A q − α q − β q₋ from a probe q₀ of norm 1.

    Law: if the vectors are kept, each new one is made orthogonal to all before it, twice, and
    `alphas` and `betas` are the diagonals of the operator projected to the probe's Krylov space. If
    they are not kept, orthogonality is lost once a Ritz value has converged. Copies of that value
    appear later, and its weight is divided among them: they are what exact Lanczos gives of a
    larger matrix that has a tight cluster for each eigenvalue (Greenbaum, "Behavior of slightly
    perturbed Lanczos and conjugate-gradient recurrences", Linear Algebra Appl. 113 (1989)).

    Attributes:
        rows: The vectors, (num_steps, local), where they are kept; otherwise the newest and the one
            before it, (2, local), which take turns.
        is_kept: Whether `rows` are the whole basis.
        alphas: Diagonal of the projected operator, one for each product.
        betas: Couplings of each vector to the next.
        is_done: Whether the probe has had all its steps, or its Krylov space is exhausted.
        is_exhausted: Whether it is, so that the quadrature is exact.
        defect: Largest entry met of |QᵀQ − I|, with the vectors that are kept as columns of Q.
    """

    rows: Tensor = field(metadata=vectors_of_the_space("num_rows"))
    is_kept: bool
    alphas: list[float] = field(default_factory=list)
    betas: list[float] = field(default_factory=list)
    is_done: bool = False
    is_exhausted: bool = False
    defect: float = 0.0

    @classmethod
    def begin(
        cls,
        space: VectorSpace,
        rows: Tensor,
        is_kept: bool,
        seed: int,
        law: Distribution = "rademacher",
    ) -> Probe:
        """Draw the probe.

        Args:
            space: Space of the vectors.
            rows: Memory for the vectors, shaped as the attribute `rows`.
            is_kept: Whether `rows` has room for the whole basis.
            seed: Seed of the probe.
            law: By default independent signs, each with the probability of a half.
        """
        start = space.random(seed, law)
        torch.div(start, finite_norm(space, start), out=rows[0])
        probe = cls(rows=rows, is_kept=is_kept)
        probe._measure(space)
        return probe

    @property
    def num_rows(self) -> int:
        """Number of rows that hold a vector."""
        return min(len(self.alphas) + 1, len(self.rows))

    @property
    def newest(self) -> Tensor:
        """The vector (local,) whose product comes next."""
        return self.rows[len(self.alphas) % len(self.rows)]

    def extend(self, space: VectorSpace, w: Tensor, num_steps: int) -> None:
        """Take in one more product.

        Args:
            space: Space of the vectors.
            w: The product with `newest`, (local,); read, not written to.
            num_steps: The most products that the probe will have.

        Raises:
            CurvatureError: NON_FINITE.
        """
        if len(self.alphas) + 1 == num_steps:  # what would follow is not needed
            self.alphas.append(float(finite_dots(space, self.newest.unsqueeze(0), w)[0]))
            self.is_done = True
            return
        following = self.rows[(len(self.alphas) + 1) % len(self.rows)]
        alpha = (self._from_all if self.is_kept else self._from_two)(space, w, following)
        self.alphas.append(alpha)
        beta = finite_norm(space, following)
        size = max(map(abs, self.alphas)) + 2 * max((*self.betas, beta))  # at least ‖T‖
        if beta <= rounding(torch.finfo(w.dtype).eps) * size:
            self.is_done = self.is_exhausted = True
            return
        following.div_(beta)
        self.betas.append(beta)
        self._measure(space)

    def _from_all(self, space: VectorSpace, w: Tensor, following: Tensor) -> float:
        """Make `following` from w, orthogonal to all vectors before it; α."""
        known = self.rows[: len(self.alphas) + 1]
        first, second = orthogonalise(space, known, w, out=following)
        return float(first[-1] + second[-1])

    def _from_two(self, space: VectorSpace, w: Tensor, following: Tensor) -> float:
        """Make `following` from w and the vector before the newest, whose place it takes; α.

        The terms are subtracted in the order that keeps the recurrence's own error smallest (Paige,
        "Error analysis of the Lanczos algorithm for tridiagonalizing a symmetric matrix", J. Inst.
        Maths Applics 18 (1976)).
        """
        newest = self.newest
        if self.betas:
            torch.add(w, following, alpha=-self.betas[-1], out=following)
        else:
            following.copy_(w)
        alpha = float(finite_dots(space, newest.unsqueeze(0), following)[0])
        following.add_(newest, alpha=-alpha)
        return alpha

    def _measure(self, space: VectorSpace) -> None:
        """Note how far the newest vector is from being orthonormal, if the vectors are kept."""
        if self.is_kept:
            overlaps = finite_dots(space, self.rows[: self.num_rows], self.newest)
            overlaps[-1] -= 1
            self.defect = max(self.defect, float(overlaps.abs().max()))

    @property
    def jacobi(self) -> Jacobi:
        """The coefficients as they stand."""
        return Jacobi(tuple(self.alphas), tuple(self.betas), self.is_exhausted)

    def quadrature(self, space: VectorSpace) -> Quadrature:
        """Ritz values, and the squared first components of T's eigenvectors; alike on all ranks."""
        nodes, weights = space.agree(self.jacobi.gauss)
        return Quadrature(nodes=tuple(nodes), weights=tuple(weights))
