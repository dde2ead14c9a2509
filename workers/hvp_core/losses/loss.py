"""Losses by their outputs: value, gradient and its tangent, in closed form.

A loss is Σ w ℓ(z, target); the walk divides by the whole batch's Σ w. The derivatives are written
out by hand: the chain ends here, so the blocks need only the pair (G, Ġ), G = ∂(Σ w ℓ)/∂z and
Ġ = ∂²(Σ w ℓ)/∂z² ż, and the automatic rules for log-softmax cannot be differentiated a third time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch

from hvp_core.errors import CurvatureError
from hvp_core.losses.drawing import draw_classes, draw_gaussian

IGNORED = -100  # a label of weight zero


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """The tensor, in float32 if it has 16 bits: a loss or a block's output keeps its digits."""
    return x.float() if x.dtype.itemsize < 4 else x


class Loss(ABC):
    """Sum over targets of a function of the model's output.

    Law: `gradient` and `curve` are the derivatives G and H_out ż of `value`, with H_out its second
    derivative by z. Losses that are equal are one function: programs are kept by the loss that they
    were traced with, so a loss with settings is a frozen dataclass of them, or equal to itself
    alone. Its `repr` is its name in provenance.

    Attributes:
        has_outputs: Whether the loss is taken of an output of the model, which then has a Jacobian,
            a Gauss-Newton matrix and gradients of single targets.
        counts: The unit that `weight` counts in the targets: rows, or elements that are not
            ignored.
    """

    has_outputs: ClassVar[bool] = True
    counts: ClassVar[Literal["row", "element"]] = "element"

    @abstractmethod
    def weight(self, target: torch.Tensor) -> float:
        """Σ w, the number of targets that count."""

    def fits(self, output: torch.Size, target: torch.Tensor) -> str:
        """Why these targets do not fit outputs of this shape, in words; "" if they may fit."""
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
        """Sums of a tensor like the output over the elements that belong to each single target.

        Returns:
            The sums; dimensions that are summed over have size one, so that the sums broadcast
            against the output.
        """

    # Targets drawn from the model ---------------------------------------------------------------
    #
    # A loss that is −log p(target | z), up to a constant, is the likelihood of a distribution, and
    # targets can be drawn of it. The S draws of each target lie in one more dimension, the last.

    def draw(
        self, output: torch.Tensor, target: torch.Tensor, uniform: torch.Tensor
    ) -> torch.Tensor:
        """Targets drawn from the distribution that the output says, independent of the true ones.

        Law: over the draws E[G Gᵀ], of the part G of one target, is the part of H_out; so the
        Fisher matrix is the Gauss-Newton matrix.

        Args:
            output: z, in at least float32.
            target: The true targets, of which only shape and what is ignored matter.
            uniform: Independent numbers between 0 and 1, float64, shaped as the targets with two
                more dimensions (..., S, 2).

        Returns:
            S draws of each target, shaped as the targets with one more dimension (..., S).

        Raises:
            CurvatureError: LOSS_HAS_NO_DISTRIBUTION: by default no distribution is known.
        """
        raise CurvatureError(
            "LOSS_HAS_NO_DISTRIBUTION",
            f"no distribution is known whose negative log likelihood {self!r} is, so that no "
            "labels can be drawn from the model; ask for the ggn, or give the loss a method "
            "`draw`",
            {"loss": repr(self)},
        )

    @property
    def is_likelihood(self) -> bool:
        """Whether targets can be drawn."""
        return type(self).draw is not Loss.draw

    def drawn_slopes(
        self, output: torch.Tensor, tangent: torch.Tensor, drawn: torch.Tensor
    ) -> torch.Tensor:
        """The slope of each draw: its G∘ż, summed `by_target`, with one more dimension (..., S)."""
        each = [
            self.by_target(self.gradient(output, target) * tangent) for target in drawn.unbind(-1)
        ]
        return torch.stack(each, -1)

    def drawn_gradient(
        self, output: torch.Tensor, drawn: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """Σ_s c_s G_s over the draws, shaped as the output.

        Args:
            output: z.
            drawn: The draws, (..., S).
            weights: A number c_s for each draw, shaped as `drawn_slopes`.
        """
        total = torch.zeros_like(output)
        for target, weight in zip(drawn.unbind(-1), weights.unbind(-1), strict=True):
            total = total + self.gradient(output, target) * weight
        return total


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
        """See Loss: integers, one for each row of logits; classes are the last dimension."""
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
        """G = w(p − e_y), like the logits."""
        counted = (target != IGNORED).unsqueeze(-1)
        index = target.unsqueeze(-1).where(counted, 0)
        result = output.softmax(-1)
        result.scatter_add_(-1, index, result.new_full((), -1.0).expand(index.shape))
        return result.mul_(counted)

    def curve(
        self, output: torch.Tensor, tangent: torch.Tensor, target: torch.Tensor
    ) -> torch.Tensor:
        """Ġ = w p∘(ż − p·ż), like the logits."""
        probability = output.softmax(-1)
        mean = (probability * tangent).sum(-1, keepdim=True)
        return probability.mul_(tangent - mean).mul_((target != IGNORED).unsqueeze(-1))

    def by_target(self, values: torch.Tensor) -> torch.Tensor:
        """Sums over the classes, (..., 1)."""
        return values.sum(-1, keepdim=True)

    def draw(
        self, output: torch.Tensor, target: torch.Tensor, uniform: torch.Tensor
    ) -> torch.Tensor:
        """Class k with probability p_k; −100 where the true label is."""
        shape = uniform.shape[:-1]
        found = draw_classes(output.flatten(0, -2), uniform[..., 0].reshape(-1, shape[-1]))
        return found.view(shape).where((target != IGNORED).unsqueeze(-1), IGNORED)

    def drawn_slopes(
        self, output: torch.Tensor, tangent: torch.Tensor, drawn: torch.Tensor
    ) -> torch.Tensor:
        """See Loss: p·ż − ż_y for all draws of a position at once, (..., 1, S)."""
        counted = drawn != IGNORED
        mean = (output.softmax(-1) * tangent).sum(-1, keepdim=True)
        return ((mean - tangent.gather(-1, drawn.where(counted, 0))) * counted).unsqueeze(-2)

    def drawn_gradient(
        self, output: torch.Tensor, drawn: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """See Loss: p Σ_s c_s − Σ_s c_s e_{y_s}."""
        counted = drawn != IGNORED
        each = weights.squeeze(-2) * counted
        result = output.softmax(-1) * each.sum(-1, keepdim=True)
        return result.scatter_add_(-1, drawn.where(counted, 0), -each)


@final
@dataclass(frozen=True)
class SquaredError(Loss):
    """ℓ = ½‖z − t‖² per row; outputs and targets (rows, ...), every row counts once."""

    counts: ClassVar[Literal["row", "element"]] = "row"

    def weight(self, target: torch.Tensor) -> float:
        """Number of rows."""
        return target.shape[0]

    def fits(self, output: torch.Size, target: torch.Tensor) -> str:
        """See Loss: outputs and targets have one shape."""
        return "" if output == target.shape else "takes targets of the output's shape"

    def value(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """½ Σ (z − t)² over all elements."""
        return (output - target).square().sum(dtype=torch.float64) / 2

    def gradient(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """G = z − t."""
        return output - target

    def curve(
        self, output: torch.Tensor, tangent: torch.Tensor, target: torch.Tensor
    ) -> torch.Tensor:
        """Ġ = ż."""
        return tangent

    def by_target(self, values: torch.Tensor) -> torch.Tensor:
        """Sums over each whole row, (rows, 1, ...)."""
        return (
            values.sum(list(range(1, values.dim())), keepdim=True) if values.dim() > 1 else values
        )

    def draw(
        self, output: torch.Tensor, target: torch.Tensor, uniform: torch.Tensor
    ) -> torch.Tensor:
        """Gaussian about z, of variance 1 in each element."""
        return draw_gaussian(output, 1.0, uniform)


@final
@dataclass(frozen=True)
class Logistic(Loss):
    """ℓ = log(1 + e^z) − t z for targets t in [0, 1]; outputs and targets of one shape."""

    def weight(self, target: torch.Tensor) -> float:
        """Number of targets."""
        return target.numel()

    def fits(self, output: torch.Size, target: torch.Tensor) -> str:
        """See Loss: outputs and targets have one shape."""
        return "" if output == target.shape else "takes targets of the output's shape"

    def value(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Σ softplus(z) − t z over all elements."""
        zero = torch.zeros_like(output)
        return (torch.logaddexp(output, zero) - target * output).sum(dtype=torch.float64)

    def gradient(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """G = σ(z) − t."""
        return output.sigmoid() - target

    def curve(
        self, output: torch.Tensor, tangent: torch.Tensor, target: torch.Tensor
    ) -> torch.Tensor:
        """Ġ = σ(z)(1 − σ(z)) ż."""
        probability = output.sigmoid()
        return probability * (1 - probability) * tangent

    def by_target(self, values: torch.Tensor) -> torch.Tensor:
        """Each number of the output has a target of its own."""
        return values

    def draw(
        self, output: torch.Tensor, target: torch.Tensor, uniform: torch.Tensor
    ) -> torch.Tensor:
        """1 with probability σ(z), else 0."""
        return (uniform[..., 0] < output.double().sigmoid().unsqueeze(-1)).to(output.dtype)


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
        """See Loss: one target for each element of the output."""
        alike = output == target.shape or output == (*target.shape, 1)
        return "" if alike else "takes a target for each element of the output"

    def value(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Σ (z − t)² over all elements."""
        return (output - target.view_as(output)).square().sum(dtype=torch.float64)

    def gradient(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """G = 2 (z − t)."""
        return 2 * (output - target.view_as(output))

    def curve(
        self, output: torch.Tensor, tangent: torch.Tensor, target: torch.Tensor
    ) -> torch.Tensor:
        """Ġ = 2 ż."""
        return 2 * tangent

    def by_target(self, values: torch.Tensor) -> torch.Tensor:
        """Each element of the output has a target of its own."""
        return values

    def draw(
        self, output: torch.Tensor, target: torch.Tensor, uniform: torch.Tensor
    ) -> torch.Tensor:
        """Gaussian about z, of variance ½: (z − t)² is then −log p but for a constant."""
        return draw_gaussian(output.reshape(target.shape), 0.5, uniform)


@final
@dataclass(frozen=True)
class OwnLoss(Loss):
    """The loss of a model that gives it itself: z is the mean over the rows, once for each row.

    So Σ z over rows is Σ ℓ, and the loss has no curvature by z. There are no targets beside the
    output: a tensor like it stands in their place.
    """

    has_outputs: ClassVar[bool] = False
    counts: ClassVar[Literal["row", "element"]] = "row"

    def weight(self, target: torch.Tensor) -> float:
        """Number of rows."""
        return target.shape[0]

    def fits(self, output: torch.Size, target: torch.Tensor) -> str:
        """See Loss: outputs are one number for each row."""
        return "" if output == target.shape else "takes one number for each row"

    def value(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Σ z over the rows."""
        return output.sum(dtype=torch.float64)

    def gradient(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Ones, shaped as the output."""
        return torch.ones_like(output)

    def curve(
        self, output: torch.Tensor, tangent: torch.Tensor, target: torch.Tensor
    ) -> torch.Tensor:
        """Zeros, shaped as the output."""
        return torch.zeros_like(tangent)

    def by_target(self, values: torch.Tensor) -> torch.Tensor:
        """The values themselves: nothing is known of single rows."""
        return values


@final
@dataclass(frozen=True, kw_only=True)
class OutputHead:
    """The outputs of a model, and the loss that is taken of them.

    Attributes:
        loss: The loss of outputs and targets.
        unit: `token`: every position of a sequence has outputs of its own, so that positions may go
            through the last block in pieces. `row`: the outputs of a row need the whole row.
    """

    loss: Loss
    unit: Literal["token", "row"]
