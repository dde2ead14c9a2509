"""The mean gradient's part of an empirical Fisher matrix, which a covariance does not have."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import final

from torch import Tensor

from hvp_core.autodiff.product_spec import Unit
from hvp_core.vectors.space import ParameterSpace


@final
class MeanGradient:
    """Takes (W/U) ∇L ∇Lᵀ off products and forms with F, for U units (see `product_spec.py`).

    Args:
        space: Space of the vectors.
        gradient: Computes ∇L, this rank's shard. It is called once, and its result kept.
        num_targets: W.
        num_units: U, by the name of the unit.
    """

    def __init__(
        self,
        space: ParameterSpace,
        gradient: Callable[[], Tensor],
        num_targets: float,
        num_units: Mapping[Unit, float],
    ):
        self._space, self._compute = space, gradient
        self._ratio = {unit: num_targets / count for unit, count in num_units.items()}
        self._gradient: Tensor | None = None

    def drop(self) -> None:
        """Forget the gradient: θ is another."""
        self._gradient = None

    def take_off(self, unit: Unit, vectors: Sequence[Tensor], products: Sequence[Tensor]) -> None:
        """Make Cv of Fv, in place. Cost: an inner product each, and the gradient at the first call.

        Args:
            unit: The unit of F.
            vectors: The vectors v, this rank's shards.
            products: The products Fv.
        """
        gradient = self._get()
        for vector, product in zip(vectors, products, strict=True):
            slope = self._space.dot(gradient, vector)
            product.add_(gradient.to(product.dtype), alpha=-self._ratio[unit] * slope)

    def taken_off(
        self, unit: Unit, vectors: Sequence[Tensor], forms: Sequence[float]
    ) -> list[float]:
        """v·Cv of v·Fv, for each vector."""
        gradient = self._get()
        slopes = [self._space.dot(gradient, vector) for vector in vectors]
        ratio = self._ratio[unit]
        return [form - ratio * s**2 for form, s in zip(forms, slopes, strict=True)]

    def _get(self) -> Tensor:
        if self._gradient is None:
            self._gradient = self._compute()
        return self._gradient
