"""Conjugate gradients, a step at a time.

Hestenes and Stiefel, "Methods of conjugate gradients for solving linear systems", J. Res. Nat. Bur.
Standards 49 (1952).

For a symmetric positive definite operator A and a residual r₀, the k-th correction y minimises the
A-norm of the error over the Krylov space of dimension k. Directions p are conjugate, pᵢ·Apⱼ = 0:

    α = ρ / p·Ap,  y += α p,  r −= α Ap,  z = M⁻¹ r,  ρ₊ = r·z,  p = z + (ρ₊ / ρ) p

with a positive definite preconditioner M. Scalars are float64, vectors have the operator's dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from hvp_core.krylov.orthogonality import finite_dots, finite_norm
from hvp_core.runs.snapshot import vectors_of_the_space
from hvp_core.vectors.vector_space import VectorSpace

Inverse = Callable[[Tensor], Tensor]

#: A positive curvature below this many roundings of the largest one met is taken for none.
_FLAT = 8


@final
@dataclass
class ConjugateGradients:
    """The recurrence of one right-hand side.

    Law: in exact arithmetic r = r₀ − A y after every step, and the A-norm of the error never grows.
    The norm of r may, and without end where A is singular, so the y with the least of it is kept.

    Attributes:
        rows: y, r, p and the y with the smallest residual, (4, local).
        rho: ρ, the product r·M⁻¹r.
        residual_norm: ‖r‖.
        best_norm: The smallest ‖r‖ so far.
        scale: Largest |p·Ap| / p·p met: at most ‖A‖.
        curvature: p·Ap / p·p of the latest direction.
        end: Why the recurrence cannot go on: `negative`, A is not positive definite along p;
            `flat`, it is singular along p or the preconditioner is not positive definite; "" while
            it can.
    """

    rows: Tensor = field(metadata=vectors_of_the_space("num_rows"))
    rho: float
    residual_norm: float
    best_norm: float
    scale: float = 0.0
    curvature: float = 0.0
    end: str = ""

    @classmethod
    def begin(
        cls,
        space: VectorSpace,
        r: Tensor,
        apply_inverse: Inverse,
        scale: float = 0.0,
        rows: Tensor | None = None,
    ) -> ConjugateGradients:
        """The recurrence before its first step, with y = 0.

        Args:
            space: Space of the vectors.
            r: The residual r₀ (local,); copied.
            apply_inverse: Gives M⁻¹r; it may give r itself.
            scale: What an earlier recurrence has met of ‖A‖.
            rows: Memory of an earlier recurrence, to be used again.

        Raises:
            CurvatureError: NON_FINITE.
        """
        rows = r.new_empty(4, len(r)) if rows is None else rows
        rows[0].zero_()
        rows[3].zero_()
        rows[1].copy_(r)
        rows[2].copy_(apply_inverse(rows[1]))
        rho = float(finite_dots(space, rows[2:3], rows[1])[0])
        norm = finite_norm(space, rows[1])
        end = "flat" if rho <= 0 < norm else ""
        return cls(rows=rows, rho=rho, residual_norm=norm, best_norm=norm, scale=scale, end=end)

    @property
    def num_rows(self) -> int:
        """Number of rows that hold a vector: all."""
        return len(self.rows)

    @property
    def correction(self) -> Tensor:
        """The best y, (local,): what is to be added to the start."""
        return self.rows[3]

    @property
    def witness(self) -> Tensor:
        """p, (local,): of a recurrence that has ended, the direction that shows why."""
        return self.rows[2]

    @property
    def size(self) -> float:
        """Of ‖A‖ what has been met, whatever M is."""
        return self.scale

    def argument(self, apply_inverse: Inverse) -> Tensor:
        """The vector (local,) whose product comes next."""
        return self.rows[2]

    def take(self, space: VectorSpace, p: Tensor, product: Tensor, apply_inverse: Inverse) -> None:
        """Make a step.

        Args:
            space: Space of the vectors.
            p: What `argument` gave.
            product: A p, (local,); read only.
            apply_inverse: Gives M⁻¹r; it may give r itself.

        Raises:
            CurvatureError: NON_FINITE.
        """
        y, r, _, best = self.rows
        slope = float(finite_dots(space, p.unsqueeze(0), product)[0])
        self.curvature = slope / float(finite_dots(space, p.unsqueeze(0), p)[0])
        self.scale = max(self.scale, abs(self.curvature))
        least = _FLAT * torch.finfo(p.dtype).eps * self.scale
        if self.curvature <= least:
            self.end = "negative" if self.curvature < -least else "flat"
            return
        alpha = self.rho / slope
        y.add_(p, alpha=alpha)
        r.add_(product, alpha=-alpha)
        z = apply_inverse(r)
        rho = float(finite_dots(space, z.unsqueeze(0), r)[0])
        self.residual_norm = finite_norm(space, r)
        if self.residual_norm < self.best_norm:
            best.copy_(y)
            self.best_norm = self.residual_norm
        if rho <= 0:
            self.end = "flat" if self.residual_norm > 0 else ""
            return
        torch.add(z, p, alpha=rho / self.rho, out=p)
        self.rho = rho
