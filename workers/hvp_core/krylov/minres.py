"""MINRES, a step at a time (Paige and Saunders, SIAM J. Numer. Anal. 12 (1975)).

For a symmetric operator A, definite or not, and a residual r₀, the k-th correction y minimises the
norm of the residual over the Krylov space of dimension k. Lanczos with a preconditioner M builds
vectors vᵢ with A V = M V T, where T is tridiagonal. Givens rotations bring T to an upper triangle R
of three diagonals, γ and above it δ and ε, as its columns come. So y is a sum over the columns w of
V R⁻¹, each of which follows from the two before it, and φ, the last entry of the rotated right-hand
side, is the norm of the residual. Seven vectors suffice, with x and the product.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from hvp_core.krylov.cg import Inverse
from hvp_core.krylov.orthogonality import finite_dots, finite_norm, rounding
from hvp_core.runs.snapshot import vectors_of_the_space
from hvp_core.vectors.vector_space import VectorSpace

#: eps to this power is the size of ‖A r‖ / (‖A‖ ‖r‖) from which r is taken for a vector of A's null
#: space: 1.5e-8 in float64, 3e-4 in float32. Where b is not in the range of A, the recurrence comes
#: no further than this: its own rounding grows as y does.
_NULL_POWER = 0.5


@final
@dataclass
class Minres:
    """The recurrence of one right-hand side.

    Law: in exact arithmetic `residual_norm` is ‖r₀ − A y‖ after every step, in the norm of M⁻¹ and
    times the ratio of both norms at the beginning; it never grows.

    Attributes:
        rows: y, the two latest Lanczos vectors M v in turn, and the two latest w in turn, (5,
            local).
        noise: Relative error of a product, where it is more than rounding.
        ratio: Norm of r₀ over its norm in M⁻¹.
        phi: Norm of the residual in M⁻¹, with a sign.
        num_steps: Steps so far.
        beta: Coupling of the latest Lanczos vector to the one before.
        rotations: Cosine and sine of the latest rotation, and of the one before.
        scale: Largest norm of a column of T met: at most ‖A‖, or ‖M^(-1/2) A M^(-1/2)‖.
        size: Largest ‖Av‖ / ‖v‖ met: at most ‖A‖, whatever M is.
        end: Why the recurrence cannot go on: `solved`, the Krylov space is exhausted and holds the
            solution; `least_squares`, A r vanishes though r does not; `flat`, the preconditioner
            is not positive definite; "" while it can.
    """

    rows: Tensor = field(metadata=vectors_of_the_space("num_rows"))
    noise: float
    ratio: float
    phi: float
    num_steps: int = 0
    beta: float = 0.0
    rotations: tuple[float, ...] = (1.0, 0.0, 1.0, 0.0)
    scale: float = 0.0
    size: float = 0.0
    end: str = ""

    @classmethod
    def begin(
        cls,
        space: VectorSpace,
        r: Tensor,
        apply_inverse: Inverse,
        noise: float = 0.0,
        scale: float = 0.0,
        rows: Tensor | None = None,
    ) -> Minres:
        """The recurrence before its first step, with y = 0.

        Args:
            space: Space of the vectors.
            r: The residual r₀ (local,); copied.
            apply_inverse: Gives M⁻¹r; it may give r itself.
            noise: Relative error of a product, where it is more than rounding.
            scale: What an earlier recurrence has met of ‖A‖.
            rows: Memory of an earlier recurrence, to be used again.

        Raises:
            CurvatureError: NON_FINITE.
        """
        rows = r.new_empty(5, len(r)) if rows is None else rows
        rows[1].copy_(r)
        for row in (0, 2, 3, 4):
            rows[row].zero_()
        squared = float(finite_dots(space, apply_inverse(rows[1]).unsqueeze(0), rows[1])[0])
        norm = finite_norm(space, rows[1])
        if squared <= 0:
            end = "flat" if norm > 0 else "solved"
            return cls(rows=rows, noise=noise, ratio=1.0, phi=norm, scale=scale, end=end)
        phi = math.sqrt(squared)
        rows[1].div_(phi)
        return cls(rows=rows, noise=noise, ratio=norm / phi, phi=phi, scale=scale)

    @property
    def num_rows(self) -> int:
        """Number of rows that hold a vector: all."""
        return len(self.rows)

    @property
    def correction(self) -> Tensor:
        """y, (local,): what is to be added to the start."""
        return self.rows[0]

    @property
    def witness(self) -> Tensor:
        """Memory (local,) of a recurrence that has ended, for the residual that shows why."""
        return self.rows[1]

    @property
    def residual_norm(self) -> float:
        """The norm of the residual, as the recurrence has it."""
        return self.ratio * abs(self.phi)

    @property
    def best_norm(self) -> float:
        """The norm of the residual that `correction` leaves, as the recurrence has it."""
        return self.residual_norm

    def argument(self, apply_inverse: Inverse) -> Tensor:
        """The vector (local,) whose product comes next: v, of norm 1 in M."""
        return apply_inverse(self.rows[1 + self.num_steps % 2])

    def take(self, space: VectorSpace, v: Tensor, product: Tensor, apply_inverse: Inverse) -> None:
        """Make a step.

        Args:
            space: Space of the vectors.
            v: What `argument` gave.
            product: A v, (local,); read only.
            apply_inverse: Gives M⁻¹r; it may give r itself.

        Raises:
            CurvatureError: NON_FINITE.
        """
        parity, eps = self.num_steps % 2, torch.finfo(v.dtype).eps
        latest, following = self.rows[1 + parity], self.rows[2 - parity]
        torch.add(product, following, alpha=-self.beta, out=following)
        alpha = float(finite_dots(space, v.unsqueeze(0), following)[0])
        following.add_(latest, alpha=-alpha)
        squared = float(finite_dots(space, apply_inverse(following).unsqueeze(0), following)[0])
        if squared < 0:
            self.end = "flat"
            return
        beta = math.sqrt(squared)
        self.scale = max(self.scale, math.hypot(self.beta, alpha, beta))
        if v.data_ptr() == latest.data_ptr():  # M is I
            self.size = self.scale
        else:
            self.size = max(self.size, finite_norm(space, product) / finite_norm(space, v))

        # The new column of T through the two rotations before it, and its own.
        cosine, sine, older_cosine, older_sine = self.rotations
        epsilon, delta_bar = older_sine * self.beta, older_cosine * self.beta
        delta = cosine * delta_bar + sine * alpha
        gamma_bar = cosine * alpha - sine * delta_bar
        # ‖A r‖ / ‖r‖ of the residual before this step.
        of_residual = math.hypot(gamma_bar, cosine * beta)
        if of_residual <= max(eps**_NULL_POWER, self.noise) * self.scale:
            self.end = "least_squares"
            return
        gamma = math.hypot(gamma_bar, beta)
        cosine, sine = gamma_bar / gamma, beta / gamma
        w, before = self.rows[3 + parity], self.rows[4 - parity]
        torch.add(v, before, alpha=-epsilon, out=before).add_(w, alpha=-delta).div_(gamma)
        self.rows[0].add_(before, alpha=cosine * self.phi)
        self.phi *= -sine

        self.rotations = (cosine, sine, *self.rotations[:2])
        self.num_steps += 1
        self.beta = beta
        if beta <= rounding(eps) * self.scale:
            self.end = "solved"
        else:
            following.div_(beta)
