"""Losses by their outputs: value, gradient and its tangent, in closed form.

A loss is Σ w ℓ(z, target); the walk divides by the whole batch's Σ w. Written out by hand because
the chain ends here: what the blocks need is only the pair (G, Ġ), G = ∂(Σ w ℓ)/∂z and
Ġ = ∂²(Σ w ℓ)/∂z² ż, and the automatic rules for log-softmax cannot be differentiated a third time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch

from hvp_core.errors import CurvatureError

IGNORED = -100  # a label of weight zero


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """16 bits in float32: a loss, or what a block hands on, is not rounded to them."""
    return x.float() if x.dtype.itemsize < 4 else x


class Loss(ABC):
    """Sum over targets of a function of the model's output.

    Law: with H_out = ∂²/∂z², `dual(z, ż)` returns (value(z), G(z), H_out ż). Losses that are equal
    are one function: programs are kept by the loss that they were traced with, so that a loss with
    settings is a frozen dataclass of them, or equal to itself alone. Its `repr` is what provenance
    calls it.

    Attributes:
        has_outputs: Whether what the loss is taken of is an output of the model, of which there are
            a Jacobian, a Gauss-Newton matrix and gradients of single targets.
        counts: What of the targets `weight` counts: rows, or elements that are not ignored.
    """

    has_outputs: ClassVar[bool] = True
    counts: ClassVar[Literal["row", "element"]] = "element"

    @abstractmethod
    def weight(self, target: torch.Tensor) -> float:
        """Σ w: how many targets count."""

    def fits(self, output: torch.Size, target: torch.Tensor) -> str:
        """Why targets are none of outputs of this shape, in words; "" where nothing is known."""
        return ""

    def check(self, output: torch.Tensor, target: torch.Tensor) -> None:
        """Refuse an output that this loss is not a function of.

        Raises:
            CurvatureError: LOSS_MISMATCH, with both shapes.
        """
        if why := self.fits(output.shape, target):
            raise CurvatureError(
                "LOSS_MISMATCH",
                f"the model's output is {tuple(output.shape)} and the targets are "
                f"{tuple(target.shape)} of {str(target.dtype).removeprefix('torch.')}: {self!r} "
                f"{why}",
                {"loss": repr(self)},
            )

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

    def weight(self, target: torch.Tensor) -> float:
        """Number of labels that are not −100."""
        return int((target != IGNORED).sum())

    def fits(self, output: torch.Size, target: torch.Tensor) -> str:
        """Classes are the last dimension."""
        if target.is_floating_point():
            return "takes class indices, which are integers"
        return "" if output[:-1] == target.shape else "takes one class index for each row of logits"

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

    counts: ClassVar[Literal["row", "element"]] = "row"

    def weight(self, target: torch.Tensor) -> float:
        """Number of rows."""
        return target.shape[0]

    def fits(self, output: torch.Size, target: torch.Tensor) -> str:
        """One shape."""
        return "" if output == target.shape else "takes targets of the output's shape"

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

    def weight(self, target: torch.Tensor) -> float:
        """Number of targets."""
        return target.numel()

    def fits(self, output: torch.Size, target: torch.Tensor) -> str:
        """One shape."""
        return "" if output == target.shape else "takes targets of the output's shape"

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


@final
@dataclass(frozen=True)
class MeanSquaredError(Loss):
    """ℓ = (z − t)² of every element; outputs and targets of one shape, or outputs (rows, 1).

    This is torch's `MSELoss`. `SquaredError` has half the sum over a row, and counts rows.
    """

    def weight(self, target: torch.Tensor) -> float:
        """Number of elements."""
        return target.numel()

    def fits(self, output: torch.Size, target: torch.Tensor) -> str:
        """As many targets as outputs, row by row."""
        alike = output == target.shape or output == (*target.shape, 1)
        return "" if alike else "takes a target for each element of the output"

    def value(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Σ (z − t)²."""
        return (output - target.view_as(output)).square().sum(dtype=torch.float64)

    def gradient(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """2 (z − t)."""
        return 2 * (output - target.view_as(output))

    def curve(
        self, output: torch.Tensor, tangent: torch.Tensor, target: torch.Tensor
    ) -> torch.Tensor:
        """2 ż."""
        return 2 * tangent

    def by_target(self, values: torch.Tensor) -> torch.Tensor:
        """Each element of the output has a target of its own."""
        return values


@final
@dataclass(frozen=True)
class OwnLoss(Loss):
    """The model gives the loss itself, of all rows that it is given the mean, once for each row.

    So Σ z over rows is Σ ℓ, and it has no curvature by z. There are no targets beside the output:
    a tensor like it stands in their place.
    """

    has_outputs: ClassVar[bool] = False
    counts: ClassVar[Literal["row", "element"]] = "row"

    def weight(self, target: torch.Tensor) -> float:
        """Number of rows."""
        return target.shape[0]

    def fits(self, output: torch.Size, target: torch.Tensor) -> str:
        """One number for each row."""
        return "" if output == target.shape else "takes one number for each row"

    def value(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Σ z."""
        return output.sum(dtype=torch.float64)

    def gradient(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """1."""
        return torch.ones_like(output)

    def curve(
        self, output: torch.Tensor, tangent: torch.Tensor, target: torch.Tensor
    ) -> torch.Tensor:
        """0."""
        return torch.zeros_like(tangent)

    def by_target(self, values: torch.Tensor) -> torch.Tensor:
        """Nothing is known of single rows."""
        return values


@final
@dataclass(frozen=True, kw_only=True)
class OutputHead:
    """What the end of a model gives, and the loss that is taken of it.

    Attributes:
        loss: Of outputs and targets.
        unit: What a row of the output is of: every position of a sequence, so that positions may
            go through the last block in pieces; or a row of the batch, which takes all of it.
    """

    loss: Loss
    unit: Literal["token", "row"]
