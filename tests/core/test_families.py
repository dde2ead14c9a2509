"""Architectures that crashed, answered by chance or were refused, as checkpoints of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hvp_core.attention.rule import Qkv
from hvp_core.errors import CurvatureError
from hvp_core.model.huggingface import attention
from hvp_core.precision import exact
from hvp_core.sharding.collective import Alone
from hvp_workers import backend as api
from hvp_workers.engine import RankEngine
from safetensors.torch import save_file
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from tests.core.problems import scatter
from tests.core.references import relative_error

SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 29,
    "max_position_embeddings": 32,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GATED = {**SMALL, "num_key_value_heads": 1, "intermediate_size": 24}
ONE = {**SMALL, "num_hidden_layers": 1}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "original_max_position_embeddings": 8,
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixers that read the weights of a module they do not call": (
        "lfm2",
        {**GATED, "layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
    ),
    "positions that change their own state": (
        "phi3",
        {**GATED, "original_max_position_embeddings": 8, "rope_parameters": LONG_ROPE},
    ),
    "embeddings narrower than the layers": (
        "opt",
        {**ONE, "ffn_dim": 24, "word_embed_proj_dim": 8, "do_layer_norm_before": False},
    ),
    "attention of its own": ("doge", {**GATED, **ONE}),
}
SERVED = list(CONFIGS)
STOPPED = {**SMALL, "embedding_size": 16, "intermediate_size": 24, "is_decoder": True}


def checkpoint(folder: Path, kind: str, settings: dict[str, Any]) -> PreTrainedModel:
    """A tiny model and its folder, under the names that it has in memory."""
    config = CONFIG_MAPPING[kind](**settings)
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float64, attn_implementation="eager"
    ).eval()
    scatter(model)
    model.save_pretrained(folder, save_original_format=False)
    return model


def batch(folder: Path, length: int) -> tuple[Tensor, Path]:
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(3, 29, (3, length), generator=generator)
    save_file({"input_ids": ids}, folder / f"batch-{length}")
    return ids, folder / f"batch-{length}"


def engine() -> RankEngine:
    return RankEngine(Alone(), "cpu", api.Tuning())


def operator(folder: Path, batch_path: Path) -> api.Operator:
    space = api.Space(checkpoint_dir=folder, dtype="float64")
    return api.Operator(space=space, batch_path=batch_path)


#: Of those that are served, the ones whose blocks take longest to trace.
LONG = ("positions that change their own state",)


def truth(model: PreTrainedModel, ids: Tensor, v: Tensor) -> tuple[float, Tensor, Tensor]:
    """Loss, gradient and Hv by differentiating the whole model backward twice."""
    parameters = [each.requires_grad_() for each in model.parameters()]
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    options: Any = {"allow_unused": True, "materialize_grads": True}
    gradient = torch.autograd.grad(loss, parameters, create_graph=True, **options)
    flat = torch.cat([each.reshape(-1) for each in gradient])
    hv = torch.autograd.grad(flat @ v, parameters, **options)
    return loss.item(), flat.detach(), torch.cat([each.reshape(-1) for each in hv])


@pytest.mark.parametrize(
    "what",
    [pytest.param(each, marks=[pytest.mark.slow] * (each in LONG)) for each in SERVED],
)
def test_loss_gradient_and_product_are_the_models_own(what: str, tmp_path: Path) -> None:
    kind, settings = CONFIGS[what]
    model = checkpoint(tmp_path / "model", kind, settings)
    ranks = engine()
    # Longer than the original context, and as short as before again.
    lengths = (6, 14, 6) if kind == "phi3" else (6,)
    for length in lengths:
        ids, path = batch(tmp_path, length)
        asked = operator(tmp_path / "model", path)
        curvature = ranks._operator(asked).curvature
        v = torch.cos(torch.arange(curvature.space.layout.numel, dtype=torch.float64))
        loss, gradient, hv = truth(model, ids, v)
        # These models round to 32 bits here and there.
        assert ranks.loss(asked) == pytest.approx(loss, rel=1e-6)
        assert relative_error(curvature.gradient(), gradient) < 1e-4
        assert relative_error(curvature.hvp([v])[0], hv) < 1e-4
        ranks._models._models.clear() if length == 14 else None


def test_a_model_is_loaded_the_same_way_every_time(tmp_path: Path) -> None:
    kind, settings = CONFIGS[SERVED[0]]
    checkpoint(tmp_path / "model", kind, settings)
    asked = operator(tmp_path / "model", batch(tmp_path, 6)[1])
    losses = set()
    for _ in range(6):
        # What is in memory that nobody has written differs from time to time.
        junk = [torch.full((size,), torch.nan) for size in (64, 256, 1024, 4096)]
        del junk
        losses.add(engine().loss(asked))
    assert len(losses) == 1


@pytest.mark.slow
def test_a_table_read_under_no_grad_is_differentiated_like_any_other(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model", "roformer", {**STOPPED, "pad_token_id": 0})
    ids, path = batch(tmp_path, 6)
    curvature = engine()._operator(operator(tmp_path / "model", path)).curvature
    v = torch.cos(torch.arange(curvature.space.layout.numel, dtype=torch.float64))
    v /= v.norm()
    gradient, hv = curvature.gradient(), curvature.hvp([v])[0]
    theta = curvature.parameters.clone()

    def loss(step: float) -> float:
        torch.nn.utils.vector_to_parameters(theta + step * v, model.parameters())
        with torch.no_grad(), exact():  # all of it in 64 bits
            return float(model(input_ids=ids, labels=ids, use_cache=False).loss)

    h = 1e-3
    at = {place: loss(place * h) for place in (-2, -1, 0, 1, 2)}
    slope = (8 * (at[1] - at[-1]) - (at[2] - at[-2])) / (12 * h)
    bend = (16 * (at[1] + at[-1]) - (at[2] + at[-2]) - 30 * at[0]) / (12 * h**2)
    assert float(gradient @ v) == pytest.approx(slope, rel=1e-7)
    assert float(hv @ v) == pytest.approx(bend, rel=1e-5)
    assert any("no_grad" in note for note in curvature.notes().values())


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("recurrent_gemma", {**GATED, "num_hidden_layers": 3, "lru_width": 16, "head_dim": 8}),
        ("bloom", {"hidden_size": 16, "n_layer": 1, "n_head": 2, "vocab_size": 29}),
    ],
)
def test_a_model_whose_own_backward_has_no_derivative_is_refused_with_the_block(
    kind: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    checkpoint(tmp_path / "model", kind, settings)
    asked = operator(tmp_path / "model", batch(tmp_path, 6)[1])
    ranks = engine()
    assert ranks.loss(asked) > 0
    curvature = ranks._operator(asked).curvature
    v = torch.ones(curvature.space.layout.numel, dtype=torch.float64)
    for call in (curvature.gradient, lambda: curvature.hvp([v]), lambda: curvature.ggn([v])):
        with pytest.raises(CurvatureError) as caught:
            call()
        assert caught.value.reason == "DOUBLE_BACKWARD_UNSUPPORTED"
        assert caught.value.metadata["block"]


# The seam ----------------------------------------------------------------------------------------


def attend(**others: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 4, 8, generator=generator)
    return attention.attention(torch.nn.Identity(), *Qkv(q, k, v), None, **others)[0]


@pytest.mark.parametrize(
    "others",
    [
        {"position_bias": torch.zeros(4, 4)},
        {"sinks": torch.zeros(2)},
        {"dropout": 0.1},
        {"sliding_window": 2},  # where no mask says so too
        {"cu_seq_lens_q": torch.tensor([0, 2, 4])},
        {"what_a_later_version_adds": True},
    ],
    ids=lambda others: next(iter(others)),
)
def test_an_attention_with_an_argument_nobody_knows_is_refused_by_its_name(
    others: dict[str, Any],
) -> None:
    with pytest.raises(CurvatureError, match=next(iter(others))) as caught:
        attend(**others)
    assert caught.value.reason == "MODEL_UNSUPPORTED"


def test_arguments_that_change_nothing_are_not_refused() -> None:
    plain = attend()
    harmless = {"dropout": 0.0, "position_ids": torch.arange(4)[None], "use_cache": False}
    assert torch.equal(attend(**harmless, position_bias=None), plain)


# Tensors without values --------------------------------------------------------------------------


def test_nothing_is_computed_with_a_tensor_that_has_no_values() -> None:
    x, weight = torch.ones(1, 2, 5), torch.empty(2, 1, 3, device="meta")
    # torch would return whatever lay in memory.
    with (
        exact(),
        pytest.raises(CurvatureError, match="no values") as caught,
    ):
        torch.nn.functional.conv1d(x, weight, groups=2)
    assert caught.value.reason == "MODEL_UNSUPPORTED"
    with exact():
        assert (weight.shape, weight.dtype) == ((2, 1, 3), torch.float32)
