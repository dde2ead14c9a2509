"""The state of linear systems on their way: all that a run of `solve` knows."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import cast, final

import torch
from hvp_operations.solve import Outcome, System
from torch import Tensor

from hvp_core.krylov.cg import ConjugateGradients
from hvp_core.krylov.minres import Minres
from hvp_core.krylov.orthogonality import finite_norm
from hvp_core.runs.snapshot import vectors_of_the_space
from hvp_core.vectors.vector_space import VectorSpace


@final
@dataclass
class SystemState:
    """One right-hand side b.

    Attributes:
        rows: x, and the direction of negative curvature where one was met, (1 or 2, local).
        norm: ‖b‖.
        stage: `iterating`, `verifying` the residual of x, `probing` what else is to be shown, or
            `done`.
        residual: ‖b − (A + λI) x‖ / ‖b‖ from a fresh product; infinite before the first one.
        recursion_residual: The same as the recurrence has it.
        target: Norm of the residual at which the recurrence's round ends.
        end: Why the round has ended: `solved`, `budget`, or an end of the recurrence's own; ""
            while it goes on, and before the first one.
        outcome: How the system ended; "" while it goes on.
        num_products: Products so far.
        is_exact: Whether the fresh products were exact ones.
        curvature: d·Ad / d·d of the direction.
        normal_residual: ‖(A + λI) r‖ / (‖A + λI‖ ‖r‖) of a least-squares solution.
        cg: The recurrence, of that method.
        minres: The recurrence, of that method.
    """

    rows: Tensor = field(metadata=vectors_of_the_space("num_rows"))
    norm: float
    stage: str
    residual: float
    recursion_residual: float
    target: float = 0.0
    end: str = ""
    outcome: str = ""
    num_products: int = 0
    is_exact: bool = True
    curvature: float | None = None
    normal_residual: float | None = None
    cg: ConjugateGradients | None = None
    minres: Minres | None = None

    @classmethod
    def begin(cls, space: VectorSpace, b: Tensor, x0: Tensor | None) -> SystemState:
        """A system before its first product.

        A start that is not zero has its residual taken first; where b is zero, so is x.

        Args:
            space: Space of the vectors.
            b: The right-hand side (local,).
            x0: The start (local,), copied; None for zero.

        Raises:
            CurvatureError: NON_FINITE.
        """
        norm = finite_norm(space, b)
        rows = torch.zeros_like(b).unsqueeze(0)
        if norm == 0:
            return cls(rows, norm, "done", 0.0, 0.0, outcome="CONVERGED")
        if x0 is None or finite_norm(space, x0) == 0:
            return cls(rows, norm, "iterating", 1.0, 1.0)
        rows[0].copy_(x0)
        return cls(rows, norm, "verifying", math.inf, math.inf)

    @property
    def num_rows(self) -> int:
        """Number of rows that hold a vector: all."""
        return len(self.rows)

    @property
    def x(self) -> Tensor:
        """The best x so far, (local,)."""
        return self.rows[0]

    @property
    def has_direction(self) -> bool:
        """Whether a direction of negative curvature is kept."""
        return len(self.rows) > 1

    @property
    def direction(self) -> Tensor:
        """The direction of negative curvature, (local,)."""
        return self.rows[1]

    def keep(self, direction: Tensor) -> None:
        """Keep a direction (local,) of negative curvature."""
        self.rows = torch.stack((self.x, direction))

    @property
    def recurrence(self) -> ConjugateGradients | Minres | None:
        """The recurrence; None before it begins, and when the system is done."""
        return self.cg or self.minres

    @property
    def under_way(self) -> ConjugateGradients | Minres:
        """The recurrence of a system that has one."""
        recurrence = self.recurrence
        assert recurrence is not None
        return recurrence

    @property
    def told(self) -> System:
        """How the system ended."""
        return System(
            outcome=cast("Outcome", self.outcome),
            num_products=self.num_products,
            relative_residual=self.residual,
            recursion_residual=self.recursion_residual,
            is_exact=self.is_exact,
            curvature=self.curvature,
            has_direction=self.has_direction,
            normal_residual=self.normal_residual,
        )


@final
@dataclass
class SolveState:
    """The systems of a run, in the order of their right-hand sides."""

    systems: list[SystemState]

    @property
    def num_products(self) -> int:
        """Products so far, of all systems."""
        return sum(system.num_products for system in self.systems)
