"""The seam: where a layer is cut so that its attention gets a rule of its own.

Inside `cut(outputs)` every call of an attention is noted, and returns the next of the outputs in
place of a result (zeros for None). The layer then is a function of its input and of the outputs of
its attentions. Beside its own output it gives the queries, keys and values of each attention,
whatever its architecture.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import final

from torch import Tensor

from hvp_core.attention import math
from hvp_core.attention.mask import Mask, Shape
from hvp_core.attention.rule import Pattern, Qkv, Span


@final
@dataclass
class Seam:
    """The calls of a layer's attentions, in their order, and the outputs that they return."""

    outputs: Sequence[Tensor] | None  # each (b, s, h, e), what they return; None for zeros
    calls: list[Call] = field(default_factory=list)


@final
@dataclass(frozen=True)
class Call:
    """One call of a model's attention."""

    qkv: Qkv
    scale: float
    softcap: float | None
    causal: bool  # where there is no mask
    mask: Mask | Tensor | None

    def shape(self, mask: Mask | None) -> tuple[Pattern, Span | None] | None:
        """Pattern and span for kernels, with a micro-batch's own mask; None if it is irregular."""
        shape = Shape(self.causal, None, None) if mask is None else mask.shape
        if shape is None:
            return None
        pattern = Pattern(
            scale=self.scale, causal=shape.causal, window=shape.window, softcap=self.softcap
        )
        return pattern, shape.span


_open: ContextVar[Seam | None] = ContextVar("seam", default=None)


@contextmanager
def cut(outputs: Sequence[Tensor] | None) -> Iterator[Seam]:
    """Cut every attention that is called inside.

    Args:
        outputs: What the attentions return, in the order of their calls, (b, s, h, e) each; None
            for zeros.
    """
    seam = Seam(outputs)
    token = _open.set(seam)
    try:
        yield seam
    finally:
        _open.reset(token)


def attend(call: Call) -> Tensor:
    """The output of an attention, (b, s, h, e); inside `cut`, the tensor given in its place."""
    seam = _open.get()
    if seam is not None:
        seam.calls.append(call)
        if seam.outputs is not None:
            return seam.outputs[len(seam.calls) - 1]
        b, h, s, _ = call.qkv.q.shape
        return call.qkv.v.new_zeros(b, s, h, call.qkv.v.shape[-1])
    mask = call.mask.dense() if isinstance(call.mask, Mask) else call.mask
    return math.attention(call.qkv, mask, call.causal, call.scale, call.softcap)
