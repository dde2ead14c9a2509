"""The mean gradient's part of an empirical Fisher matrix, which a covariance does not have."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import final

from torch import Tensor

from hvp_core.autodiff.product_spec import Unit
from hvp_core.losses.loss import Loss
from hvp_core.vectors.space import ParameterSpace


@final
class MeanGradient:
    """Takes (W/U) ∇L ∇Lᵀ off products and forms with F, for U units (see `product_spec.py`).

    Args:
        space: Space of the vectors.
        gradient: Computes ∇L, this rank's shard. It is called once, and its result kept.
        loss: The loss, which counts targets.
        targets: The targets of the whole batch, a row for each sequence.
    """

    def __init__(
        self, space: ParameterSpace, gradient: Callable[[], Tensor], loss: Loss, targets: Tensor
    ):
        self._space, self._compute = space, gradient
        self._loss, self._targets = loss, targets
        self._gradient: Tensor | None = None

    @cached_property
    def _ratio(self) -> Mapping[Unit, float]:
        """W/U, by the name of the unit. Units of the first kind are the targets themselves."""
        rows = sum(self._loss.weight(row) > 0 for row in self._targets.split(1))
        return {"token": 1.0, "sequence": self._loss.weight(self._targets) / rows}

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
