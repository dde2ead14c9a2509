"""The weights of a model: found in the files of its folder, and read as shards.

Each rank reads only its own stretches of the files, so no process ever holds the whole of a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from hvp_core.errors import CurvatureError
from hvp_core.model.chain import canonical_names
from hvp_core.model.stored_tensors import (
    READABLE,
    StoredTensor,
    by_name_in_model,
    is_of_transformers,
    same_values,
    stored_tensors,
    writer,
)
from hvp_core.vectors.space import ParameterSpace


def locate(model: nn.Module, directory: Path) -> dict[str, StoredTensor]:
    """The stored tensor of each parameter and each persistent buffer, by canonical name.

    A tied parameter may be stored under any of its names.

    Raises:
        CurvatureError: TENSOR_MISSING, TENSOR_SHAPE_MISMATCH, DTYPE_UNSUPPORTED, naming the tensor;
            CHECKPOINT_FILES_INVALID where one parameter is stored as two that differ; and as
            stored_tensors.
    """
    stored = by_name_in_model(model, stored_tensors(directory))
    aliases: dict[str, list[str]] = {}
    for name, canonical in canonical_names(model).items():
        aliases.setdefault(canonical, []).append(name)
    found = {}
    wanted = {**dict(model.named_parameters()), **_persistent_buffers(model)}
    for canonical, parameter in wanted.items():
        names = [name for name in aliases.get(canonical, [canonical]) if name in stored]
        _refuse_different(model, {name: stored[name] for name in names})
        tensor = stored[names[0]] if names else None
        if tensor is None:
            raise CurvatureError(
                "TENSOR_MISSING",
                f"{canonical} is in none of the files{_how_to_store(model)}",
                {"tensor": canonical},
            )
        if tensor.shape != tuple(parameter.shape):
            raise CurvatureError(
                "TENSOR_SHAPE_MISMATCH",
                f"{canonical} is stored as {tensor.shape} and config.json makes it "
                f"{tuple(parameter.shape)}; {_what_to_set(model, tensor, parameter)}",
                {"tensor": canonical},
            )
        if parameter.is_floating_point() and tensor.dtype not in READABLE:
            raise CurvatureError(
                "DTYPE_UNSUPPORTED",
                f"{canonical} is stored as {tensor.dtype}; convert it to one of "
                + ", ".join(READABLE),
                {"tensor": canonical},
            )
        found[canonical] = tensor
    return found


def _refuse_different(model: nn.Module, same: Mapping[str, StoredTensor]) -> None:
    """Refuse tensors that are one parameter of the model and two in the files."""
    ties: Mapping[str, str] = getattr(model, "all_tied_weights_keys", {})
    compared = ties.items()  # when the model was built
    for one, other in pairwise(same):
        known = (one, other) in compared or (other, one) in compared
        if not known and not same_values(same[one], same[other]):
            raise CurvatureError(
                "CHECKPOINT_FILES_INVALID",
                f"{one} and {other} are one parameter of the model and differ in the files; leave "
                f"the right one, or write the model with {writer(model)}",
                {"tensor": other, "path": same[other].file.name},
            )


def _how_to_store(model: nn.Module) -> str:
    """Advice where a tensor is missing."""
    if not is_of_transformers(model):
        return (
            f"; store it under this name, as {writer(model)} writes it, or correct config.json if "
            "the module is to have no such parameter"
        )
    return (
        " that transformers would read; add the shard that holds it, or set tie_word_embeddings "
        "in config.json if it is the head and equals the embedding (tensors that transformers "
        "renames or fuses as it loads are not found yet)"
    )


def _what_to_set(model: nn.Module, tensor: StoredTensor, parameter: torch.Tensor) -> str:
    """Advice where a shape is not the config's; a vocabulary is often padded when it is stored."""
    if not is_of_transformers(model):
        called = type(model).__name__
        return f"correct the sizes in config.json, or store the weights of this {called}"
    config: Any = model.config
    vocabulary = config.get_text_config().vocab_size
    rows, width = tensor.shape[:1], tensor.shape[1:]
    if tuple(parameter.shape) == (vocabulary, *width) and rows:
        return f"set vocab_size in config.json to {rows[0]}, the rows that are stored"
    return "take the config.json that the model came with"


def _persistent_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Tensors that are part of a checkpoint and not parameters."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in parameters}


def fill_buffers(model: nn.Module, sources: Mapping[str, StoredTensor]) -> None:
    """Read the model's persistent buffers from the checkpoint, in place."""
    for name, buffer in _persistent_buffers(model).items():
        source = sources[name]
        with safe_open(source.file, framework="pt") as tensors:
            buffer.copy_(tensors.get_tensor(source.key))


def load_shard(space: ParameterSpace, sources: Mapping[str, StoredTensor]) -> torch.Tensor:
    """This rank's shard of θ, read straight from the files."""
    shard = space.zeros()
    with ExitStack() as stack:

        @cache
        def opened(file: Path) -> Any:
            return stack.enter_context(safe_open(file, framework="pt"))

        for run in space.layout.runs(space.collective.rank):
            for parameter in space.layout.parameters:
                start = max(run.flat_start, parameter.offset)
                stop = min(run.flat_stop, parameter.offset + parameter.numel)
                if start >= stop:
                    continue
                source = sources[parameter.name]
                values = _stretch(
                    opened(source.file).get_slice(source.key),
                    source.shape,
                    start - parameter.offset,
                    stop - parameter.offset,
                )
                place = run.shard_offset + start - run.flat_start
                shard[place : place + stop - start] = values
    return shard


def _stretch(tensor: Any, shape: tuple[int, ...], start: int, stop: int) -> torch.Tensor:
    """Elements [start, stop) of a stored tensor's flat order, reading whole rows only."""
    if not shape:
        values: torch.Tensor = tensor[...]
        return values.reshape(-1)[start:stop]
    width = 1
    for size in shape[1:]:
        width *= size
    first, last = start // width, -(-stop // width)
    part: torch.Tensor = tensor[first:last]
    return part.reshape(-1)[start - first * width : stop - first * width]
