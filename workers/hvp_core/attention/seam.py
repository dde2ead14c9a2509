"""The seam: where a layer is cut so that its attention gets a rule of its own.

Inside `cut(o)` the registered attention function notes its arguments and returns `o` in place of a
result (zeros for None). The layer then is a function of its input and of `o`, whose outputs are the
query, key and value and the layer's output, whatever its architecture.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from hvp_core.attention import math
from hvp_core.attention.mask import Mask, Shape, make_mask
from hvp_core.attention.rule import Pattern, Qkv, Span
from hvp_core.errors import CurvatureError

NAME = "hvp"
#: Keyword arguments that change nothing: they say what the mask says too, choose among kernels,
#: or ask for more than the output. Any other one might change the result.
_HARMLESS = frozenset(
    {
        "cache_position",
        "deterministic",
        "logits_to_keep",
        "num_items_in_batch",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "use_cache",
        "use_kernel",
    }
)


@final
@dataclass
class Seam:
    """What the attention of a layer was called with."""

    o: Tensor | None  # (b, s, h, e), what it returns; None for zeros
    calls: list[Call] = field(default_factory=list)


@final
@dataclass(frozen=True)
class Call:
    """One call of the attention function."""

    qkv: Qkv
    scale: float
    softcap: float | None
    causal: bool  # where there is no mask
    mask: Mask | Tensor | None

    def shape(self, mask: Mask | None) -> tuple[Pattern, Span | None] | None:
        """As kernels want it, with this micro-batch's own mask; None if that is irregular."""
        shape = Shape(self.causal, None, None) if mask is None else mask.shape
        if shape is None:
            return None
        pattern = Pattern(
            scale=self.scale, causal=shape.causal, window=shape.window, softcap=self.softcap
        )
        return pattern, shape.span


_open: ContextVar[Seam | None] = ContextVar("seam", default=None)


@contextmanager
def cut(o: Tensor | None) -> Iterator[Seam]:
    """Cut every attention that is called inside."""
    seam = Seam(o)
    token = _open.set(seam)
    try:
        yield seam
    finally:
        _open.reset(token)


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Mask | Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The attention function that is registered with transformers.

    Args:
        module: The attention layer; its `is_causal` counts where no mask is given.
        query: (b, h, s, d).
        key: (b, h/g, t, d): g query heads share a key head.
        value: (b, h/g, t, e).
        attention_mask: Of `make_mask`; or boolean (b or 1, 1 or h, s, t), true where a query may
            look; or None.
        scaling: τ; d**-0.5 by default.
        softcap: c of c·tanh(S/c), or None.
        is_causal: Overrides the layer's.
        others: Of Hugging Face's attention functions; refused where they are not known to leave
            the result alone.

    Returns:
        (b, s, h, e) and None. A query that may look nowhere gets zeros, as in fused attention.

    Raises:
        CurvatureError: MODEL_UNSUPPORTED, naming the argument.
    """
    # A window is part of the mask, where there is one; no dropout is none.
    harmless = _HARMLESS | ({"sliding_window"} if attention_mask is not None else set())
    asked = {name for name, each in others.items() if each is not None} - harmless
    if not others.get("dropout"):
        asked.discard("dropout")
    if asked:
        raise CurvatureError(
            "MODEL_UNSUPPORTED",
            f"this model's attention uses {', '.join(sorted(asked))}, which has no dual yet",
        )
    if not query.dim() == key.dim() == value.dim() == 4:
        raise CurvatureError(
            "MODEL_UNSUPPORTED", "this model's attention is not one of (batch, head, token, width)"
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    # Angles made in a layer may be wider than its projections.
    dtype = min((query.dtype, key.dtype, value.dtype), key=lambda each: each.itemsize)
    query, key, value = (each.to(dtype) for each in (query, key, value))
    call = Call(
        Qkv(query, key, value),
        float(query.shape[-1] ** -0.5 if scaling is None else scaling),
        softcap,
        bool(causal) and query.shape[2] > 1,
        attention_mask,
    )
    seam = _open.get()
    if seam is not None:
        seam.calls.append(call)
        if seam.o is not None:
            return seam.o, None
        b, h, s, _ = query.shape
        return value.new_zeros(b, s, h, value.shape[-1]), None
    mask = attention_mask.dense() if isinstance(attention_mask, Mask) else attention_mask
    return math.attention(call.qkv, mask, call.causal, call.scale, softcap), None


def use(model: PreTrainedModel, name: str) -> None:
    """Have a model compute its attention by this implementation.

    Also where its class does not let itself be told: its masks are then made for it.
    """
    for module in model.modules():
        if isinstance(getattr(module, "config", None), PreTrainedConfig):
            module.config._attn_implementation = name


def register() -> None:
    """Make `attn_implementation="hvp"` known to transformers; idempotent."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, make_mask)
