"""Checkpoints from files: what is read, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hvp_core.curvature.curvature import Curvature
from hvp_core.errors import CurvatureError
from hvp_core.model.agreement import disagreement
from hvp_core.model.chain import MicroBatch
from hvp_core.model.data import token_batch
from hvp_core.model.huggingface import attention
from hvp_core.model.huggingface.checkpoint import build_empty
from hvp_core.model.huggingface.families import CausalLanguageModels
from hvp_core.model.huggingface.layered import LayeredChain
from hvp_core.model.loading import load_shard, locate
from hvp_core.sharding.collective import Alone
from hvp_core.sharding.layout import Layout
from hvp_core.vectors.space import ParameterSpace
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from tests.core.problems import CPU, gpt2_config, llama_config, ragged_tokens, scatter


def save(model: PreTrainedModel, folder: Path, **changes: Any) -> Path:
    """Write a model as config.json and model.safetensors."""
    folder.mkdir(exist_ok=True)
    save_file(
        {name: p.detach().contiguous() for name, p in model.named_parameters()},
        folder / "model.safetensors",
    )
    config = {**model.config.to_dict(), **changes}
    config.pop("_attn_implementation", None)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def tiny_llama() -> PreTrainedModel:
    attention.register()
    model = LlamaForCausalLM(llama_config())
    scatter(model)
    return model


def load(
    folder: Path, dtype: torch.dtype = torch.float64
) -> tuple[LayeredChain, ParameterSpace, torch.Tensor]:
    model = build_empty(folder, dtype)
    chain = LayeredChain(model, dtype, CPU)
    layout = Layout(chain.shapes, [block.parameters for block in chain.blocks], 1)
    space = ParameterSpace(layout, Alone(), dtype, CPU)
    parameters = load_shard(space, locate(model, folder))
    family = CausalLanguageModels()
    facts = family.facts(model, folder)

    def loss(batch: MicroBatch) -> float:
        return Curvature(chain, space, parameters, batch, 1).loss()

    assert disagreement(family, facts, model, chain, space, parameters, loss) is None
    return chain, space, parameters


@pytest.mark.parametrize(
    "make",
    [
        lambda: LlamaForCausalLM(llama_config()),
        lambda: LlamaForCausalLM(
            LlamaConfig(**{**llama_config().to_dict(), "tie_word_embeddings": False})
        ),
        lambda: GPT2LMHeadModel(gpt2_config()),
    ],
    ids=["llama", "untied llama", "gpt2"],
)
def test_the_loss_of_the_files_is_the_models_own(make: Any, tmp_path: Path) -> None:
    attention.register()
    model = make()
    scatter(model)
    save(model, tmp_path)
    chain, space, parameters = load(tmp_path, torch.float32)
    ids, labels, mask = ragged_tokens()
    ours = Curvature(chain, space, parameters, token_batch(ids, labels, mask), 2).loss()
    own = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    theirs = float(own(input_ids=ids, labels=labels, attention_mask=mask).loss.detach())
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert chain.is_cut


def test_sharded_files_and_other_dtypes_are_read(tmp_path: Path) -> None:
    model = tiny_llama()
    save(model, tmp_path)
    _, space, parameters = load(tmp_path)
    whole = space.to_flat(parameters)
    tensors = {name: p.detach().bfloat16() for name, p in model.named_parameters()}
    names = list(tensors)
    (tmp_path / "model.safetensors").unlink()
    save_file({n: tensors[n] for n in names[::2]}, tmp_path / "model-1.safetensors")
    save_file({n: tensors[n] for n in names[1::2]}, tmp_path / "model-2.safetensors")
    weight_map = {n: f"model-{i % 2 + 1}.safetensors" for i, n in enumerate(names)}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    _, space, rounded = load(tmp_path)
    torch.testing.assert_close(space.to_flat(rounded), whole.bfloat16().double())


def test_a_tied_tensor_may_be_stored_under_its_other_name(tmp_path: Path) -> None:
    model = tiny_llama()
    save(model, tmp_path)
    before = load(tmp_path)[2]
    tensors = {name: p.detach().contiguous() for name, p in model.named_parameters()}
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    assert torch.equal(load(tmp_path)[2], before)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "no_such_model"}, "ARCHITECTURE_UNKNOWN"),
        ({"model_type": None}, "CONFIG_INVALID"),
        ({"model_type": "vit"}, "ARCHITECTURE_UNKNOWN"),
        ({"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}, "REMOTE_CODE_REFUSED"),
        ({"hidden_size": -8}, "CONFIG_INVALID"),
        ({"num_attention_heads": "many"}, "CONFIG_INVALID"),
        ({"num_hidden_layers": 3}, "TENSOR_MISSING"),
        ({"intermediate_size": 12}, "TENSOR_SHAPE_MISMATCH"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(
    changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    save(tiny_llama(), tmp_path, **changes)
    with pytest.raises(CurvatureError) as caught:
        locate(build_empty(tmp_path, torch.float32), tmp_path)
    assert caught.value.reason == reason


def test_integer_weights_are_refused(tmp_path: Path) -> None:
    model = tiny_llama()
    save(model, tmp_path)
    tensors = {name: p.detach().to(torch.int8) for name, p in model.named_parameters()}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CurvatureError, match="DTYPE_UNSUPPORTED"):
        locate(build_empty(tmp_path, torch.float32), tmp_path)


@pytest.mark.parametrize("text", ["", "[1, 2]", '{"model_type": "lla', "\x00\xff"])
def test_a_config_that_is_no_object_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CurvatureError) as caught:
        build_empty(tmp_path, torch.float32)
    assert caught.value.reason in {"CONFIG_INVALID", "ARCHITECTURE_UNKNOWN"}
