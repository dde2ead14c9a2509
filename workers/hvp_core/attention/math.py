"""Attention written so that torch can differentiate it as often as one likes, in O(s·t) memory.

Fused attention kernels have no forward derivative, and the forward rule of softmax cannot be
differentiated again; exponentials, sums and products can.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hvp_core.attention.rule import Qkv


def attention(
    x: Qkv, mask: Tensor | None, causal: bool, scale: float, softcap: float | None
) -> Tensor:
    """softmax(τQKᵀ + M)V with grouped key heads.

    Args:
        x: Query (b, h, s, d), key (b, h/g, t, d), value (b, h/g, t, e).
        mask: Boolean (b or 1, 1 or h, s, t), true where a query may look; or a floating tensor that
            is added to the scores; or None.
        causal: Without a mask, query i looks at keys j ≤ i + (t − s) only.
        scale: τ.
        softcap: c of c·tanh(S/c), or None.

    Returns:
        (b, s, h, e). A query that may look nowhere gets zeros, as in fused attention.
    """
    query, key, value = x
    batch, heads, rows, width = query.shape
    key_heads, columns = key.shape[1], key.shape[2]
    group = heads // key_heads
    if mask is None and causal:
        ones = torch.ones(rows, columns, dtype=torch.bool, device=query.device)
        mask = ones.tril(columns - rows)
    grouped = (query * scale).reshape(batch, key_heads, group * rows, width)
    scores = (grouped @ key.transpose(-1, -2)).reshape(batch, heads, rows, columns)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        mask = mask[..., :columns]
        added = mask.is_floating_point()
        scores = scores + mask if added else scores.masked_fill(~mask, -torch.inf)
    # A shift changes nothing, so neither does its derivative. The method would not stop it: in a
    # model's code it is ignored.
    fixed = torch.ops.aten.detach.default(scores)
    shift = fixed.amax(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)
    weights = torch.exp(scores - shift)
    total = weights.sum(-1, keepdim=True)
    weights = weights / total.masked_fill(total == 0, 1)
    output = weights.reshape(batch, key_heads, group * rows, columns) @ value
    return output.reshape(batch, heads, rows, -1).transpose(1, 2)
