"""The Gauss-Newton product against closed forms, a dense Jᵀ H_out J, and the laws of one."""

from __future__ import annotations

import pytest
import torch
from hvp_core.losses.loss import CrossEntropy, Logistic, SquaredError
from hvp_core.sharding.collective import Alone
from torch import Tensor, nn

from tests.core.problems import (
    Problem,
    gpt2_config,
    gpt2_problem,
    llama_config,
    llama_problem,
    module_problem,
    ragged_tokens,
)
from tests.core.references import gauss_newton, gpt2, llama, relative_error, unflatten

EXACT = 1e-9
DECODERS = {
    "llama": (llama_problem, llama, llama_config),
    "gpt2": (gpt2_problem, gpt2, gpt2_config),
}


def data(rows: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(rows, width, generator=generator, dtype=torch.float64)


def probes_of(problem: Problem, count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    shape = (count, problem.flat.numel())
    return list(torch.randn(shape, generator=generator, dtype=torch.float64))


@pytest.mark.parametrize(
    ("loss", "width", "targets"),
    [
        (SquaredError(), 2, data(7, 2)),
        (Logistic(), 1, (data(7, 1) > 0).double()),
        (CrossEntropy(), 4, torch.tensor([0, 1, -100, 3, 2, -100, 1])),
    ],
)
def test_of_a_model_that_is_linear_in_its_parameters_it_is_the_hessian(
    loss: SquaredError | Logistic | CrossEntropy, width: int, targets: Tensor
) -> None:
    module = nn.Linear(3, width).double()
    curvature = module_problem(module, loss, data(7, 3), targets).curvature(3)
    basis = list(torch.eye(width * 4, dtype=torch.float64))
    ggn, hessian = torch.stack(curvature.ggn(basis)), torch.stack(curvature.hvp(basis))
    assert relative_error(ggn, hessian) < EXACT


def test_of_a_network_with_a_squared_error_it_is_the_jacobian_squared() -> None:
    x, t = data(6, 3), data(6, 2)
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    problem = module_problem(module, SquaredError(), x, t)
    curvature = problem.curvature(4)

    def outputs(flat: Tensor) -> Tensor:
        parameters = unflatten(flat, problem.parameters)
        return torch.func.functional_call(module, parameters, (x,)).reshape(-1)

    jacobian = torch.func.jacrev(outputs)(problem.flat)
    basis = list(torch.eye(problem.flat.numel(), dtype=torch.float64))
    ggn = torch.stack(curvature.ggn(basis))
    assert relative_error(ggn, jacobian.T @ jacobian / 6) < EXACT
    assert relative_error(torch.stack(curvature.hvp(basis)), ggn) > 1e-3  # another matrix


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("micro_batch_size", [1, 3, 5])
def test_of_a_decoder_it_is_that_of_the_same_model_written_by_hand(
    name: str, micro_batch_size: int
) -> None:
    make, reference, config = DECODERS[name]
    problem = make()
    ids, labels, mask = ragged_tokens()
    dense = gauss_newton(
        lambda p: reference(p, ids, mask, config()), labels, problem.parameters, problem.flat
    )
    probes = probes_of(problem, 5)
    products = torch.stack(problem.curvature(micro_batch_size).ggn(probes))
    assert relative_error(products, torch.stack(probes) @ dense) < EXACT


def test_it_is_symmetric_and_has_no_negative_direction() -> None:
    problem = llama_problem()
    curvature = problem.curvature(2)
    probes = torch.stack(probes_of(problem, 12))
    gram = torch.stack(curvature.ggn(list(probes))) @ probes.T
    assert relative_error(gram, gram.T) < 1e-11
    assert float(torch.linalg.eigvalsh(gram)[0]) > 0


def test_both_kinds_of_product_come_from_one_curvature_in_any_order() -> None:
    problem = llama_problem()
    (probe,) = probes_of(problem, 1)
    curvature = problem.curvature(2)
    first = [curvature.product(kind, [probe])[0] for kind in ("ggn", "hessian", "ggn")]
    fresh = problem.curvature(2, Alone())
    assert relative_error(first[0], first[2]) < 1e-14
    assert relative_error(first[1], fresh.hvp([probe])[0]) < 1e-14
    assert relative_error(first[0], first[1]) > 1e-3
