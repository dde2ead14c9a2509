"""Batches of token sequences, for models that predict each token from those before it."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from hvp_core.errors import CurvatureError
from hvp_core.losses.loss import IGNORED
from hvp_core.model.chain import MicroBatch


def token_batch(
    input_ids: torch.Tensor,
    labels: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
) -> MicroBatch:
    """A batch of sequences, its targets shifted once and for all: position t predicts label t + 1.

    Args:
        input_ids: int64 (n, s).
        labels: int64 (n, s), −100 ignored; by default the ids, except where an id or the one before
            it is padding.
        attention_mask: (n, s), true or nonzero for real tokens.

    Raises:
        CurvatureError: BATCH_EMPTY, SHAPE_MISMATCH, NO_TARGETS.
    """
    if input_ids.dim() != 2 or input_ids.shape[0] == 0 or input_ids.shape[1] < 2:
        raise CurvatureError(
            "BATCH_EMPTY", f"input_ids are {tuple(input_ids.shape)}; give (n >= 1, s >= 2)"
        )
    for name, tensor in (("labels", labels), ("attention_mask", attention_mask)):
        if tensor is not None and tensor.shape != input_ids.shape:
            raise CurvatureError(
                "SHAPE_MISMATCH",
                f"{name} are {tuple(tensor.shape)} and input_ids {tuple(input_ids.shape)}; "
                "give one shape",
                {"field": name},
            )
    if labels is None:
        labels = input_ids
        if attention_mask is not None:
            real = attention_mask.bool()
            labels = labels.where(real & real.roll(1, 1), IGNORED)
    targets = pad(labels[:, 1:], (0, 1), value=IGNORED)
    if not bool((targets != IGNORED).any()):
        raise CurvatureError("NO_TARGETS", "every label is -100 after the shift; nothing to learn")
    inputs = {"input_ids": input_ids}
    if attention_mask is not None:
        inputs["attention_mask"] = attention_mask.long()
    return MicroBatch(inputs=inputs, targets=targets)
