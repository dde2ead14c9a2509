"""Outputs and first derivatives by cuDNN's attention, which torch brings along.

[meas] H100, bfloat16, causal, outputs and gradients in ms, in brackets by the Triton kernels:
2 × 32/8 heads of 128, S = 8192: 1.78 (2.37) and 5.3 (7.3); 32/4 heads of 64, S = 2048: 0.061
(0.055) and 0.193 (0.270); S = 8192: 0.62 (0.70) and 1.73 (2.27).
"""

from __future__ import annotations

import logging
from typing import Any, final

import torch

from hvp_core.attention.flash_launch import card, contiguous_rows
from hvp_core.attention.rule import Output, Pattern, Point, Qkv, Span

logger = logging.getLogger(__name__)


@final
class FirstOrder:
    """cuDNN's attention, for what it supports; a refusal is remembered."""

    def __init__(self) -> None:
        self._refused: set[tuple[object, ...]] = set()

    def forward(self, x: Qkv, pattern: Pattern, span: Span | None) -> Output | None:
        """(O, L), or None where other kernels have to do it."""
        if not self._takes(x, pattern, span):
            return None
        q, k, v = map(contiguous_rows, x)
        attend = torch.ops.aten._scaled_dot_product_cudnn_attention
        try:
            o, lse, *_ = attend(q, k, v, None, True, 0.0, pattern.causal, scale=pattern.scale)
        except RuntimeError as error:
            self._refuse(x, error)
            return None
        return Output(o, lse.reshape(q.shape[:3]))

    def backward(self, at: Point, pattern: Pattern, span: Span | None) -> Qkv | None:
        """(dQ, dK, dV), or None where other kernels have to do it.

        dQ is summed in the order in which programs run.
        """
        x, y, o_bar = at
        if torch.are_deterministic_algorithms_enabled() or not self._takes(x, pattern, span):
            return None
        q, k, v = map(contiguous_rows, x)
        no_dropout = torch.empty((), dtype=torch.int64, device=q.device)
        none: Any = None
        try:
            found = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
                contiguous_rows(o_bar), q, k, v, y.o, y.lse.unsqueeze(-1), no_dropout, no_dropout,
                none, none, none, q.shape[2], k.shape[2], 0.0, pattern.causal, scale=pattern.scale,
            )  # fmt: skip
        except RuntimeError as error:
            self._refuse(x, error)
            return None
        return Qkv(*found)

    def _takes(self, x: Qkv, pattern: Pattern, span: Span | None) -> bool:
        (_, _, s, d), (_, _, t, e) = x.q.shape, x.v.shape
        return (
            x.q.device.type == "cuda"
            and x.q.dtype in (torch.bfloat16, torch.float16)
            and span is None
            and pattern.window is None
            and pattern.softcap is None
            and (s == t or not pattern.causal)  # cuDNN's sequences begin together
            and 64 <= max(d, e) <= 128
            and d % 8 == e % 8 == 0
            and min(x.q.numel(), x.k.numel()) > 0
            and card(x.q.device).hopper
            and _kind(x) not in self._refused
        )

    def _refuse(self, x: Qkv, error: RuntimeError) -> None:
        if isinstance(error, torch.OutOfMemoryError):
            raise error
        self._refused.add(_kind(x))
        logger.warning("cuDNN computes no attention like %s: %s", _kind(x), error)


def _kind(x: Qkv) -> tuple[object, ...]:
    return (x.q.dtype, x.q.shape[-1], x.v.shape[-1], x.q.device)
