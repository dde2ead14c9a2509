"""config.json, as far as it can be judged without transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hvp_folders.files import read_object, require_file
from hvp_folders.json_bounds import JsonBounds
from hvp_folders.refusal import FolderError
from hvp_folders.weights import CONFIG

# The largest configs list the names of some ten thousand classes.
_BOUNDS = JsonBounds(num_bytes=4 << 20, num_objects=10_000, num_lists=100_000, num_items=400_000)

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

# Where transformers and libraries before it say that weights are not stored as plain numbers.
_QUANTISATION = ("quantization_config", "compression_config")


def read_config(path: Path) -> dict[str, Any]:
    """Read and check a config.json.

    Args:
        path: The file, under whatever name.

    Returns:
        The object.

    Raises:
        FolderError: CONFIG_INVALID; QUANTIZATION_UNSUPPORTED; CHECKPOINT_FILES_INVALID: there is no
            such file.
    """
    require_file(path, CONFIG)
    try:
        config, problem = read_object(path, _BOUNDS)
    except OSError as error:
        raise config_invalid(f"config.json cannot be read: {error.strerror}") from None
    if config is None:
        raise config_invalid(
            f"config.json {problem}; correct it, or take the one that the model came with"
        )
    for section in sections(config):
        _check_sizes(section)
        _refuse_quantised(section)
    if not isinstance(config.get("model_type"), str):
        raise config_invalid(
            'config.json does not say its model_type; add it, for example "llama"', "model_type"
        )
    return config


def sections(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """A config and every object inside it; a model of several parts has a config for each."""
    waiting = [config]
    while waiting:
        section = waiting.pop()
        yield section
        waiting += [value for value in section.values() if isinstance(value, dict)]


def config_invalid(message: str, key: str = "") -> FolderError:
    """Make the refusal of a config.

    Args:
        message: What is wrong and what to do.
        key: The entry at fault, or "".
    """
    metadata = {"file": CONFIG} | ({"key": key} if key else {})
    return FolderError("CONFIG_INVALID", message, metadata)


def _check_sizes(section: Mapping[str, Any]) -> None:
    for key, largest in _LARGEST.items():
        value = section.get(key)
        sizes = value if isinstance(value, list) else [value]  # some have one for every layer
        if value is not None and not all(_is_size(size, largest) for size in sizes):
            raise config_invalid(
                f"config.json has {key} = {repr(value)[:40]}; possible is a whole number of 1 to "
                f"{largest}. Correct it, or take the config.json that the model came with",
                key,
            )


def _is_size(value: Any, largest: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= largest


def _refuse_quantised(section: Mapping[str, Any]) -> None:
    for key in _QUANTISATION:
        if not (settings := section.get(key)):
            continue
        scheme = _scheme(settings)
        raise FolderError(
            "QUANTIZATION_UNSUPPORTED",
            f"config.json has a {key}: the weights are stored quantised ({scheme}), and the "
            "numbers in the files are not the model's own; load the model dequantised, write it "
            f"with `save_pretrained` and upload that, or take {key} out if the weights are plain "
            "numbers",
            {"file": CONFIG, "key": key, "scheme": scheme},
        )


def _scheme(settings: Any) -> str:
    if not isinstance(settings, dict):
        return "in a scheme without a name"
    method = settings.get("quant_method") or settings.get("format")
    if method is None and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        method = "bitsandbytes"
    return str(method or "in a scheme without a name")[:40]
