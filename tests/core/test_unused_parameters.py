"""Parameters that the loss does not depend on have derivatives of zero, not whatever lay there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hvp_core.curvature.shards import Results
from hvp_core.model.data import token_batch
from hvp_core.model.huggingface import attention
from hvp_core.model.huggingface.layered import LayeredChain
from hvp_core.sharding.collective import Alone
from hvp_core.sharding.layout import Layout
from hvp_core.vectors.space import ParameterSpace
from torch import nn
from transformers import LlamaForCausalLM

from tests.core.problems import CPU, Problem, llama_config, llama_problem, ragged_tokens, scatter
from tests.core.test_schedules import curvature_of, distance


def with_a_tower() -> Problem:
    """A Llama beside a layer that text never reaches."""
    attention.register()
    model = LlamaForCausalLM(llama_config())
    model.tower = nn.Linear(5, 7)
    model = model.double()
    scatter(model)
    ids, labels, mask = ragged_tokens()
    parameters = {name: each.detach() for name, each in model.eval().named_parameters()}
    chain = LayeredChain(model, torch.float64, CPU)
    return Problem(chain, parameters, token_batch(ids, labels, mask))


@pytest.fixture
def memory_of_sevens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody has written holds sevens."""
    empty = torch.empty

    def sevens(*args: Any, **kwargs: Any) -> torch.Tensor:
        found = empty(*args, **kwargs)
        return (
            found.fill_(7) if found.is_floating_point() and type(found) is torch.Tensor else found
        )

    monkeypatch.setattr(torch, "empty", sevens)


@pytest.mark.parametrize("schedule", ["lean", "fast", "cached"])
def test_what_no_block_uses_has_a_gradient_and_a_product_of_zero(
    schedule: Any, memory_of_sevens: None
) -> None:
    problem = with_a_tower()
    assert list(problem.parameters)[-2:] == ["tower.weight", "tower.bias"]
    rest, tower = slice(0, -42), slice(-42, None)
    curvature = curvature_of(problem, schedule=schedule)
    v = torch.cos(torch.arange(problem.flat.numel(), dtype=torch.float64))
    found = {
        "gradient": curvature.gradient(),
        "hessian": curvature.hvp([v])[0],
        "ggn": curvature.ggn([v])[0],
    }
    for kind, each in found.items():
        assert bool((each[tower] == 0).all()), kind
    # The rest is as if the tower were not there.
    plain = llama_problem()
    assert torch.equal(plain.flat, problem.flat[rest])
    alone = curvature_of(plain, schedule=schedule)
    assert distance([found["gradient"][rest]], [alone.gradient()]) < 1e-13
    assert distance([found["hessian"][rest]], alone.hvp([v[rest]])) < 1e-13
    assert distance([found["ggn"][rest]], alone.ggn([v[rest]])) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_nobody_adds_to_is_zero_in_memory_that_is_given_too(dtype: torch.dtype) -> None:
    layout = Layout({"a": (2,), "tower": (3,), "b": (1, 2)}, [["a"], ["b"]], 1)
    space = ParameterSpace(layout, Alone(), torch.float32, CPU)
    into = [torch.full((layout.shard_numel,), 7, dtype=dtype)]
    results = Results(space, [dtype], into)
    with results.block(1) as (sums,):
        sums.add_dense({"b": torch.ones(1, 2)})
    assert results.finish()[0].tolist() == [0, 0, 0, 0, 0, 1, 1]
    assert results.finish()[0].tolist() == [0, 0, 0, 0, 0, 1, 1]
