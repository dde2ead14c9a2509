"""Reads config.json of a checkpoint folder, for every family of models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hvp_folders.config import read_config
from hvp_folders.refusal import FolderError
from hvp_folders.weights import CONFIG

from hvp_core.errors import CurvatureError


def config_of(directory: Path) -> dict[str, Any]:
    """The object in a folder's config.json, which names its model_type.

    Raises:
        CurvatureError: CONFIG_INVALID, QUANTIZATION_UNSUPPORTED, CHECKPOINT_FILES_INVALID.
    """
    try:
        return read_config(directory / CONFIG)
    except FolderError as error:
        raise CurvatureError(error.reason, error.message, error.metadata) from None


def config_refused(
    error: Exception, advice: str = "take the config.json that the model came with"
) -> CurvatureError:
    """The refusal of a config from which no model can be built.

    Args:
        error: Exception that was raised when the model was built.
        advice: What to do, in words; the default is for models of transformers.
    """
    return CurvatureError(
        "CONFIG_INVALID",
        f"config.json describes no model that can be built ({type(error).__name__}: "
        f"{str(error)[:300]}); {advice}",
    )
