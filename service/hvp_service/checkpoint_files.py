"""A checkpoint's files, checked without torch and without running anything of theirs."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hvp_service.errors import ServiceError
from hvp_service.json_bounds import JsonBounds
from hvp_service.safetensors_header import (
    MAX_TENSORS,
    Header,
    PickleError,
    SafetensorsError,
    read_header,
)

CONFIG = "config.json"
INDEX_SUFFIX = ".safetensors.index.json"
MAX_CHECKPOINT_TENSORS = 4 * MAX_TENSORS  # over all files

# The largest configs list the names of some ten thousand classes.
_CONFIG_BOUNDS = JsonBounds(
    num_bytes=4 << 20, num_objects=10_000, num_lists=100_000, num_items=400_000
)
# An index names every tensor.
_INDEX_BOUNDS = JsonBounds(
    num_bytes=64 << 20, num_objects=1000, num_lists=1000, num_items=MAX_CHECKPOINT_TENSORS + 1000
)

_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")

# Sizes in a config decide what is built before a weight is seen. Ten times what any published
# model has is generous, and building that on the meta device stays a matter of seconds.
_LARGEST = {
    "num_hidden_layers": 10_000,
    "n_layer": 10_000,
    "num_attention_heads": 100_000,
    "num_key_value_heads": 100_000,
    "hidden_size": 1 << 20,
    "n_embd": 1 << 20,
    "intermediate_size": 1 << 24,
    "vocab_size": 1 << 26,
}


def safetensors_error(error: SafetensorsError, file: str) -> ServiceError:
    """The refusal of a file that is not safetensors."""
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
    """The refusal of a pickle."""
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
        allowed = name == CONFIG or name.endswith((".safetensors", INDEX_SUFFIX))
        if not allowed or not _FILE_NAME.fullmatch(name):
            raise _files_error(
                f"{name[:200]!r} is not allowed: a checkpoint is config.json, *.safetensors and "
                "*.safetensors.index.json, without folders."
            )
    if len(set(names)) != len(names):
        raise _files_error("A file stands twice.")
    if CONFIG not in names:
        raise _files_error("There is no config.json.")
    weights = [name for name in names if name.endswith(".safetensors")]
    indices = [name for name in names if name.endswith(INDEX_SUFFIX)]
    if not weights:
        raise _files_error("There is no *.safetensors file.")
    if len(indices) > 1 or (len(weights) > 1 and not indices):
        raise _files_error(
            f"{len(weights)} safetensors files need one *.safetensors.index.json; "
            f"{len(indices)} came."
        )


def check_contents(paths: Mapping[str, Path]) -> None:
    """Check every file of a checkpoint, by name. Blocks; reads headers and JSON only.

    Raises:
        ServiceError: SAFETENSORS_INVALID, PICKLE_REFUSED, CONFIG_INVALID, REMOTE_CODE_REFUSED,
            CHECKPOINT_FILES_INVALID, TENSOR_MISSING.
    """
    _check_config(paths[CONFIG])
    headers: dict[str, Header] = {}
    for name, path in paths.items():
        if name.endswith(".safetensors"):
            try:
                headers[name] = read_header(path)
            except SafetensorsError as error:
                raise safetensors_error(error, name) from None
            except PickleError:
                raise pickle_error(name) from None
            num_tensors = sum(len(header.tensors) for header in headers.values())
            if num_tensors > MAX_CHECKPOINT_TENSORS:
                raise _files_error(
                    f"The files up to {name} hold {num_tensors} tensors; a checkpoint has at most "
                    f"{MAX_CHECKPOINT_TENSORS}."
                )
    for name, path in paths.items():
        if name.endswith(INDEX_SUFFIX):
            _check_index(name, path, headers)


def _check_config(path: Path) -> None:
    config, problem = _read_json(path, _CONFIG_BOUNDS)
    if config is None:
        raise _config_error(f"config.json {problem}.")
    for section in (config, *(value for value in config.values() if isinstance(value, dict))):
        if section.get("auto_map"):
            raise ServiceError(
                "REMOTE_CODE_REFUSED",
                "config.json has an auto_map: it asks to run code that comes with the model. Only "
                "architectures that transformers itself has are served.",
                field="files",
                metadata={"file": CONFIG},
            )
        for key, largest in _LARGEST.items():
            value = section.get(key)
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= largest
            ):
                raise _config_error(
                    f"config.json has {key} = {str(value)[:40]}, a whole number of 1 to {largest} "
                    "is possible.",
                    key,
                )
    if not isinstance(config.get("model_type"), str):
        raise _config_error("config.json does not say its model_type.", "model_type")


def _check_index(name: str, path: Path, headers: Mapping[str, Header]) -> None:
    index, problem = _read_json(path, _INDEX_BOUNDS)
    if index is None:
        raise _files_error(f"{name} {problem}.")
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(file, str) for file in weight_map.values()
    ):
        raise _files_error(f"{name} has no weight_map of tensor names to files.")
    for tensor, file in weight_map.items():
        if file not in headers:
            raise _files_error(f"{name} names the file {file[:200]!r}, which did not come.")
        if tensor not in headers[file].tensors:
            raise ServiceError(
                "TENSOR_MISSING",
                f"{name} says that {file} holds {tensor[:200]!r}, which it does not.",
                field="files",
                metadata={"tensor": tensor[:200], "file": file},
            )
    for file, header in headers.items():
        for tensor in header.tensors:
            if weight_map.get(tensor) != file:
                raise _files_error(
                    f"{file} holds {tensor[:200]!r}, which {name} does not place there."
                )


def _read_json(path: Path, bounds: JsonBounds) -> tuple[dict[str, Any] | None, str]:
    """The object in a file, or None and what is wrong with it."""
    with path.open("rb") as file:
        raw = file.read(bounds.num_bytes + 1)
    if too_much := bounds.exceeded_by(raw):
        return None, f"has {too_much}"
    try:
        loaded = json.loads(raw)
    except (ValueError, RecursionError):
        loaded = None
    return (loaded, "") if isinstance(loaded, dict) else (None, "is not a JSON object")


def _files_error(message: str) -> ServiceError:
    return ServiceError("CHECKPOINT_FILES_INVALID", message, field="files")


def _config_error(message: str, key: str = "") -> ServiceError:
    metadata = {"file": CONFIG} | ({"key": key} if key else {})
    return ServiceError("CONFIG_INVALID", message, field="files", metadata=metadata)
