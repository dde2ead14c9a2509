"""The models and batches that are measured."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, final

from transformers import GPT2Config, LlamaConfig, PretrainedConfig

Precision = Literal["fp32", "tf32", "bf16"]


@final
@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model and how many tokens go through it at once.

    Attributes:
        name: What `--shape` takes.
        model: What people call it.
        family: Of architectures.
        config: What differs from the family's defaults in transformers.
        rows: Sequences in the batch.
        tokens: Tokens in a sequence.
        checkpoint: Take the demo's weights where they are installed, and seeded ones elsewhere.
        graphs: Hold the gradient as a CUDA graph beside the others. Its activations then stay in
            memory for the whole run: too much beside a model that fills the device.
    """

    name: str
    model: str
    family: Literal["llama", "gpt2"]
    config: dict[str, Any] = field(default_factory=dict)
    rows: int
    tokens: int
    checkpoint: bool = False
    graphs: bool = True

    def build_config(self) -> PretrainedConfig:
        """The config in transformers' own terms, with no dropout."""
        if self.family == "llama":
            return LlamaConfig(**self.config)
        still = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
        return GPT2Config(**{**still, **self.config})

    def checkpoint_dir(self) -> Path | None:
        """The folder of the demo's checkpoint, or None where it cannot be had."""
        if not self.checkpoint:
            return None
        try:
            demo = importlib.import_module("hvp_demo.checkpoint")
            found: Path = demo.ensure_checkpoint(demo.find_gguf(), demo.cache_dir())
        except Exception:  # the SDK's own imports may be absent or of other versions here
            return None
        return found


_TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
}
_SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
}
_LLAMA_1B = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 8192,
}
_LLAMA_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 8192,
}

_ALL = (
    Shape(name="tiny", model="Two layers of 64", family="llama", config=_TINY, rows=2, tokens=32),
    Shape(
        name="smollm2-135m-1x512",
        model="SmolLM2 135M",
        family="llama",
        config=_SMOLLM2,
        rows=1,
        tokens=512,
        checkpoint=True,
    ),
    Shape(name="gpt2-124m-4x1024", model="GPT-2 124M", family="gpt2", rows=4, tokens=1024),
    *(
        Shape(
            name=f"llama-1.1b-{rows}x{tokens}",
            model="Llama 1.1B",
            family="llama",
            config=_LLAMA_1B,
            rows=rows,
            tokens=tokens,
        )
        for rows, tokens in ((1, 2048), (4, 2048), (1, 8192))
    ),
    Shape(
        name="llama-7b-1x2048",
        model="Llama 7B",
        family="llama",
        config=_LLAMA_7B,
        rows=1,
        tokens=2048,
        graphs=False,
    ),
)

SHAPES = {shape.name: shape for shape in _ALL}

#: What `make bench` measures on a machine with, and on one without, a CUDA device.
DEFAULTS: dict[str, tuple[str, ...]] = {
    "cpu": ("smollm2-135m-1x512",),
    "cuda": ("smollm2-135m-1x512", "gpt2-124m-4x1024", "llama-1.1b-1x2048", "llama-1.1b-1x8192"),
}
