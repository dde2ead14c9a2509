"""Operators on some of the parameters, on the ranks: one model in memory, whatever is selected."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hvp_core.model.huggingface import attention
from hvp_core.sharding.collective import Alone, Collective, Distributed
from hvp_workers.backend import (
    BackendError,
    Operator,
    Parameters,
    RawFile,
    Seeded,
    Space,
    Tuning,
)
from hvp_workers.engine import RankEngine
from numpy.typing import NDArray
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

from tests.core.problems import CPU, llama_config, ragged_tokens, scatter
from tests.core.ranks import run_ranks
from tests.core.test_checkpoint import save

NAMES = (
    "model.layers.0.self_attn.k_proj.weight",
    "model.layers.1.mlp.down_proj.weight",
    "model.norm.weight",
)


@pytest.fixture(scope="module")
def operator(tmp_path_factory: pytest.TempPathFactory) -> Operator:
    folder = tmp_path_factory.mktemp("selections")
    attention.register()
    model = LlamaForCausalLM(llama_config())
    scatter(model)
    ids, labels, mask = ragged_tokens()
    save_file({"input_ids": ids, "labels": labels, "attention_mask": mask}, folder / "batch")
    return Operator(
        space=Space(checkpoint_dir=save(model, folder / "model"), dtype="float64"),
        batch_path=folder / "batch",
    )


def selected(operator: Operator) -> Operator:
    return replace(operator, space=replace(operator.space, parameters=NAMES))


def products(engine: RankEngine, operator: Operator, folder: Path) -> None:
    """Write a random vector, its product, and the point, of the selection."""
    part = selected(operator)
    engine.create_vector("v", part.space, Seeded(1, "gaussian"))
    engine.create_vector("theta", part.space, Parameters())
    engine.apply(part, ["v"], ["hv"])
    for name in ("v", "hv", "theta"):
        engine.save_vector(name, folder / name)


def read(path: Path) -> NDArray[np.float64]:
    return np.fromfile(path, dtype=np.float64)


def rank_main(rank: int, world_size: int, operator: Operator, folder: Path) -> None:
    attention.register()
    products(engine_of(Distributed(CPU)), operator, folder)


def engine_of(collective: Collective) -> RankEngine:
    return RankEngine(collective, "cpu", Tuning())


def test_two_ranks_give_the_rows_and_columns_that_one_gives(
    operator: Operator, tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    engine = engine_of(Alone())
    products(engine, operator, one)
    run_ranks(rank_main, 2, operator, two)
    for name in ("v", "hv", "theta"):
        np.testing.assert_allclose(read(two / name), read(one / name), rtol=1e-11, atol=1e-12)
    # The same of the matrix of all: a vector that is zero elsewhere, and the rows of its product.
    shapes = {name: tensor.shape for name, tensor in tensors(operator).items()}
    mask = np.concatenate([np.full(shape.numel(), name in NAMES) for name, shape in shapes.items()])
    padded = np.zeros(len(mask))
    padded[mask] = read(one / "v")
    padded.tofile(tmp_path / "padded")
    engine.create_vector("padded", operator.space, RawFile(tmp_path / "padded"))
    engine.apply(operator, ["padded"], ["product"])
    engine.save_vector("product", tmp_path / "product")
    np.testing.assert_allclose(
        read(tmp_path / "product")[mask], read(one / "hv"), rtol=1e-10, atol=1e-12
    )
    theta = np.concatenate(
        [tensor.double().numpy().ravel() for tensor in tensors(operator).values()]
    )
    np.testing.assert_array_equal(read(one / "theta"), theta[mask])


def tensors(operator: Operator) -> dict[str, torch.Tensor]:
    model = LlamaForCausalLM.from_pretrained(operator.space.checkpoint_dir)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_the_model_is_loaded_once_and_vectors_of_selections_do_not_mix(operator: Operator) -> None:
    engine = engine_of(Alone())
    part, norms = selected(operator), replace(operator.space, parameters=NAMES[2:])
    model = engine._models.get(operator.space)
    assert engine._models.get(part.space) is model
    engine.create_vector("v", norms, Seeded(1, "sphere"))
    with pytest.raises(BackendError, match="VECTOR_SPACE_MISMATCH"):
        engine.apply(part, ["v"], ["hv"])
    with pytest.raises(BackendError, match="PARAMETERS_NOT_FOUND"):
        engine.create_vector("w", replace(norms, parameters=("no.such",)), Seeded(1, "sphere"))
