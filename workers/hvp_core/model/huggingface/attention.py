"""The attention of models of transformers: their calls and masks, as the seam takes them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from hvp_core.attention.mask import Mask, make_mask
from hvp_core.attention.rule import Qkv
from hvp_core.attention.seam import Call, attend
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
        attention_mask: A mask that `make_mask` made; or boolean (b or 1, 1 or h, s, t), true where
            a query may look; or None.
        scaling: τ; d**-0.5 by default.
        softcap: c of c·tanh(S/c), or None.
        is_causal: Overrides the layer's.
        others: Other arguments of Hugging Face's attention functions; refused unless they are known
            to leave the result alone.

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
    return attend(call), None


def use(model: PreTrainedModel, name: str) -> None:
    """Have a model compute its attention by this implementation.

    The name is set even in a model whose class does not offer a choice: its masks are then made for
    this implementation.
    """
    for module in model.modules():
        if isinstance(getattr(module, "config", None), PreTrainedConfig):
            module.config._attn_implementation = name


def register() -> None:
    """Make `attn_implementation="hvp"` known to transformers; idempotent."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, make_mask)
