"""Losses by their outputs: value, gradient and its tangent, in closed form.

A loss is Σ w ℓ(z, target); the walk divides by the whole batch's Σ w. Written out by hand because
the chain ends here: what the blocks need is only the pair (G, Ġ), G = ∂(Σ w ℓ)/∂z and
Ġ = ∂²(Σ w ℓ)/∂z² ż, and the automatic rules for log-softmax cannot be differentiated a third time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import torch

IGNORED = -100  # a label of weight zero


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """16 bits in float32: a loss, or what a block hands on, is not rounded to them."""
    return x.float() if x.dtype.itemsize < 4 else x


class Loss(ABC):
    """Sum over targets of a function of the model's output.

    Law: with H_out = ∂²/∂z², `dual(z, ż)` returns (value(z), G(z), H_out ż). Losses that are equal
    are one function: programs are kept by the loss that they were traced with, so that a loss with
    settings is a frozen dataclass of them, or equal to itself alone.
    """

    @abstractmethod
    def weight(self, target: torch.Tensor) -> int:
        """Σ w: how many targets count."""

    @abstractmethod
    def value(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Σ w ℓ as a float64 scalar."""

    @abstractmethod
    def gradient(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """G, shaped as the output."""

    @abstractmethod
    def curve(
        self, output: torch.Tensor, tangent: torch.Tensor, target: torch.Tensor
    ) -> torch.Tensor:
        """Ġ = H_out ż, shaped as the output."""

    @abstractmethod
    def by_target(self, values: torch.Tensor) -> torch.Tensor:
        """Sums of a tensor like the output over what belongs to each single target.

        Returns:
            What it sums over is of size one: the sums broadcast against the output.
        """


@final
@dataclass(frozen=True)
class CrossEntropy(Loss):
    """ℓ = log Σ e^z − z_y for integer targets (...,) and logits (..., C); −100 counts nothing.

    G = w(p − e_y) and Ġ = w p∘(ż − p·ż).
    """

    def weight(self, target: torch.Tensor) -> int:
        """Number of labels that are not −100."""
        return int((target != IGNORED).sum())

    def value(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Σ over the labels that count."""
        counted = target != IGNORED
        index = target.where(counted, 0).unsqueeze(-1)
        each = output.logsumexp(-1) - output.gather(-1, index).squeeze(-1)
        return each.where(counted, 0).sum(dtype=torch.float64)

    def gradient(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """w(p − e_y)."""
        counted = (target != IGNORED).unsqueeze(-1)
        index = target.unsqueeze(-1).where(counted, 0)
        result = output.softmax(-1)
        result.scatter_add_(-1, index, result.new_full((), -1.0).expand(index.shape))
        return result.mul_(counted)

    def curve(
        self, output: torch.Tensor, tangent: torch.Tensor, target: torch.Tensor
    ) -> torch.Tensor:
        """W p∘(ż − p·ż)."""
        probability = output.softmax(-1)
        mean = (probability * tangent).sum(-1, keepdim=True)
        return probability.mul_(tangent - mean).mul_((target != IGNORED).unsqueeze(-1))

    def by_target(self, values: torch.Tensor) -> torch.Tensor:
        """Over the classes."""
        return values.sum(-1, keepdim=True)


@final
@dataclass(frozen=True)
class SquaredError(Loss):
    """ℓ = ½‖z − t‖² per row; outputs and targets (rows, ...), every row counts once."""

    def weight(self, target: torch.Tensor) -> int:
        """Number of rows."""
        return target.shape[0]

    def value(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """½ Σ (z − t)²."""
        return (output - target).square().sum(dtype=torch.float64) / 2

    def gradient(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Z − t."""
        return output - target

    def curve(
        self, output: torch.Tensor, tangent: torch.Tensor, target: torch.Tensor
    ) -> torch.Tensor:
        """ż."""
        return tangent

    def by_target(self, values: torch.Tensor) -> torch.Tensor:
        """Over all of a row."""
        return (
            values.sum(list(range(1, values.dim())), keepdim=True) if values.dim() > 1 else values
        )


@final
@dataclass(frozen=True)
class Logistic(Loss):
    """ℓ = log(1 + e^z) − t z for targets t in [0, 1]; outputs and targets of one shape."""

    def weight(self, target: torch.Tensor) -> int:
        """Number of targets."""
        return target.numel()

    def value(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Σ softplus(z) − t z."""
        zero = torch.zeros_like(output)
        return (torch.logaddexp(output, zero) - target * output).sum(dtype=torch.float64)

    def gradient(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """σ(z) − t."""
        return output.sigmoid() - target

    def curve(
        self, output: torch.Tensor, tangent: torch.Tensor, target: torch.Tensor
    ) -> torch.Tensor:
        """σ(z)(1 − σ(z)) ż."""
        probability = output.sigmoid()
        return probability * (1 - probability) * tangent

    def by_target(self, values: torch.Tensor) -> torch.Tensor:
        """Each number of the output has a target of its own."""
        return values
