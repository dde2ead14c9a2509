"""Masks of attention: which key a query may look at, without a tensor of queries × keys.

Hugging Face models ask for their masks through a registered function and pass the answer on to the
attention unread. `Mask` is such an answer: it keeps the rule, gives any tile of the mask, and says
whether the whole of it is one of the regular patterns that attention kernels know.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from hvp_core.attention.rule import Span

_TILE_ELEMENTS = 1 << 18


class Shape(NamedTuple):
    """A regular mask: see `rule.Pattern` and `rule.Span`."""

    causal: bool
    window: int | None
    span: Span | None


@final
class Mask:
    """The mask of one micro-batch for layers of one type.

    Args:
        batch: Number of rows.
        rows: s, the number of queries of each row of the batch.
        columns: t, the number of keys of each row.
        rule: (b, h, i, j) -> whether query i may look at key j; index tensors that broadcast.
        valid: (b, t) true where a key is no padding; None if no key is padding.
        device: The device of `valid`, on which tiles are made.
    """

    def __init__(
        self,
        batch: int,
        rows: int,
        columns: int,
        rule: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
        valid: Tensor | None,
        device: torch.device,
    ):
        self._batch, self._rows, self._columns = batch, rows, columns
        self._rule, self._valid, self._device = rule, valid, device

    def dense(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Queries [start, stop) against all keys, boolean (b, 1, stop - start, t)."""
        stop = self._rows if stop is None else stop
        index = torch.arange(max(self._batch, self._columns, stop), device=self._device)
        b = index[: self._batch, None, None, None]
        i = index[start:stop, None]
        j = index[: self._columns]
        found = self._rule(b, torch.zeros_like(b), i, j)
        if self._valid is not None:
            found = found & self._valid[:, None, None, : self._columns]
        return found.expand(self._batch, 1, stop - start, self._columns)

    @cached_property
    def shape(self) -> Shape | None:
        """The regular pattern that equals this mask in every element; None if there is none.

        Cost: one pass over queries × keys in tiles of bounded size.
        """
        span = None if self._valid is None else _span(self._valid[:, : self._columns])
        if self._valid is not None and span is None:
            return None
        guess = self._guess(span)
        step = max(1, _TILE_ELEMENTS // (self._batch * self._columns))
        for start in range(0, self._rows, step):
            stop = min(start + step, self._rows)
            expected = self._regular(guess, start, stop)
            if not bool((self.dense(start, stop) == expected).all()):
                return None
        return guess

    def _guess(self, span: Span | None) -> Shape:
        """The regular pattern that the rule for the first and the last query suggests."""
        j = torch.arange(self._columns, device=self._device)
        zero = torch.zeros(1, dtype=torch.long, device=self._device)
        allowed = [
            self._rule(zero, zero, zero + row, j).expand(self._columns)
            for row in (0, self._rows - 1)
        ]
        causal = self._rows > 1 and not bool(allowed[0][-1])
        seen = int(allowed[1].sum())
        window = seen if causal and seen < self._columns else None
        return Shape(causal, window, span)

    def _regular(self, guess: Shape, start: int, stop: int) -> Tensor:
        j = torch.arange(self._columns, device=self._device)
        i = torch.arange(start, stop, device=self._device)[:, None] + self._columns - self._rows
        found = torch.ones(stop - start, self._columns, dtype=torch.bool, device=self._device)
        if guess.causal:
            found &= j <= i
        if guess.window is not None:
            found &= j > i - guess.window
        result = found[None, None]
        if guess.span is not None:
            begin, end = (each.view(-1, 1, 1, 1) for each in guess.span)
            result = result & (j >= begin) & (j < end)
        return result.expand(self._batch, 1, stop - start, self._columns)


def _span(valid: Tensor) -> Span | None:
    """The stretch of valid keys in each row; None if a row has gaps."""
    count = valid.sum(1)
    start = valid.int().argmax(1)
    index = torch.arange(valid.shape[1], device=valid.device)
    inside = (index >= start[:, None]) & (index < (start + count)[:, None])
    if not bool((inside == valid).all()):
        return None
    return Span(start.int(), (start + count).int())


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Tensor] | None = None,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **_: Any,
) -> Mask:
    """The mask function that is registered with transformers; its parameters are theirs."""

    def rule(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        i, j = i + q_offset, j + kv_offset
        return (j <= i) if mask_function is None else mask_function(b, h, i, j)

    valid = None if attention_mask is None else attention_mask.bool()
    return Mask(batch_size, q_length, kv_length, rule, valid, torch.device(device))
