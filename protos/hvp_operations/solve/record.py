"""The SDK's record of linear systems: the solutions, and what is certified of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from hvp_operations.operation import Table
from hvp_operations.solve import System

VectorT = TypeVar("VectorT")

_TOLD = {
    "MAX_PRODUCTS": "The budget of products ran out; x is the best so far: give more, or go on "
    "with x0=result.x.",
    "NEGATIVE_CURVATURE": "The matrix is not positive definite: along the direction that was kept "
    "its curvature is negative. Use method='minres', or a damping above its magnitude.",
    "LEAST_SQUARES": "b is not in the range of the matrix: x makes the residual as small as it "
    "can be.",
    "NOISE_LIMIT": "The products are too coarse for the tolerance, and more of them would not "
    "help: use a wider precision, float64, or more damping.",
    "BREAKDOWN": "The matrix is singular along the next direction: use method='minres', or more "
    "damping.",
    "UNVERIFIED": "Nothing is claimed of the exact operator: there was no memory for a product in "
    "float64. Use more workers.",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class SolveResult(Generic[VectorT]):
    """Solutions x of (A + λI) x = b, one for each right-hand side.

    Attributes:
        systems: How each right-hand side ended: `outcome`, `num_products`, `relative_residual`
            (the true one), `recursion_residual`, `is_exact`, `curvature`, `normal_residual`.
        x: The solutions, vectors on the server in the order of the right-hand sides. They belong to
            the job and stay when their handles go. Whatever the outcome, it is the best x that was
            found.
        directions: Directions of negative curvature, of norm 1: see `direction`.
        num_products: Operator products spent in all.
        loss: L(θ), in nats.
        provenance: Origin of the figures: versions, digests, dtype, the method.
    """

    systems: tuple[System, ...]
    x: list[VectorT]
    directions: list[VectorT]
    num_products: int
    loss: float
    provenance: Mapping[str, str]

    @property
    def converged(self) -> bool:
        """Whether the true residual of every right-hand side meets the tolerance."""
        return all(each.outcome == "CONVERGED" for each in self.systems)

    @property
    def outcomes(self) -> tuple[str, ...]:
        """How each right-hand side ended."""
        return tuple(each.outcome for each in self.systems)

    @property
    def relative_residuals(self) -> NDArray[np.float64]:
        """(k,) float64, ‖b − (A + λI) x‖ / ‖b‖ of each right-hand side, from a fresh product."""
        return np.array([each.relative_residual for each in self.systems], np.float64)

    def direction(self, index: int = 0) -> VectorT | None:
        """The direction of negative curvature that a right-hand side met.

        Args:
            index: Number of the right-hand side.

        Returns:
            The vector, of norm 1; None where there was none.
        """
        if not self.systems[index].has_direction:
            return None
        return self.directions[sum(each.has_direction for each in self.systems[:index])]

    @property
    def claims(self) -> tuple[str, ...]:
        """Sentences for people that say what the outcomes mean and what to do."""
        told = [_TOLD[name] for name in dict.fromkeys(self.outcomes) if name in _TOLD]
        if not all(each.is_exact for each in self.systems) and "UNVERIFIED" not in self.outcomes:
            told.append(
                "The residuals are of the run's own products: there was no memory for exact."
            )
        return tuple(told)

    def table(self) -> Table:
        """A row for each right-hand side."""
        told = (
            self.provenance.get(key)
            for key in ("operator", "dtype", "precision", "method", "preconditioner")
        )
        names = [getattr(vector, "name", "") for vector in (*self.x, *self.directions)]
        return Table(
            title=f"{self.num_products} products, loss {self.loss:.6g} nats",
            headings=("#", "outcome", "products", "true residual", "recursion", "curvature"),
            rows=tuple(
                (
                    str(index),
                    each.outcome,
                    str(each.num_products),
                    f"{each.relative_residual:.2e}",
                    f"{each.recursion_residual:.2e}",
                    "" if each.curvature is None else f"{each.curvature:.4g}",
                )
                for index, each in enumerate(self.systems)
            ),
            notes=(
                *self.claims,
                ", ".join(each for each in told if each),
                f"vectors: {', '.join(names)}",
            ),
        )

    def to_json(self) -> dict[str, Any]:
        """The record as plain numbers, strings, lists and dicts; vectors by name."""
        return {
            "systems": [asdict(each) for each in self.systems],
            "x": [getattr(vector, "name", "") for vector in self.x],
            "directions": [getattr(vector, "name", "") for vector in self.directions],
            "num_products": self.num_products,
            "loss": self.loss,
            "provenance": dict(self.provenance),
        }
