"""Which files of a folder are a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hvp_client import InvalidArgumentError
from hvp_client._checkpoints import find_checkpoint_files


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).write_bytes(b"x")
    return folder


def names(folder: Path) -> list[str]:
    return [path.name for path in find_checkpoint_files(folder)]


def test_config_and_weights_are_taken_and_nothing_else(tmp_path: Path) -> None:
    touch(tmp_path, "config.json", "model.safetensors", "tokenizer.json", "old.bin", "README.md")
    assert names(tmp_path) == ["config.json", "model.safetensors"]


def test_with_an_index_only_its_files_are_taken(tmp_path: Path) -> None:
    touch(tmp_path, "config.json", "a-1.safetensors", "a-2.safetensors", "copy.safetensors")
    weight_map = {"u": "a-2.safetensors", "v": "a-1.safetensors", "w": "a-2.safetensors"}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert names(tmp_path) == ["config.json", index.name, "a-1.safetensors", "a-2.safetensors"]


@pytest.mark.parametrize("pickle_name", ["pytorch_model.bin", "model.pt", "weights.pkl"])
def test_pickle_files_are_refused_with_the_way_out(tmp_path: Path, pickle_name: str) -> None:
    touch(tmp_path, "config.json", pickle_name)
    with pytest.raises(InvalidArgumentError, match="safe_serialization") as caught:
        find_checkpoint_files(tmp_path)
    assert caught.value.reason == "PICKLE_REFUSED"
    assert caught.value.field == "directory"
    assert caught.value.metadata == {"path": pickle_name}


@pytest.mark.parametrize(
    ("present", "said"),
    [
        ((), "no \\*.safetensors"),
        (("config.json",), "no \\*.safetensors"),
        (("model.safetensors",), "no config.json"),
    ],
)
def test_an_incomplete_folder_is_refused(
    tmp_path: Path, present: tuple[str, ...], said: str
) -> None:
    touch(tmp_path, *present)
    with pytest.raises(InvalidArgumentError, match=said) as caught:
        find_checkpoint_files(tmp_path)
    assert caught.value.reason == "CHECKPOINT_FILES_INVALID"


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="not a folder"):
        find_checkpoint_files(tmp_path / "nothing")


@pytest.mark.parametrize(
    "index",
    [
        "not json",
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {"u": "../secret.safetensors"}}',
        '{"weight_map": {"u": 3}}',
        '{"weight_map": {"u": "absent.safetensors"}}',
    ],
)
def test_an_index_that_misleads_is_refused(tmp_path: Path, index: str) -> None:
    touch(tmp_path, "config.json", "model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(InvalidArgumentError) as caught:
        find_checkpoint_files(tmp_path)
    assert caught.value.reason == "CHECKPOINT_FILES_INVALID"
