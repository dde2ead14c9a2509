"""Which family the model of a checkpoint folder belongs to."""

from __future__ import annotations

from pathlib import Path

from hvp_core.model.config import config_of
from hvp_core.model.family import ModelFamily
from hvp_core.model.huggingface.architecture import load_config
from hvp_core.model.huggingface.families import CausalLanguageModels, SequenceClassifiers
from hvp_core.model.huggingface.named_class import Task
from hvp_core.model.modules import registered

_BY_TASK: dict[Task, ModelFamily] = {
    "causal language modelling": CausalLanguageModels(),
    "sequence classification": SequenceClassifiers(),
}


def family_of(directory: Path) -> ModelFamily:
    """The family of a folder's model, by its config.json; a registered one comes first.

    Args:
        directory: Folder of config.json.

    Raises:
        CurvatureError: CONFIG_INVALID, QUANTIZATION_UNSUPPORTED, ARCHITECTURE_UNKNOWN,
            TASK_UNSUPPORTED, REMOTE_CODE_REFUSED.
    """
    family = registered(config_of(directory)["model_type"])
    return family or _BY_TASK[load_config(directory)[1]]
