"""A folder of config.json and safetensors as a model without weights, and its weights as shards.

The model is built on the meta device and each rank reads only its own stretches of the files, so no
process ever holds the whole of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, final

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights

from hvp_core import attention
from hvp_core.chain import canonical_names
from hvp_core.errors import CurvatureError
from hvp_core.space import Space

#: Stored dtypes that hold plain numbers.
READABLE = ("F64", "F32", "F16", "BF16")


@final
@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Where a tensor lies."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: str


def read_config(directory: Path) -> dict[str, Any]:
    """config.json as a dictionary.

    Raises:
        CurvatureError: CONFIG_INVALID, REMOTE_CODE_REFUSED, ARCHITECTURE_UNKNOWN.
    """
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CurvatureError("CONFIG_INVALID", f"config.json cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise CurvatureError("CONFIG_INVALID", "config.json is not a JSON object")
    if "auto_map" in config:
        raise CurvatureError(
            "REMOTE_CODE_REFUSED",
            "config.json has auto_map: the model wants to run code of its own (trust_remote_code), "
            "which is never done; use an architecture that transformers has built in",
        )
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise CurvatureError(
            "ARCHITECTURE_UNKNOWN",
            f"model_type {kind!r} is not one that transformers knows; see config.json",
            {"model_type": str(kind)},
        )
    return config


def build_empty(directory: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model with its parameters on the meta device, its buffers real, in eval mode.

    Raises:
        CurvatureError: As read_config, and CONFIG_INVALID, ARCHITECTURE_UNKNOWN when no causal
            language model can be made of it.
    """
    attention.register()
    read_config(directory)
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        try:
            model = _from_config(config, dtype, attention.NAME)
        except KeyError:  # classes that look their attention up in a table of their own
            model = _from_config(config, dtype, "eager")
    except ValueError as error:
        reason = (
            "ARCHITECTURE_UNKNOWN"
            if "Unrecognized configuration class" in str(error)
            else "CONFIG_INVALID"
        )
        raise CurvatureError(
            reason, f"config.json describes no causal language model: {str(error)[:300]}"
        ) from error
    except Exception as error:  # a library of thousands of configs fails in every way there is
        raise CurvatureError(
            "CONFIG_INVALID",
            f"config.json describes no model that can be built ({type(error).__name__}: "
            f"{str(error)[:300]})",
        ) from error
    model.tie_weights()  # replacing the parameters one by one has undone it
    return model.eval().requires_grad_(False)


def _from_config(config: PreTrainedConfig, dtype: torch.dtype, attn: str) -> PreTrainedModel:
    with no_init_weights(), init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(
            config, trust_remote_code=False, dtype=dtype, attn_implementation=attn
        )


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of the folder's safetensors files.

    Raises:
        CurvatureError: SAFETENSORS_INVALID.
    """
    found: dict[str, StoredTensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118 (not a mapping)
                    part = tensors.get_slice(key)
                    found[key] = StoredTensor(
                        file=file, key=key, shape=tuple(part.get_shape()), dtype=part.get_dtype()
                    )
        except (SafetensorError, OSError) as error:
            raise CurvatureError(
                "SAFETENSORS_INVALID", f"{file.name}: {error}", {"file": file.name}
            ) from error
    return found


def locate(model: PreTrainedModel, directory: Path) -> dict[str, StoredTensor]:
    """The stored tensor of each parameter and each persistent buffer, by canonical name.

    A tied parameter may be stored under any of its names, and a base model's names may lack the
    prefix of the whole.

    Raises:
        CurvatureError: TENSOR_MISSING, TENSOR_SHAPE_MISMATCH, DTYPE_UNSUPPORTED, naming the tensor.
    """
    stored = stored_tensors(directory)
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    aliases: dict[str, list[str]] = {}
    for name, canonical in canonical_names(model).items():
        aliases.setdefault(canonical, []).append(name)
    found = {}
    wanted = {**dict(model.named_parameters()), **_persistent_buffers(model)}
    for canonical, parameter in wanted.items():
        names = aliases.get(canonical, [canonical])
        names = names + [name.removeprefix(prefix) for name in names]
        tensor = next((stored[name] for name in names if name in stored), None)
        if tensor is None:
            raise CurvatureError(
                "TENSOR_MISSING",
                f"{canonical} is in no safetensors file; upload every shard of the checkpoint "
                "(tensors that transformers renames or fuses as it loads are not found yet)",
                {"tensor": canonical},
            )
        if tensor.shape != tuple(parameter.shape):
            raise CurvatureError(
                "TENSOR_SHAPE_MISMATCH",
                f"{canonical} is stored as {tensor.shape} and config.json makes it "
                f"{tuple(parameter.shape)}",
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


def _persistent_buffers(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Tensors that are part of a checkpoint and not parameters."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in parameters}


def fill_buffers(model: PreTrainedModel, sources: Mapping[str, StoredTensor]) -> None:
    """Read the model's persistent buffers from the checkpoint, in place."""
    for name, buffer in _persistent_buffers(model).items():
        source = sources[name]
        with safe_open(source.file, framework="pt") as tensors:
            buffer.copy_(tensors.get_tensor(source.key))


def load_shard(space: Space, sources: Mapping[str, StoredTensor]) -> torch.Tensor:
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
