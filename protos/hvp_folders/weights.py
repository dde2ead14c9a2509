"""Which files of a folder hold the model's weights: the rule of transformers' `from_pretrained`.

`model.safetensors` if it is there, else the shards that `model.safetensors.index.json` names.
Whatever else looks like weights (shards of an older save, Mistral's `consolidated.safetensors`, an
adapter, what macOS leaves beside each file) is left out, and named. Where neither is there, one
other index or one other safetensors file is taken, because nothing else could be meant; two are
refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from hvp_folders.files import read_object, require_file
from hvp_folders.json_bounds import JsonBounds
from hvp_folders.refusal import FolderError, files_invalid

CONFIG = "config.json"
WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
WEIGHTS_SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"

MAX_CHECKPOINT_TENSORS = 400_000  # over all files
# An index names every tensor.
_INDEX_BOUNDS = JsonBounds(
    num_bytes=64 << 20, num_objects=1000, num_lists=1000, num_items=MAX_CHECKPOINT_TENSORS + 1000
)

# Weights that are no model of transformers', and what they are.
_FOREIGN = {
    re.compile(r"adapter_model\b.*"): (
        "an adapter and not a model; merge it into its base model (peft's `merge_and_unload`), "
        "save that and give its folder"
    ),
    re.compile(r"consolidated\b.*"): (
        "in Mistral's own layout, which transformers does not read; give the folder with "
        "model.safetensors, or with the shards and their index, of the same model"
    ),
}


@final
@dataclass(frozen=True, kw_only=True)
class Weights:
    """The files of a folder, sorted by the rule.

    Attributes:
        files: Names of the files that hold the weights; the index first where there is one.
        ignored: Names of files that look like weights and are no part of the model.
    """

    files: tuple[str, ...]
    ignored: tuple[str, ...]

    @property
    def tensor_files(self) -> tuple[str, ...]:
        """The safetensors files among `files`."""
        return tuple(name for name in self.files if name.endswith(WEIGHTS_SUFFIX))


def choose_weights(paths: Mapping[str, Path], config: Mapping[str, Any] | None) -> Weights:
    """Choose the files that hold a model's weights. Blocks; reads the index alone.

    Args:
        paths: Every file of the folder by name; others than weights may be among them.
        config: config.json, whose `transformers_weights` may name the file; None without one.

    Returns:
        The names.

    Raises:
        FolderError: CHECKPOINT_FILES_INVALID.
    """
    looks = sorted(name for name in paths if name.endswith((WEIGHTS_SUFFIX, INDEX_SUFFIX)))
    first = _first(looks, config)
    require_file(paths[first], first)
    shards = _shards(paths, first) if first.endswith(INDEX_SUFFIX) else []
    files = (first, *shards)
    return Weights(files=files, ignored=tuple(name for name in looks if name not in files))


def _first(looks: list[str], config: Mapping[str, Any] | None) -> str:
    """Name of the file of the whole model, or of the index of its shards."""
    if (told := (config or {}).get("transformers_weights")) is not None:
        if told not in looks:
            raise files_invalid(
                f"config.json says that the weights are in {str(told)[:200]!r} "
                "(transformers_weights), which is no safetensors file or index of this folder; add "
                "it, or take the entry out"
            )
        return str(told)
    for name in (WHOLE, INDEX):
        if name in looks:
            return name
    candidates = [name for name in looks if not name.startswith(".") and not _foreign(name)]
    indexes = [name for name in candidates if name.endswith(INDEX_SUFFIX)]
    candidates = indexes or candidates
    if not candidates:
        raise _no_weights(looks)
    if len(candidates) > 1:
        raise files_invalid(
            f"{len(candidates)} files could be the model's weights ({', '.join(candidates[:3])}) "
            f"and neither {WHOLE} nor {INDEX} says which are; leave one, or write the model with "
            "`save_pretrained`",
            candidates[1],
        )
    return candidates[0]


def _foreign(name: str) -> str:
    """Description of a file that another library has written; "" of any other file."""
    return next((what for pattern, what in _FOREIGN.items() if pattern.fullmatch(name)), "")


def _no_weights(looks: list[str]) -> FolderError:
    for name in looks:
        if what := _foreign(name):
            return files_invalid(f"{name} is {what}", name)
    return files_invalid("There is no *.safetensors file; give the folder that holds the weights")


def _shards(paths: Mapping[str, Path], index: str) -> list[str]:
    loaded, problem = read_object(paths[index], _INDEX_BOUNDS)
    if loaded is None:
        raise files_invalid(f"{index} {problem}; write it again with `save_pretrained`", index)
    weight_map = loaded.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise files_invalid(
            f"{index} is not a safetensors index, a JSON object with a weight_map of file names; "
            "write it again with `save_pretrained`",
            index,
        )
    for name in weight_map.values():
        # A name with a folder in it would reach for files outside of the checkpoint.
        if (
            not isinstance(name, str)
            or name != Path(name).name
            or not name.endswith(WEIGHTS_SUFFIX)
        ):
            raise files_invalid(
                f"{index} names {str(name)[:200]!r}, which is not the name of a safetensors file",
                index,
            )
    shards = sorted(set(weight_map.values()))
    for name in shards:
        if name not in paths:
            raise files_invalid(
                f"{index} names {name[:200]}, which is not there; add every shard of the model",
                name,
            )
        require_file(paths[name], name)
    return shards
