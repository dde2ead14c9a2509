"""What a product makes of the model's output and its tangent: the cotangents that go back.

A rule sees one piece of a micro-batch at a time. It is traced together with the last block, so it
consists of operations on tensors that depend on no values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

from torch import Tensor

from hvp_core.loss import Loss


@final
@dataclass(frozen=True)
class AtOutput:
    """What a rule may read.

    Attributes:
        loss: G and H_out come from it.
        y: The model's output, (rows, ...), in at least float32.
        y_dot: Its tangent, like y.
        target: Of the loss.
    """

    loss: Loss
    y: Tensor
    y_dot: Tensor
    target: Tensor


#: Gives tensors like y: one ȳ, or the two of a pair (ȳ, ȳ̇).
CotangentRule = Callable[[AtOutput], tuple[Tensor, ...]]


def gradient(at: AtOutput) -> tuple[Tensor, ...]:
    """G."""
    return (at.loss.gradient(at.y, at.target),)


def curve(at: AtOutput) -> tuple[Tensor, ...]:
    """H_out ẏ."""
    return (at.loss.curve(at.y, at.y_dot, at.target),)


def gradient_and_curve(at: AtOutput) -> tuple[Tensor, ...]:
    """G and its tangent H_out ẏ."""
    return (*gradient(at), *curve(at))
