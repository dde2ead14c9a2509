"""A folder of config.json and safetensors as a model of transformers without weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights

from hvp_core.model.config import config_refused
from hvp_core.model.huggingface import attention
from hvp_core.model.huggingface.architecture import load_config
from hvp_core.model.huggingface.named_class import Task
from hvp_core.model.stored_tensors import (
    StoredTensor,
    by_name_in_model,
    same_values,
    stored_tensors,
)


def build_empty(directory: Path, dtype: torch.dtype) -> PreTrainedModel:
    """A folder's model, its parameters on the meta device, its buffers real, in eval mode.

    Parameters that the config ties are one, unless the files hold two tensors that differ: those
    stay two, as transformers has it.

    Args:
        directory: Folder of config.json and safetensors.
        dtype: The dtype of the parameters.

    Raises:
        CurvatureError: See `build_from_config` and `stored_tensors`.
    """
    model = _build(directory, dtype)
    stored = by_name_in_model(model, stored_tensors(directory))
    return _finish(model, stored)


def build_from_config(directory: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a folder that may hold a config.json alone; otherwise as `build_empty`.

    Raises:
        CurvatureError: CONFIG_INVALID, QUANTIZATION_UNSUPPORTED, ARCHITECTURE_UNKNOWN,
            TASK_UNSUPPORTED, REMOTE_CODE_REFUSED.
    """
    return _finish(_build(directory, dtype), {})


def _build(directory: Path, dtype: torch.dtype) -> PreTrainedModel:
    attention.register()
    config, task = load_config(directory)
    try:
        try:
            return _from_config(config, task, dtype, attention.NAME)
        except KeyError:  # classes that look their attention up in a table of their own
            return _from_config(config, task, dtype, "eager")
    except Exception as error:  # a library of thousands of models fails in every way there is
        raise config_refused(error) from error


_CLASSES: dict[Task, Any] = {
    "causal language modelling": AutoModelForCausalLM,
    "sequence classification": AutoModelForSequenceClassification,
}


def _from_config(
    config: PreTrainedConfig, task: Task, dtype: torch.dtype, attn: str
) -> PreTrainedModel:
    with no_init_weights(), init_empty_weights(include_buffers=False):
        return _CLASSES[task].from_config(
            config, trust_remote_code=False, dtype=dtype, attn_implementation=attn
        )


def _finish(model: PreTrainedModel, stored: Mapping[str, StoredTensor]) -> PreTrainedModel:
    """The model in eval mode, its parameters tied again: replacing them has undone their ties."""
    tied = model.all_tied_weights_keys
    for target, source in list(tied.items()):
        both = target in stored and source in stored
        if both and not same_values(stored[target], stored[source]):
            del tied[target]
    model.tie_weights(recompute_mapping=False)
    return model.eval().requires_grad_(False)
