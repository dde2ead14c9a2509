"""The tensors of a checkpoint folder, and which of them a model's parameters are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from hvp_folders.config import read_config
from hvp_folders.refusal import FolderError
from hvp_folders.weights import CONFIG, choose_weights
from safetensors import SafetensorError, safe_open
from torch import nn

from hvp_core.errors import CurvatureError

#: Stored dtypes that hold plain numbers.
READABLE = ("F64", "F32", "F16", "BF16")

# What libraries put into the names of tensors when they wrap a module for training.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_OUTERMOST = "module."  # of DistributedDataParallel, around everything

_COMPARED_AT_ONCE = 1 << 20  # elements; 16 MiB as float64 of both


@final
@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Where a tensor lies: its file, its name there, its shape and its stored dtype."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: str


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of the files that hold the model, as transformers chooses them.

    Args:
        directory: Folder of config.json and safetensors.

    Returns:
        The tensors by their name in the file.

    Raises:
        CurvatureError: SAFETENSORS_INVALID; CHECKPOINT_FILES_INVALID, also for a name in two files.
    """
    try:
        paths = {path.name: path for path in directory.iterdir()}
        weights = choose_weights(paths, read_config(directory / CONFIG))
    except FolderError as error:
        raise CurvatureError(error.reason, error.message, error.metadata) from None
    found: dict[str, StoredTensor] = {}
    for name in weights.tensor_files:
        file = directory / name
        try:
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118 (not a mapping)
                    part = tensors.get_slice(key)
                    tensor = StoredTensor(
                        file=file, key=key, shape=tuple(part.get_shape()), dtype=part.get_dtype()
                    )
                    _put(found, key, tensor)
        except (SafetensorError, OSError) as error:
            raise CurvatureError(
                "SAFETENSORS_INVALID", f"{file.name}: {error}", {"file": file.name}
            ) from error
    return found


def by_name_in_model(
    model: nn.Module, stored: Mapping[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """The stored tensors that are the model's, by the names that the model has for them.

    A base model's names may lack the prefix of the whole or have one too many, and names may carry
    what a training script wrapped around the model. Nothing else knows how a stored name becomes a
    parameter's.

    Args:
        model: The model, whose `state_dict()` has the names; a tied tensor has several.
        stored: The stored tensors by their name in the file.

    Returns:
        The tensors by a name of the model's `state_dict()`, without those that are not the model's.

    Raises:
        CurvatureError: CHECKPOINT_FILES_INVALID where two stored names are one name of the model.
    """
    known = model.state_dict().keys()
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    wrapped = all(key.startswith(_OUTERMOST) for key in stored)
    found: dict[str, StoredTensor] = {}
    for key, tensor in stored.items():
        plain = key.removeprefix(_OUTERMOST) if wrapped else key
        plain = ".".join(part for part in plain.split(".") if part not in _WRAPPERS)
        for name in (plain, prefix + plain, plain.removeprefix(prefix)):
            if name in known:
                _put(found, name, tensor)
                break
    return found


def is_of_transformers(model: nn.Module) -> bool:
    """Whether transformers made a model of its config; else an installed package did."""
    return hasattr(getattr(model, "config", None), "get_text_config")


def writer(model: nn.Module) -> str:
    """The function that writes the weights of such a model as they are read."""
    return "save_pretrained" if is_of_transformers(model) else "safetensors.torch.save_model"


def _put(found: dict[str, StoredTensor], name: str, tensor: StoredTensor) -> None:
    """Enter a tensor under a name.

    Raises:
        CurvatureError: CHECKPOINT_FILES_INVALID: there is one of this name already, and nobody can
            tell which one is meant.
    """
    if name in found:
        first = found[name]
        raise CurvatureError(
            "CHECKPOINT_FILES_INVALID",
            f"{name} is stored twice, as {first.key} in {first.file.name} and as {tensor.key} in "
            f"{tensor.file.name}; leave one, or write the model anew",
            {"tensor": name, "path": tensor.file.name},
        )
    found[name] = tensor


def same_values(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two stored tensors hold the same numbers, whatever their dtypes.

    Cost: reads both, a few rows at a time, up to the first difference.
    """
    if one.shape != other.shape or {one.dtype, other.dtype} - set(READABLE):
        return False
    rows = one.shape[0] if one.shape else 1
    step = max(1, _COMPARED_AT_ONCE // max(1, math.prod(one.shape[1:])))
    with (
        safe_open(one.file, framework="pt") as left,
        safe_open(other.file, framework="pt") as right,
    ):
        pair = left.get_slice(one.key), right.get_slice(other.key)
        for start in range(0, rows, step):
            place = slice(start, start + step) if one.shape else ...
            x, y = (tensor[place].double() for tensor in pair)
            if not torch.equal(x, y):
                return False
    return True
