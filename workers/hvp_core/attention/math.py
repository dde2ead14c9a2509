"""Attention for Hugging Face models, written so that every derivative of it exists.

Fused attention kernels have no forward derivative, and the forward rule of softmax cannot be
differentiated again; exponentials, sums and products can.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from hvp_core.errors import CurvatureError

NAME = "hvp"
#: Keyword arguments that change the result in ways not written below.
_UNSUPPORTED = ("s_aux", "sinks", "block_mask")


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """softmax(τQKᵀ + M)V with grouped key heads.

    Args:
        module: The attention layer; its `is_causal` counts where no mask is given.
        query: (b, h, s, d).
        key: (b, h/g, t, d): g query heads share a key head.
        value: (b, h/g, t, e).
        attention_mask: Boolean (b or 1, 1 or h, s, t), true where a query may look; or None.
        scaling: τ; d**-0.5 by default.
        softcap: c of c·tanh(S/c), or None.
        is_causal: Overrides the layer's.
        others: Of Hugging Face's attention functions; those that would change the result are
        refused.

    Returns:
        (b, s, h, e) and None. A query that may look nowhere gets zeros, as in fused attention.

    Raises:
        CurvatureError: MODEL_UNSUPPORTED for attention sinks and block masks.
    """
    refused = [name for name in _UNSUPPORTED if others.get(name) is not None]
    if refused:
        raise CurvatureError(
            "MODEL_UNSUPPORTED", f"this model's attention uses {refused[0]}, which has no dual yet"
        )
    batch, heads, rows, width = query.shape
    key_heads, columns = key.shape[1], key.shape[2]
    group = heads // key_heads
    scale = width**-0.5 if scaling is None else scaling
    if attention_mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if causal and rows > 1:
            ones = torch.ones(rows, columns, dtype=torch.bool, device=query.device)
            attention_mask = ones.tril(columns - rows)
    grouped = (query * scale).reshape(batch, key_heads, group * rows, width)
    scores = (grouped @ key.transpose(-1, -2)).reshape(batch, heads, rows, columns)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask[..., :columns], -torch.inf)
    shift = scores.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)
    weights = torch.exp(scores - shift)
    total = weights.sum(-1, keepdim=True)
    weights = weights / total.masked_fill(total.detach() == 0, 1)
    output = weights.reshape(batch, key_heads, group * rows, columns) @ value
    return output.reshape(batch, heads, rows, -1).transpose(1, 2), None


def register() -> None:
    """Make `attn_implementation="hvp"` known to transformers; idempotent."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
