"""Kronecker factors: what they are made of, the inverse that they give, and how they are dealt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal

import pytest
import torch
from hvp_core.autodiff.product_spec import Draws
from hvp_core.curvature import factor_sums
from hvp_core.curvature.curvature import Curvature
from hvp_core.curvature.factor_sums import Share, deal
from hvp_core.curvature.kronecker import KroneckerFactors, KroneckerPreconditioner
from hvp_core.errors import CurvatureError
from hvp_core.losses.loss import CrossEntropy, Loss, SquaredError
from hvp_core.settings import ComputeSettings
from hvp_core.sharding.collective import Alone
from hvp_core.sharding.layout import Layout
from hvp_core.vectors.space import ParameterSpace
from torch import Tensor, nn
from transformers import GPT2LMHeadModel, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from tests.core.problems import (
    CPU,
    Problem,
    gpt2_config,
    gpt2_problem,
    llama_config,
    llama_problem,
    module_problem,
    ragged_tokens,
)
from tests.core.references import relative_error, rms_norm
from tests.core.test_gauss_newton import data

EXACT = 1e-10
DRAWS = Draws(seed=3)
ALL = 10**9
DECODERS: dict[str, tuple[Callable[[], Problem], Callable[[], nn.Module]]] = {
    "llama": (
        llama_problem,
        lambda: LlamaForCausalLM(_plain(llama_config())),
    ),
    "gpt2": (gpt2_problem, lambda: GPT2LMHeadModel(_plain(gpt2_config()))),
}


def _plain(config: Any) -> Any:
    config._attn_implementation = "sdpa"
    return config


def inverse(factors: KroneckerFactors, curvature: Curvature, damping: float) -> Tensor:
    """The whole of the inverse with λI."""
    eye = torch.eye(curvature.space.dimension, dtype=torch.float64)
    return torch.stack([factors.solve(each, damping) for each in eye])


def hooked(model: nn.Module, problem: Problem, targets: Tensor) -> dict[str, Tensor]:
    """By torch's hooks: for each matrix (W/T) L ⊗ R, for any other parameter a multiple of I.

    The model's modules are run by transformers, not by this library.
    """
    model = model.double().eval()
    model.load_state_dict(problem.parameters, strict=False)
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(name: str) -> Callable[..., None]:
        def forward(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            x = inputs[0]
            output.register_hook(lambda u: seen.update({name: (x, u)}))

        return forward

    matrices = {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and name != "lm_head"
    }
    if isinstance(model, GPT2LMHeadModel):
        matrices["transformer.wpe.weight"] = model.transformer.wpe
    for name, module in matrices.items():
        module.register_forward_hook(hook(name))
    for each in model.modules():
        if isinstance(each, LlamaRMSNorm):  # its own code computes in float32
            each.forward = partial(rms_norm, weight=each.weight, eps=each.variance_epsilon)
    ids, _, mask = ragged_tokens()
    logits = model(ids, attention_mask=mask).logits
    count = int((targets != -100).sum())
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    (loss / count).backward()
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        scale = count * parameter.grad.square().sum() / parameter.numel()
        found[name] = scale * torch.eye(parameter.numel(), dtype=torch.float64)
        if name in matrices:
            x, u = seen[name]
            if not x.is_floating_point():
                x = nn.functional.one_hot(x, len(parameter)).double().expand(len(u), -1, -1)
            x, u = x.detach().flatten(0, 1), u.flatten(0, 1)
            # The query of a first position has a gradient that is nothing but rounding.
            sizes = x.norm(dim=1) * u.norm(dim=1)
            live = (sizes > 1e-13 * sizes.max()).nonzero().squeeze(1)
            x, u = x[live], u[live]
            # torch's Linear has (outputs, inputs), GPT-2's layers and an embedding the reverse.
            left, right = (u, x) if isinstance(matrices[name], nn.Linear) else (x, u)
            found[name] = torch.kron(left.T @ left, right.T @ right) * count / len(live)
    return found


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("kind", ["ggn", "empirical_fisher_token"])
def test_factors_are_those_that_hooks_of_torch_see(name: str, kind: str) -> None:
    make, model = DECODERS[name]
    problem, damping = make(), 1e-2
    # A table of positions sums its rows over a micro-batch.
    curvature = problem.curvature(2 if name == "llama" else 5)
    factors = curvature.factors(kind, ALL, draws=DRAWS)
    targets = problem.batch.targets
    if kind == "ggn":
        targets = torch.cat(curvature.labels.draw(DRAWS)).squeeze(-1)
    blocks = hooked(model(), problem, targets)
    v = curvature.space.random(1, "gaussian")
    found = factors.solve(v, damping)
    for each in curvature.space.layout.parameters:
        here = slice(each.offset, each.offset + each.numel)
        block = blocks[each.name] + damping * torch.eye(each.numel, dtype=torch.float64)
        expected = torch.linalg.solve(block, v[here])
        assert relative_error(found[here], expected) < EXACT, each.name
    number = {"llama": "14 matrices, 0 of them", "gpt2": "9 matrices, 0 of them"}[name]
    assert str(factors).startswith(f"Kronecker factors of {number}")
    label = "drawn by seed 3" if kind == "ggn" else "of the batch"
    assert str(factors).endswith(f"labels {label}")


@pytest.mark.parametrize("kind", ["fisher", "empirical_fisher_sequence"])
def test_the_inverse_is_exact_for_one_sample_of_a_linear_model(kind: str) -> None:
    """The gradient is one outer product then, and F = g gᵀ a Kronecker product."""
    module = nn.Linear(3, 4, bias=False).double()
    problem = module_problem(module, SquaredError(), data(1, 3), data(1, 4))
    curvature, damping = problem.curvature(1), 0.03
    factors = curvature.factors(kind, ALL, draws=DRAWS)
    eye = torch.eye(12, dtype=torch.float64)
    matrix = torch.stack(curvature.product(kind, list(eye), draws=DRAWS))
    assert matrix.norm() > 0.1
    expected = torch.linalg.inv(matrix + damping * eye)
    assert relative_error(inverse(factors, curvature, damping), expected) < EXACT


def network() -> Problem:
    """Matrices of (4, 3) and (2, 4), and a bias for each."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    return module_problem(module, CrossEntropy(), data(5, 3), torch.tensor([0, 1, -100, 1, 0]))


@pytest.mark.parametrize("most_rows", [0, 3, 4])
def test_the_inverse_is_symmetric_and_positive_definite_whatever_is_diagonal(
    most_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    curvature, damping = network().curvature(2), 1e-3
    dense = inverse(curvature.factors("hessian", ALL, draws=DRAWS), curvature, damping)
    monkeypatch.setattr(factor_sums, "MOST_ROWS", most_rows)
    factors = curvature.factors("hessian", ALL, draws=DRAWS)
    assert f"of 2 matrices, {0 if most_rows == 4 else 2} of them with a diagonal" in str(factors)
    found = inverse(factors, curvature, damping)
    assert torch.linalg.matrix_norm(found - found.T) <= 1e-13 * torch.linalg.matrix_norm(found)
    values = torch.linalg.eigvalsh((found + found.T) / 2)
    assert float(values[0]) > 0
    assert float(values[-1]) <= 1 / damping * (1 + 1e-12)
    # A diagonal factor is the dense one's diagonal.
    rows, columns = (torch.eye(4) if most_rows < 4 else torch.ones(4, 4)), torch.ones(3, 3)
    kept = torch.kron(rows, torch.eye(3) if most_rows < 3 else columns)
    block, expected = (
        torch.linalg.inv(each[:12, :12]) - damping * torch.eye(12).double()
        for each in (found, dense)
    )
    assert relative_error(block, expected * kept) < 1e-9


def test_micro_batches_change_nothing_and_a_seed_gives_the_same_factors() -> None:
    problem = network()
    curvatures = [problem.curvature(size) for size in (2, 1, 5, 2)]
    v = curvatures[0].space.random(1, "gaussian")
    found = [c.factors("ggn", ALL, draws=DRAWS).solve(v, 1e-3) for c in curvatures]
    for each in found[1:]:
        assert relative_error(each, found[0]) < EXACT
    assert torch.equal(found[0], found[3])
    other = curvatures[0].factors("ggn", ALL, draws=Draws(seed=4)).solve(v, 1e-3)
    assert relative_error(other, found[0]) > 1e-2


def test_a_block_that_torch_differentiates_gets_a_number_for_each_parameter() -> None:
    problem, damping = llama_problem(), 1e-2
    traced = problem.curvature(2)
    curvature = Curvature(
        problem.chain,
        traced.space,
        traced.parameters,
        problem.batch,
        2,
        ComputeSettings(trace=False),
    )
    factors = curvature.factors("empirical_fisher_token", ALL)
    gradient, v = traced.gradient(), traced.space.random(1, "gaussian")
    expected = torch.empty_like(v)
    for each in traced.space.layout.parameters:
        here = slice(each.offset, each.offset + each.numel)
        mean = traced.num_targets * gradient[here].square().mean()
        expected[here] = v[here] / (mean + damping)
    assert "a number for each of 20 other parameters" in str(factors)
    assert relative_error(factors.solve(v, damping), expected) < EXACT


class Twice(nn.Module):
    """A table of rows, looked up and then multiplied by; and a tensor that is no matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 3)
        self.free = nn.Linear(3, 3, bias=False)
        self.never = nn.Parameter(torch.ones(2, 2))
        self.cube = nn.Parameter(torch.ones(1, 3, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.free(self.table(x))) * self.cube.view(3)
        return h @ self.table.weight.T


def test_what_is_no_single_product_gets_a_number_and_so_does_what_is_not_used() -> None:
    torch.manual_seed(0)
    x = torch.tensor([0, 1, 2, 1])
    problem = module_problem(Twice().double(), CrossEntropy(), x, torch.tensor([1, 2, 5, 0]))
    curvature = problem.curvature(4)
    factors = curvature.factors("ggn", ALL, draws=DRAWS)
    assert "of 1 matrices" in str(factors)
    assert "each of 3 other parameters" in str(factors)
    never = next(p for p in curvature.space.layout.parameters if p.name == "never")
    v = curvature.space.random(1, "gaussian")
    here = slice(never.offset, never.offset + 4)
    assert torch.equal(factors.solve(v, 0.5)[here], 2 * v[here])  # nothing but λ


class Alike(Loss):
    """Squared errors of which nobody says what they are the likelihood of."""

    counts: ClassVar[Literal["row", "element"]] = "row"

    def weight(self, target: Tensor) -> float:
        return SquaredError().weight(target)

    def value(self, output: Tensor, target: Tensor) -> Tensor:
        return SquaredError().value(output, target)

    def gradient(self, output: Tensor, target: Tensor) -> Tensor:
        return SquaredError().gradient(output, target)

    def curve(self, output: Tensor, tangent: Tensor, target: Tensor) -> Tensor:
        return SquaredError().curve(output, tangent, target)

    def by_target(self, values: Tensor) -> Tensor:
        return SquaredError().by_target(values)


def test_a_loss_that_is_no_likelihood_takes_the_batches_labels() -> None:
    module = nn.Linear(3, 4, bias=False).double()
    problem = module_problem(module, Alike(), data(2, 3), data(2, 4))
    factors = problem.curvature(1).factors("ggn", ALL, draws=DRAWS)
    assert str(factors).endswith("labels of the batch")
    known = replace(problem, chain=module_problem(module, SquaredError(), *_of(problem)).chain)
    expected = known.curvature(1).factors("empirical_fisher_token", ALL)
    v = torch.ones(12, dtype=torch.float64)
    assert relative_error(factors.solve(v, 0.1), expected.solve(v, 0.1)) < EXACT


def _of(problem: Problem) -> tuple[Tensor, Tensor]:
    return problem.batch.inputs["x"], problem.batch.targets


def test_factors_that_overflow_are_refused() -> None:
    module = nn.Linear(3, 4, bias=False)
    nn.init.zeros_(module.weight)
    x, t = data(2, 3).float() * 1e22, data(2, 4).float() * 1e-3
    curvature = module_problem(module, SquaredError(), x, t).curvature(1)
    assert curvature.gradient().isfinite().all()
    made = KroneckerPreconditioner(lambda: curvature.factors("ggn", ALL), 1.0)
    with pytest.raises(CurvatureError, match="NON_FINITE: the Kronecker factors of weight"):
        made.prepare()


# How factors are dealt out ------------------------------------------------------------------------

SHAPES = {
    "wide": (40, 4000),
    "square": (60, 60),
    "tall": (9000, 30),
    "bias": (60,),
    "other": (60, 80),
    "cube": (3, 4, 5),
}


def dealt(world_size: int, most_elements: int) -> list[Share]:
    users = [["wide", "square"], ["tall", "bias", "other"], ["cube"]]
    space = ParameterSpace(Layout(SHAPES, users, world_size), Alone(), torch.float64, CPU)
    return deal(space, most_elements)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_every_matrix_has_one_owner_and_no_two_factors_overlap(world_size: int) -> None:
    shares = dealt(world_size, ALL)
    places = [place for share in shares for place in share.places]
    assert sorted(place.name for place in places) == ["other", "square", "tall", "wide"]
    for share in shares:
        for rank in range(world_size):
            taken = torch.zeros(share.chunk)
            for place in share.places:
                if place.owner == rank:
                    for view in place.views(taken):
                        assert not view.any()
                        view += 1
    if world_size > 1:
        assert len({place.owner for place in places}) > 1


@pytest.mark.parametrize(
    ("most_elements", "diagonal"),
    [
        (ALL, {("tall", "left")}),  # of more than 4096 rows
        (4000**2, {("tall", "left"), ("wide", "right")}),
        (0, {("tall", "left"), ("wide", "right")}),  # what costs nothing is never refused
    ],
)
def test_factors_that_would_be_too_large_are_diagonal(
    most_elements: int, diagonal: set[tuple[str, str]]
) -> None:
    places = [place for share in dealt(2, most_elements) for place in share.places]
    found = {
        (place.name, side)
        for place in places
        for side in ("left", "right")
        if not getattr(place, side).is_dense
    }
    assert found == diagonal
    elements = sum(place.left.numel + place.right.numel for place in places)
    assert elements <= max(most_elements, 1 << 16)
