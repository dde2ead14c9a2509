"""A checkpoint's files, checked without torch and without running anything of theirs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from hvp_folders.config import read_config
from hvp_folders.refusal import FolderError
from hvp_folders.weights import (
    CONFIG,
    INDEX_SUFFIX,
    MAX_CHECKPOINT_TENSORS,
    WEIGHTS_SUFFIX,
    Weights,
    choose_weights,
)
from hvp_operations.wording import shown

from hvp_service.calls.errors import ServiceError
from hvp_service.storage.safetensors_header import PickleError, SafetensorsError, read_header

_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


def safetensors_error(error: SafetensorsError, file: str) -> ServiceError:
    """Make the refusal of a file that is not safetensors."""
    metadata = {"file": file, "byte_offset": str(error.byte_offset)}
    if error.field:
        metadata["field"] = error.field
    return ServiceError(
        "SAFETENSORS_INVALID",
        f"{file} is not a safetensors file: {error.message} (byte {error.byte_offset}).",
        field="files",
        metadata=metadata,
    )


def pickle_error(file: str) -> ServiceError:
    """Make the refusal of a pickle."""
    return ServiceError(
        "PICKLE_REFUSED",
        f"{file} is a pickle, which could run code when read; convert it to safetensors.",
        field="files",
        metadata={"file": file},
    )


def check_names(names: list[str]) -> None:
    """Refuse a set of files that cannot be a checkpoint, by name alone.

    Raises:
        ServiceError: CHECKPOINT_FILES_INVALID, PICKLE_REFUSED.
    """
    for name in names:
        if name.endswith(_PICKLE_SUFFIXES):
            raise pickle_error(name[:200])
        allowed = name == CONFIG or name.endswith((WEIGHTS_SUFFIX, INDEX_SUFFIX))
        if not allowed or not _FILE_NAME.fullmatch(name):
            raise _files_error(
                f"{shown(name)} is not allowed: a checkpoint is config.json, *.safetensors and "
                "*.safetensors.index.json, without folders."
            )
    if len(set(names)) != len(names):
        raise _files_error("A file stands twice; send each once.")
    if CONFIG not in names:
        raise _files_error("There is no config.json; add the one that the model came with.")


def choose_files(paths: Mapping[str, Path]) -> Weights:
    """Choose the files that hold the model's weights. Blocks; reads config and index.

    Args:
        paths: Every uploaded file, by name.

    Raises:
        ServiceError: CHECKPOINT_FILES_INVALID, CONFIG_INVALID, QUANTIZATION_UNSUPPORTED.
    """
    try:
        return choose_weights(paths, read_config(paths[CONFIG]))
    except FolderError as error:
        raise ServiceError(
            error.reason, error.message, field="files", metadata=error.metadata
        ) from None


def check_contents(paths: Mapping[str, Path]) -> None:
    """Check every safetensors file of a checkpoint, by name. Blocks; reads headers only.

    Raises:
        ServiceError: SAFETENSORS_INVALID, PICKLE_REFUSED, CHECKPOINT_FILES_INVALID.
    """
    num_tensors = 0
    for name, path in paths.items():
        if not name.endswith(WEIGHTS_SUFFIX):
            continue
        try:
            num_tensors += len(read_header(path).tensors)
        except SafetensorsError as error:
            raise safetensors_error(error, name) from None
        except PickleError:
            raise pickle_error(name) from None
        if num_tensors > MAX_CHECKPOINT_TENSORS:
            raise _files_error(
                f"The files up to {name} hold {num_tensors} tensors; a checkpoint has at most "
                f"{MAX_CHECKPOINT_TENSORS}."
            )


def _files_error(message: str) -> ServiceError:
    return ServiceError("CHECKPOINT_FILES_INVALID", message, field="files")
