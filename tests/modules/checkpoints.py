"""Checkpoints of tiny models that are no language models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForSequenceClassification

from tests.core.problems import scatter

SMALL: dict[str, Any] = {
    "hidden_size": 4,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 6,
    "vocab_size": 11,
    "max_position_embeddings": 10,
    "pad_token_id": 0,
}
ROWS = {
    "x": torch.cos(torch.arange(20, dtype=torch.float64)).view(5, 4),
    "scale": torch.arange(1, 6, dtype=torch.float64) / 3,
    "y": torch.tensor([0, 1, 2, 1, 0]),
}


def classifier(folder: Path, kind: str, **settings: Any) -> nn.Module:
    """A tiny classifier and its folder."""
    config = CONFIG_MAPPING[kind](**SMALL, **settings)
    model: nn.Module = AutoModelForSequenceClassification.from_config(
        config, dtype=torch.float64, attn_implementation="eager"
    ).eval()
    scatter(model)
    model.save_pretrained(folder, save_original_format=False)  # type: ignore[operator]
    return model


def module_checkpoint(folder: Path, kind: str, module: nn.Module, **config: Any) -> nn.Module:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": kind, **config}))
    module = module.double().eval()
    scatter(module)
    for buffer in module.buffers():
        buffer.fill_(0.3)
    tensors = {name: each.clone() for name, each in module.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")
    return module
