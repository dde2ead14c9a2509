"""Whole products on a GPU, compiled and as CUDA graphs, against float64 on the CPU."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from hvp_core.curvature.curvature import Curvature
from hvp_core.model.data import token_batch
from hvp_core.model.huggingface import attention
from hvp_core.model.huggingface.layered import LayeredChain
from hvp_core.settings import ComputeSettings, Precision, Schedule
from hvp_core.sharding.collective import Alone
from hvp_core.sharding.layout import Layout
from hvp_core.vectors.space import ParameterSpace
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),
]

VOCABULARY = 500


def curvature(device: str, dtype: torch.dtype, **settings: Any) -> Curvature:
    """Of a small model, seeded; three rows, one padded, in micro-batches of two."""
    attention.register()
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        attn_implementation=attention.NAME,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).bfloat16().to(dtype).eval()
    chain = LayeredChain(model.to(device), dtype, torch.device(device))
    layout = Layout(chain.shapes, [block.parameters for block in chain.blocks], 1)
    space = ParameterSpace(layout, Alone(), dtype, torch.device(device))
    theta = torch.cat([each.detach().reshape(-1) for each in model.parameters()])
    ids = torch.randint(VOCABULARY, (3, 100), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[2, 80:] = 0
    return Curvature(
        chain, space, theta, token_batch(ids, None, mask), 2, ComputeSettings(**settings)
    )


@cache
def vectors(numel: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [(torch.randint(2, (numel,), generator=generator) * 2 - 1).float() for _ in range(3)]


@cache
def expected(kind: str | None) -> list[Tensor]:
    exact = curvature("cpu", torch.float64)
    if kind is None:
        return [exact.gradient()]
    return exact.product(kind, [each.double() for each in vectors(exact.parameters.numel())])


def error(found: list[Tensor], kind: str | None) -> float:
    pairs = zip(found, expected(kind), strict=True)
    return max(float((a.cpu().double() - b).norm() / b.norm()) for a, b in pairs)


@pytest.mark.parametrize("precision", ["full", "tf32", "bfloat16"])
@pytest.mark.parametrize("schedule", ["lean", "fast", "cached"])
@pytest.mark.parametrize("kind", ["hessian", "ggn"])
def test_a_compiled_graph_gives_the_product(
    kind: str, schedule: Schedule, precision: Precision
) -> None:
    there = curvature(
        "cuda", torch.float32, schedule=schedule, compile=True, graphs=True, precision=precision
    )
    probes = [each.cuda() for each in vectors(there.parameters.numel())]
    rounding = 3e-6 if precision == "full" else 1.5 * error([there.gradient()], None) + 1e-4
    for _ in range(3):  # walked, captured, replayed
        alone = [there.product(kind, [each])[0] for each in probes]
        assert error(alone, kind) < rounding
    for _ in range(3):
        assert error(there.product(kind, probes), kind) < rounding
    places = there.probes(1)
    for _ in range(3):
        alone = []
        for probe in probes:
            places[0].copy_(probe)
            alone += there.product(kind, places)
        assert {each.dtype for each in alone} == {places[0].dtype}
        assert error(alone, kind) < rounding
    assert "not_compiled" not in there.notes()
    assert not any(name.startswith("fallback") for name in there.notes())
