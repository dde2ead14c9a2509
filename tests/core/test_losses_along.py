"""The loss at displaced parameters is the loss of the function, for any selection and cut."""

from __future__ import annotations

import pytest
import torch
from hvp_core.losses.loss import CrossEntropy
from torch import Tensor, nn

from tests.core.problems import gpt2_problem, llama_problem, module_problem

DECODERS = {"llama": llama_problem, "gpt2": gpt2_problem}
POINTS = [(0.0, 0.0), (0.7, 0.0), (-0.3, 0.2), (1e-3, -1e-3)]


def directions(n: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return list(torch.randn(2, n, generator=generator, dtype=torch.float64))


@pytest.mark.parametrize("name", DECODERS)
def test_the_loss_along_directions_is_that_of_the_function(name: str) -> None:
    problem = DECODERS[name]()
    assert problem.loss is not None
    u, v = directions(len(problem.flat))
    expected = [float(problem.loss(problem.flat + a * u + b * v)) for a, b in POINTS]
    for micro_batch_size in (1, 2, 5):
        curvature = problem.curvature(micro_batch_size)
        kept = curvature.hvp([u])[0]  # what is kept for products is of θ
        assert curvature.losses_along([u, v], POINTS) == pytest.approx(expected, rel=1e-12)
        assert torch.equal(curvature.hvp([u])[0], kept)
        assert curvature.loss() == pytest.approx(expected[0], rel=1e-12)


def test_only_selected_parameters_are_displaced() -> None:
    problem = llama_problem()
    assert problem.loss is not None
    names = [name for name in problem.parameters if ".1." in name or "norm" in name]
    chosen = torch.cat(
        [torch.full((each.numel(),), name in names) for name, each in problem.parameters.items()]
    )
    u, v = directions(int(chosen.sum()))
    whole = [torch.zeros_like(problem.flat).masked_scatter(chosen, each) for each in (u, v)]
    expected = [float(problem.loss(problem.flat + a * whole[0] + b * whole[1])) for a, b in POINTS]
    found = problem.curvature(2, selected=names).losses_along([u, v], POINTS)
    assert found == pytest.approx(expected, rel=1e-12)


def test_a_model_of_one_block_is_displaced_too_and_may_overflow() -> None:
    module = nn.Linear(3, 2, bias=False).double()
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    targets = torch.tensor([0, 1, 1, 0])
    problem = module_problem(module, CrossEntropy(), x, targets)
    (v, _), points = directions(6), [(0.5,), (1e308 * 1.5,)]
    near, far = problem.curvature(2).losses_along([v], points)
    moved = (problem.flat + 0.5 * v).view(2, 3)
    assert near == pytest.approx(float(nn.functional.cross_entropy(x @ moved.T, targets)), 1e-12)
    assert far - far != 0  # infinite or NaN, and no error: the function is so there
