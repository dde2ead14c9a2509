"""Which files of a folder are a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hvp_client import InvalidArgumentError
from hvp_client._folders import open_folder

CONFIG = json.dumps({"model_type": "llama"})
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).write_text(CONFIG if name == "config.json" else "x")
    return folder


def write_index(folder: Path, *shards: str, name: str = INDEX) -> None:
    weight_map = {f"t{number}": shard for number, shard in enumerate(shards)}
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def names(folder: Path) -> list[str]:
    return [path.name for path in open_folder(folder).files]


def refusal(folder: Path) -> InvalidArgumentError:
    with pytest.raises(InvalidArgumentError) as caught:
        open_folder(folder)
    assert caught.value.field == "directory"
    return caught.value


def test_config_and_weights_are_taken_and_nothing_else(tmp_path: Path) -> None:
    touch(tmp_path, "config.json", WHOLE, "tokenizer.json", "old.bin", "README.md")
    assert names(tmp_path) == ["config.json", WHOLE]
    assert open_folder(tmp_path).ignored == ()


def test_with_an_index_only_its_files_are_taken(tmp_path: Path) -> None:
    touch(tmp_path, "config.json", "a-1.safetensors", "a-2.safetensors", "copy.safetensors")
    write_index(tmp_path, "a-2.safetensors", "a-1.safetensors", "a-2.safetensors")
    assert names(tmp_path) == ["config.json", INDEX, "a-1.safetensors", "a-2.safetensors"]
    assert open_folder(tmp_path).ignored == ("copy.safetensors",)


@pytest.mark.parametrize(
    "beside",
    [
        ("a-1.safetensors", INDEX),
        ("consolidated.safetensors", "consolidated.safetensors.index.json"),
        ("adapter_model.safetensors",),
        ("._model.safetensors", "._model.safetensors.index.json"),
        ("model.fp16.safetensors", "zz.safetensors"),
    ],
    ids=", ".join,
)
def test_a_whole_model_counts_before_all_else_which_is_named(
    tmp_path: Path, beside: tuple[str, ...]
) -> None:
    touch(tmp_path, "config.json", WHOLE, *beside)
    assert names(tmp_path) == ["config.json", WHOLE]
    assert open_folder(tmp_path).ignored == tuple(sorted(beside))


def test_a_stale_index_and_its_shards_are_left_out(tmp_path: Path) -> None:
    touch(tmp_path, "config.json", WHOLE, "a-1.safetensors", "a-2.safetensors")
    write_index(tmp_path, "a-1.safetensors", "a-2.safetensors")
    assert names(tmp_path) == ["config.json", WHOLE]
    assert open_folder(tmp_path).ignored == ("a-1.safetensors", "a-2.safetensors", INDEX)


@pytest.mark.parametrize("only", ["weights.safetensors", "model.fp16.safetensors"])
def test_a_single_file_of_another_name_is_taken(tmp_path: Path, only: str) -> None:
    touch(tmp_path, "config.json", only, "adapter_model.safetensors", f"._{only}")
    assert names(tmp_path) == ["config.json", only]


def test_a_single_index_of_another_name_is_taken(tmp_path: Path) -> None:
    touch(tmp_path, "config.json", "a-1.safetensors", "b.safetensors")
    write_index(tmp_path, "a-1.safetensors", name="model.fp16.safetensors.index.json")
    assert names(tmp_path)[1:] == ["model.fp16.safetensors.index.json", "a-1.safetensors"]
    assert open_folder(tmp_path).ignored == ("b.safetensors",)


def test_two_files_of_which_neither_is_the_model_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "config.json", "a.safetensors", "b.safetensors")
    error = refusal(tmp_path)
    assert error.reason == "CHECKPOINT_FILES_INVALID"
    assert "a.safetensors, b.safetensors" in error.message


@pytest.mark.parametrize(
    ("only", "said"),
    [("adapter_model.safetensors", "merge_and_unload"), ("consolidated.safetensors", "Mistral")],
)
def test_weights_of_another_library_are_refused_with_the_way_out(
    tmp_path: Path, only: str, said: str
) -> None:
    error = refusal(touch(tmp_path, only))
    assert error.reason == "CHECKPOINT_FILES_INVALID"
    assert said in error.message


@pytest.mark.parametrize("pickle_name", ["pytorch_model.bin", "model.pt", "weights.pkl"])
def test_pickle_files_are_refused_with_the_way_out(tmp_path: Path, pickle_name: str) -> None:
    error = refusal(touch(tmp_path, "config.json", pickle_name))
    assert error.reason == "PICKLE_REFUSED"
    assert "safe_serialization" in error.message
    assert error.metadata == {"path": pickle_name}


@pytest.mark.parametrize(
    ("present", "said"),
    [
        ((), "no *.safetensors"),
        (("config.json",), "no *.safetensors"),
        ((WHOLE,), "no config.json"),
    ],
)
def test_an_incomplete_folder_is_refused(
    tmp_path: Path, present: tuple[str, ...], said: str
) -> None:
    error = refusal(touch(tmp_path, *present))
    assert error.reason == "CHECKPOINT_FILES_INVALID"
    assert said in error.message


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    assert "not a folder" in refusal(tmp_path / "nothing").message


@pytest.mark.parametrize(
    "index",
    [
        "not json",
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {"u": "../secret.safetensors"}}',
        '{"weight_map": {"u": "config.json"}}',
        '{"weight_map": {"u": 3}}',
        '{"weight_map": {"u": "absent.safetensors"}}',
    ],
)
def test_an_index_that_misleads_is_refused(tmp_path: Path, index: str) -> None:
    touch(tmp_path, "config.json", "a.safetensors")
    (tmp_path / INDEX).write_text(index)
    assert refusal(tmp_path).reason == "CHECKPOINT_FILES_INVALID"


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ("[]", "CONFIG_INVALID"),
        ("{", "CONFIG_INVALID"),
        ('{"model_type": 3}', "CONFIG_INVALID"),
        ('{"model_type": "llama", "vocab_size": -1}', "CONFIG_INVALID"),
        ('{"model_type": "llama", "intermediate_size": [8, 0]}', "CONFIG_INVALID"),
        ('{"model_type": "llama", "text_config": {"n_embd": true}}', "CONFIG_INVALID"),
        (
            '{"model_type": "llama", "quantization_config": {"quant_method": "awq"}}',
            "QUANTIZATION_UNSUPPORTED",
        ),
    ],
)
def test_a_config_that_cannot_be_served_is_refused_before_anything_is_sent(
    tmp_path: Path, config: str, reason: str
) -> None:
    (touch(tmp_path, WHOLE) / "config.json").write_text(config)
    assert refusal(tmp_path).reason == reason


def test_a_config_may_have_one_size_for_every_layer(tmp_path: Path) -> None:
    """Gemma 3n and OpenELM."""
    config = {"model_type": "gemma3n_text", "intermediate_size": [8, 16]}
    (touch(tmp_path, WHOLE) / "config.json").write_text(json.dumps(config))
    assert names(tmp_path) == ["config.json", WHOLE]


# Caches of Hugging Face -------------------------------------------------------------------------


def make_cache(folder: Path, *commits: str, main: str | None = None) -> Path:
    """`models--org--name` as huggingface_hub lays it out: links into blobs/."""
    cache = folder / "models--org--name"
    (cache / "blobs").mkdir(parents=True)
    contents: dict[str, Any] = {"c0ffee": CONFIG, "beef": "x"}
    for blob, text in contents.items():
        (cache / "blobs" / blob).write_text(text)
    for commit in commits:
        snapshot = cache / "snapshots" / commit
        snapshot.mkdir(parents=True)
        for name, blob in (("config.json", "c0ffee"), (WHOLE, "beef")):
            (snapshot / name).symlink_to(f"../../blobs/{blob}")
    if main is not None:
        (cache / "refs").mkdir()
        (cache / "refs" / "main").write_text(main)
    return cache


def test_a_snapshots_links_are_followed(tmp_path: Path) -> None:
    assert names(make_cache(tmp_path, "1a") / "snapshots" / "1a") == ["config.json", WHOLE]


@pytest.mark.parametrize(
    ("commits", "main", "taken"), [(["1a"], None, "1a"), (["1a", "2b", "3c"], "2b", "2b")]
)
def test_a_models_folder_of_a_cache_stands_for_its_current_snapshot(
    tmp_path: Path, commits: list[str], main: str | None, taken: str
) -> None:
    folder = open_folder(make_cache(tmp_path, *commits, main=main))
    assert {path.parent.name for path in folder.files} == {taken}


@pytest.mark.parametrize(
    ("commits", "main", "said"),
    [(["1a", "2b"], None, "2 snapshots"), (["1a"], "9f", "'9f'")],
)
def test_a_cache_that_does_not_say_which_snapshot_is_refused(
    tmp_path: Path, commits: list[str], main: str | None, said: str
) -> None:
    error = refusal(make_cache(tmp_path, *commits, main=main))
    assert error.reason == "CHECKPOINT_FILES_INVALID"
    assert said in error.message


@pytest.mark.parametrize("blob", ["c0ffee", "beef"])
def test_a_link_to_a_blob_that_is_not_there_is_refused_with_the_blob(
    tmp_path: Path, blob: str
) -> None:
    cache = make_cache(tmp_path, "1a")
    (cache / "blobs" / blob).unlink()
    error = refusal(cache)
    assert error.reason == "CHECKPOINT_FILES_INVALID"
    assert f"../../blobs/{blob}" in error.message


def test_a_shard_that_is_not_there_is_refused_with_its_blob(tmp_path: Path) -> None:
    touch(tmp_path, "config.json", "a-1.safetensors")
    write_index(tmp_path, "a-1.safetensors", "a-2.safetensors")
    (tmp_path / "a-2.safetensors").symlink_to("../../blobs/feed")
    error = refusal(tmp_path)
    assert "../../blobs/feed" in error.message
    assert error.metadata == {"path": "a-2.safetensors"}
