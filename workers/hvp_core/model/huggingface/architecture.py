"""The config of a checkpoint folder: a model of transformers of a task that is served.

Only classes of transformers itself are ever built, whatever code comes with a checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from hvp_operations.wording import shown
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from hvp_core.errors import CurvatureError
from hvp_core.model.config import config_of, config_refused
from hvp_core.model.huggingface.named_class import Task, refuse_remote_code, task_of

# What a training script may leave in a config without changing the function that the model
# computes: the form of its outputs, and how it is differentiated. One form is served.
_INCIDENTAL = {
    "return_dict": True,
    "output_attentions": False,
    "output_hidden_states": False,
    "use_cache": False,
    "gradient_checkpointing": False,
}


def load_config(directory: Path) -> tuple[PreTrainedConfig, Task]:
    """The config of a checkpoint folder, and what its class of model is for.

    Args:
        directory: Folder of config.json.

    Returns:
        The config, with what does not change the function set to what the engine relies on; the
        task.

    Raises:
        CurvatureError: CONFIG_INVALID, QUANTIZATION_UNSUPPORTED, ARCHITECTURE_UNKNOWN,
            TASK_UNSUPPORTED, REMOTE_CODE_REFUSED.
    """
    raw = config_of(directory)
    kind = raw["model_type"]
    if kind not in CONFIG_MAPPING:
        refuse_remote_code(raw, f"transformers has no model of type {shown(kind)}")
        raise CurvatureError(
            "ARCHITECTURE_UNKNOWN",
            f"model_type {shown(kind)} is not one that transformers knows; correct config.json, or "
            "give a checkpoint of a type that it knows",
            {"model_type": kind},
        )
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        for part in _parts(config):
            for setting, value in _INCIDENTAL.items():
                if hasattr(part, setting):
                    setattr(part, setting, value)
            vars(part).pop("auto_map", None)  # nobody after this can even ask for remote code
    except Exception as error:  # a library of thousands of configs fails in every way there is
        raise config_refused(error) from error
    return config, task_of(raw, config)


def longest_sequence(config: PreTrainedConfig) -> int | None:
    """The longest sequence that a model's positions are made for; None when it sets no limit.

    Where rotary positions are scaled by a rule that does not depend on the length, the scaled range
    counts: YaRN with factor 4 over 32768 positions reaches to 131072.
    """
    longest: int | None = getattr(config, "max_position_embeddings", None)
    scaling = getattr(config, "rope_parameters", None) or {}
    if longest is None or scaling.get("rope_type") not in ("yarn", "linear", "llama3"):
        return longest
    original = scaling.get("original_max_position_embeddings") or longest
    return max(longest, int(original * (scaling.get("factor") or 1)))


def _parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """A config and those of its parts."""
    yield config
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if isinstance(part, PreTrainedConfig):
            yield from _parts(part)
