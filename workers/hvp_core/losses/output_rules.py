"""The rules at a model's output: they make numbers, or cotangents that go back.

A rule sees one piece of a micro-batch at a time. It is traced together with the last block, so it
consists of tensor operations whose choice depends on no values.

In formulas, G = ∂(Σ w ℓ)/∂y and H_out = ∂²(Σ w ℓ)/∂y² of the loss by the output y. The slope of a
target t is g_t·v, the derivative of its loss along v: the part of G∘ẏ that belongs to it, summed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

from torch import Tensor

from hvp_core.losses.loss import Loss


@final
@dataclass(frozen=True)
class AtOutput:
    """The values that a rule may read.

    Attributes:
        loss: The loss, which gives G and H_out.
        y: The model's output, (rows, ...), in at least float32.
        y_dot: Tangent of the output, like y.
        target: Targets of the piece, as the loss takes them; of a product with drawn labels the
            draws, in one more dimension.
        given: The tensor that the walk hands in, where the product is given one: (rows,) float64,
            or like y.
    """

    loss: Loss
    y: Tensor
    y_dot: Tensor
    target: Tensor
    given: Tensor | None = None

    @property
    def gradient(self) -> Tensor:
        """G, like y."""
        return self.loss.gradient(self.y, self.target)

    @property
    def curve(self) -> Tensor:
        """H_out ẏ, like y."""
        return self.loss.curve(self.y, self.y_dot, self.target)


# Cotangents ---------------------------------------------------------------------------------------

#: Gives tensors like y: one ȳ, or the two of a pair (ȳ, ȳ̇).
CotangentRule = Callable[[AtOutput], tuple[Tensor, ...]]


def gradient(at: AtOutput) -> tuple[Tensor, ...]:
    """The gradient G by the output."""
    return (at.gradient,)


def gradient_of_a_draw(at: AtOutput) -> tuple[Tensor, ...]:
    """The gradient G of the first of the drawn labels of each target."""
    return (at.loss.gradient(at.y, at.target[..., 0]),)


def curve(at: AtOutput) -> tuple[Tensor, ...]:
    """The product H_out ẏ with the loss's own Hessian by the output."""
    return (at.curve,)


def gradient_and_curve(at: AtOutput) -> tuple[Tensor, ...]:
    """G and its tangent H_out ẏ."""
    return at.gradient, at.curve


def gradient_by_slopes_of_targets(at: AtOutput) -> tuple[Tensor, ...]:
    """For each target its part of G, times its slope.

    The slope holds the weight once and so does G: right where weights are 0 or 1, as all are.
    """
    g = at.gradient
    return (g * at.loss.by_target(g * at.y_dot),)


def gradient_by_slopes_of_draws(at: AtOutput) -> tuple[Tensor, ...]:
    """For each target the mean over its draws: each one's part of G, times its slope."""
    slopes = at.loss.drawn_slopes(at.y, at.y_dot, at.target)
    return (at.loss.drawn_gradient(at.y, at.target, slopes / slopes.shape[-1]),)


def gradient_by_given_rows(at: AtOutput) -> tuple[Tensor, ...]:
    """For each row its part of G, times the row's number that is given."""
    assert at.given is not None
    by_row = at.given.to(at.y.dtype).reshape(-1, *[1 for _ in at.y.shape[1:]])
    return (at.gradient * by_row,)


def given(at: AtOutput) -> tuple[Tensor, ...]:
    """The given tensor, in y's dtype."""
    assert at.given is not None
    return (at.given.to(at.y.dtype),)


# Numbers ------------------------------------------------------------------------------------------

#: Gives (rows,) of y's dtype, each a sum over the part of a row that is in the piece; or a tensor
#: like y.
MeasureRule = Callable[[AtOutput], Tensor]


def slopes_of_rows(at: AtOutput) -> Tensor:
    """For each row the sum of its targets' slopes, (rows,)."""
    return _over_rows(at.gradient * at.y_dot)


def squared_slopes_of_targets(at: AtOutput) -> Tensor:
    """For each row the sum of the squares of its targets' slopes, (rows,)."""
    return _over_rows(at.loss.by_target(at.gradient * at.y_dot).square())


def squared_slopes_of_draws(at: AtOutput) -> Tensor:
    """For each row the sum over its targets of the mean square of their draws' slopes, (rows,)."""
    return _over_rows(at.loss.drawn_slopes(at.y, at.y_dot, at.target).square().mean(-1))


def curvature_of_rows(at: AtOutput) -> Tensor:
    """For each row ẏ·H_out ẏ, (rows,)."""
    return _over_rows(at.y_dot * at.curve)


def output_tangent(at: AtOutput) -> Tensor:
    """The output's tangent ẏ."""
    return at.y_dot


def _over_rows(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], -1).sum(-1)
