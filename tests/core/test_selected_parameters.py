"""Operators on some of a model's parameters: rows and columns of the dense matrix of all."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
from hvp_core.autodiff.product_spec import MATRICES, Draws
from hvp_core.curvature.curvature import Curvature
from hvp_core.curvature.shards import part_of
from hvp_core.errors import CurvatureError
from hvp_core.losses.loss import CrossEntropy
from hvp_core.settings import ComputeSettings
from hvp_core.sharding.collective import Alone
from hvp_core.sharding.layout import Layout
from hvp_core.vectors.space import ParameterSpace
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tests.core import references
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
from tests.core.references import relative_error

TOLERANCE = 1e-9

#: By model: a tied table, blocks at either end and between, and what lies on one side of an
#: attention.
SELECTIONS = {
    "llama": [
        ["model.embed_tokens.weight"],
        ["model.layers.1.*"],
        ["model.norm.weight"],
        ["model.layers.0.mlp.down_proj.weight"],
        ["*.k_proj.weight", "model.layers.1.post_attention_layernorm.weight"],
        ["model.layers.1.self_attn.o_proj.weight"],
    ],
    "gpt2": [
        ["transformer.wpe.weight"],
        ["transformer.ln_f.*"],
        ["*.bias"],
        ["transformer.h.0.attn.c_attn.weight", "transformer.ln_f.bias"],
    ],
}
#: Where every kind of matrix is looked at, and not the two alone that go back differently.
THOROUGHLY = [["model.layers.1.*"], ["*.bias"]]
CASES = [(model, globs) for model, each in SELECTIONS.items() for globs in each]


def chosen(problem: Problem, globs: Sequence[str]) -> list[str]:
    return [name for name in problem.parameters if any(fnmatchcase(name, g) for g in globs)]


def indices(problem: Problem, names: Sequence[str]) -> Tensor:
    """Of the selected elements in the vector of all."""
    sizes = {name: each.numel() for name, each in problem.parameters.items()}
    return torch.cat(
        [torch.full((size,), name in names) for name, size in sizes.items()]
    ).nonzero()[:, 0]


def curvature_of(
    problem: Problem, names: Sequence[str], micro_batch_size: int = 2, **settings: Any
) -> Curvature:
    layout = Layout(problem.chain.shapes, [b.parameters for b in problem.chain.blocks], 1)
    space = ParameterSpace(layout, Alone(), problem.flat.dtype, CPU)
    return Curvature(
        problem.chain,
        space,
        space.from_flat(problem.flat),
        problem.batch,
        micro_batch_size,
        ComputeSettings(**{"strict": True, **settings}),
        space.part(names),
    )


@functools.cache
def model(name: str) -> tuple[Problem, Callable[[references.Params], Tensor]]:
    """A problem, and its logits."""
    ids, _, mask = ragged_tokens()
    if name == "llama":
        return llama_problem(), lambda p: references.llama(p, ids, mask, llama_config())
    return gpt2_problem(), lambda p: references.gpt2(p, ids, mask, gpt2_config())


@functools.cache
def dense(name: str) -> dict[str, Tensor]:
    """The matrices of all parameters, by torch."""
    problem, logits = model(name)
    assert problem.loss is not None
    _, labels, _ = ragged_tokens()
    at = logits, labels, problem.parameters, problem.flat
    gradient = torch.func.grad(problem.loss)(problem.flat)
    fisher = {unit: references.empirical_fisher(*at, unit) for unit in ("token", "sequence")}
    counted = labels[:, 1:] != -100
    total = int(counted.sum())
    units = {"token": total, "sequence": int(counted.any(1).sum())}
    covariance = {
        f"gradient_covariance_{unit}": each - total / units[unit] * torch.outer(gradient, gradient)
        for unit, each in fisher.items()
    }
    drawn = torch.cat(problem.curvature(5).draw(Draws()))[:, :-1, 0]
    drawn_labels = torch.cat((torch.full((len(drawn), 1), -100), drawn), 1)
    return covariance | {
        "fisher": references.empirical_fisher(logits, drawn_labels, *at[2:], "token"),
        "hessian": torch.func.hessian(problem.loss)(problem.flat),
        "gradient": gradient,
        "ggn": references.gauss_newton(*at),
        "empirical_fisher_token": fisher["token"],
        "empirical_fisher_sequence": fisher["sequence"],
        "jacobian": torch.func.jacrev(
            lambda flat: logits(references.unflatten(flat, problem.parameters))
        )(problem.flat).flatten(0, -2),
    }


def probes(space: ParameterSpace, count: int) -> list[Tensor]:
    return [space.random(seed, "gaussian") for seed in range(1, count + 1)]


@pytest.mark.parametrize(("name", "globs"), CASES)
def test_products_are_rows_and_columns_of_the_dense_matrices(name: str, globs: list[str]) -> None:
    problem, _ = model(name)
    names, true = chosen(problem, globs), dense(name)
    at = indices(problem, names)
    curvature = curvature_of(problem, names)
    space = curvature.space
    assert space.dimension == len(at)
    vectors = probes(space, 2)
    assert relative_error(curvature.gradient(), true["gradient"][at]) < TOLERANCE
    kinds: Sequence[str] = tuple(MATRICES) if globs in THOROUGHLY else ("hessian", "ggn")
    for kind in kinds:
        part = true[kind][at][:, at]
        for v, product in zip(vectors, curvature.product(kind, vectors), strict=True):
            assert relative_error(product, part @ v) < TOLERANCE
        (alone,) = curvature.product(kind, vectors[:1])
        assert relative_error(alone, part @ vectors[0]) < TOLERANCE
        if kind != "hessian":
            forms = [float(v @ part @ v) for v in vectors]
            assert curvature.quadratic(kind, vectors) == pytest.approx(forms, rel=TOLERANCE)
    slopes = [float(true["gradient"][at] @ v) for v in vectors]
    assert curvature.slopes(vectors) == pytest.approx(slopes, rel=TOLERANCE)


@pytest.mark.parametrize(("name", "globs"), CASES)
def test_jacobians_are_columns_of_the_dense_one(name: str, globs: list[str]) -> None:
    problem, _ = model(name)
    names = chosen(problem, globs)
    columns = dense(name)["jacobian"][:, indices(problem, names)]
    curvature = curvature_of(problem, names)
    v = curvature.space.random(1, "gaussian")
    u = curvature.output_space.random(2, "gaussian")
    assert relative_error(curvature.jvp([v])[0], columns @ v) < TOLERANCE
    assert relative_error(curvature.vjp([u])[0], columns.T @ u) < TOLERANCE


@pytest.mark.parametrize("schedule", ["lean", "fast", "cached", "auto"])
@pytest.mark.parametrize("globs", [["*.1.mlp.*"], ["*.0.self_attn.o_proj.*", "*.1.*norm*"]])
def test_every_schedule_gives_the_same_alone_together_and_again(
    globs: list[str], schedule: Any
) -> None:
    problem, _ = model("llama")
    names = chosen(problem, globs)
    part = dense("llama")["hessian"][indices(problem, names)][:, indices(problem, names)]
    curvature = curvature_of(problem, names, schedule=schedule)
    vectors = probes(curvature.space, 3)
    for _ in range(2):
        for v, product in zip(vectors, curvature.hvp(vectors), strict=True):
            assert relative_error(product, part @ v) < TOLERANCE
        for v in vectors:
            assert relative_error(curvature.hvp([v])[0], part @ v) < TOLERANCE
        curvature.ggn(vectors[:1])  # between, which keeps other things


def test_all_parameters_selected_are_the_operator_itself_to_the_last_bit() -> None:
    problem, _ = model("llama")
    selected, all_of_it = curvature_of(problem, list(problem.parameters)), problem.curvature(2)
    assert selected.space.layout.parameters == all_of_it.space.layout.parameters
    (v,) = probes(selected.space, 1)
    assert torch.equal(selected.hvp([v])[0], all_of_it.hvp([v])[0])


MODULES = {
    "a first layer": ["0.*"],
    "a last layer": ["4.*"],
    "a middle layer": ["2.weight"],
    "biases": ["*.bias"],
}


@pytest.mark.parametrize("globs", MODULES.values(), ids=MODULES)
@pytest.mark.parametrize("traced", [True, False])
def test_plain_modules_too_traced_or_not(
    monkeypatch: pytest.MonkeyPatch, globs: list[str], traced: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 4, generator=generator, dtype=torch.float64)
    targets = torch.randint(3, (7,), generator=generator)
    net = nn.Sequential(
        nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.Softplus(), nn.Linear(4, 3)
    ).double()
    problem = module_problem(net, CrossEntropy(), x, targets)
    if not traced:
        for name in ("trace_block", "trace_head"):

            def fail(*args: Any) -> Any:
                raise RuntimeError("no trace today")

            monkeypatch.setattr(f"hvp_core.autodiff.builder.{name}", fail)
    names = chosen(problem, globs)
    at = indices(problem, names)

    def outputs(flat: Tensor) -> Tensor:
        return torch.func.functional_call(net, references.unflatten(flat, problem.parameters), (x,))

    def loss(flat: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs(flat), targets)

    curvature = curvature_of(problem, names, 3, strict=traced)
    v = curvature.space.random(1, "gaussian")
    hessian = torch.func.hessian(loss)(problem.flat)[at][:, at]
    jacobian = torch.func.jacrev(outputs)(problem.flat)[..., at]
    u = curvature.output_space.random(3, "gaussian")
    assert relative_error(curvature.hvp([v])[0], hessian @ v) < TOLERANCE
    assert relative_error(curvature.gradient(), torch.func.grad(loss)(problem.flat)[at]) < TOLERANCE
    assert relative_error(curvature.jvp([v])[0], (jacobian @ v).flatten()) < TOLERANCE
    back = torch.einsum("rcn,rc->n", jacobian, u.view(7, 3))
    assert relative_error(curvature.vjp([u])[0], back) < TOLERANCE


class Rounded(nn.Module):
    """Has no second derivative that torch knows, nor even a forward one."""

    def forward(self, x: Tensor) -> Tensor:
        return NoDerivative.apply(x)


class NoDerivative(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass


def test_what_lies_before_the_selection_needs_no_derivative() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    targets = torch.randint(3, (6,), generator=generator)
    front = nn.Linear(4, 5).double()
    net = nn.Sequential(front, Rounded(), nn.Linear(5, 3)).double()
    problem = module_problem(net, CrossEntropy(), x, targets)
    with pytest.raises(CurvatureError):
        curvature_of(problem, list(problem.parameters), strict=False).hvp([problem.flat])
    head = curvature_of(problem, ["2.weight"], strict=False)
    v = head.space.random(1, "gaussian")
    inner, bias = front(x).detach().sign(), problem.parameters["2.bias"]

    def loss(weight: Tensor) -> Tensor:
        return nn.functional.cross_entropy(inner @ weight.view(3, 5).T + bias, targets)

    hessian = torch.func.hessian(loss)(problem.parameters["2.weight"].flatten())
    assert relative_error(head.hvp([v])[0], hessian @ v) < TOLERANCE


def flops(run: Any) -> int:
    """FLOP of matrix products with parameters: attention's are batched and not counted."""
    with FlopCounterMode(display=False) as counter:
        run()
    counts = counter.get_flop_counts()["Global"]
    return sum(n for op, n in counts.items() if "bmm" not in str(op))


def layered(depth: int) -> Problem:
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(16, 16, bias=False), nn.Tanh()]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 16, generator=generator, dtype=torch.float64)
    targets = torch.randint(16, (8,), generator=generator)
    net = nn.Sequential(*layers, nn.Linear(16, 16, bias=False), nn.Tanh()).double()
    return module_problem(net, CrossEntropy(), x, targets)


def test_a_selection_takes_no_more_matrix_products_than_it_needs() -> None:
    depth = 6
    problem = layered(depth)
    unit = 2 * 16 * 16 * 8  # one matrix product of one layer
    everything = curvature_of(problem, list(problem.parameters), 8, schedule="fast")
    last = curvature_of(problem, [f"{2 * depth}.weight"], 8, schedule="fast")
    middle = curvature_of(problem, ["6.weight"], 8, schedule="fast")
    spent = {}
    for name, curvature in [("all", everything), ("last", last), ("middle", middle)]:
        (v,) = probes(curvature.space, 1)
        curvature.hvp([v])  # finds its way, and the values of what lies before the selection
        spent[name] = flops(lambda curvature=curvature, v=v: curvature.hvp([v]))
    # Of a layer's products y, ẏ = xVᵀ + ẋWᵀ, dx, ḋx = ḋyW + dyV and ḋW = ḋyᵀx + dyᵀẋ the first,
    # whose input is data, has y, xVᵀ and ḋyᵀx alone.
    assert spent["all"] == (8 * depth + 3) * unit
    # The last one's input is data too, and nothing is computed before.
    assert spent["last"] == 3 * unit
    # The layers behind are constants: y, ẋWᵀ, dyW and ḋyW.
    assert spent["middle"] == (3 + 4 * 3) * unit


def test_values_before_the_selection_are_computed_once_and_dropped_when_the_point_moves() -> None:
    problem = layered(4)
    curvature = curvature_of(problem, ["8.weight"], 3, schedule="fast")
    (v,) = probes(curvature.space, 1)
    before = curvature.hvp([v])[0]
    first = flops(lambda: curvature.hvp([v]))
    curvature.release()
    assert flops(lambda: curvature.hvp([v])) == first + 4 * 2 * 16 * 16 * 8
    curvature.parameters = problem.flat * 1.5
    moved = Problem(
        problem.chain,
        {name: 1.5 * each for name, each in problem.parameters.items()},
        problem.batch,
    )
    fresh = curvature_of(moved, ["8.weight"], 3)
    assert torch.equal(curvature.hvp([v])[0], fresh.hvp([v])[0])
    assert relative_error(curvature.hvp([v])[0], before) > 0.01
    assert curvature.loss() == fresh.loss()


def test_a_selection_starts_at_its_own_zero_and_takes_its_part_of_the_point() -> None:
    problem, _ = model("gpt2")
    names = chosen(problem, ["*.bias"])
    curvature = curvature_of(problem, names)
    space = problem.curvature(2).space
    offsets = [each.offset for each in curvature.space.layout.parameters]
    assert offsets[0] == 0
    assert [each.name for each in curvature.space.layout.parameters] == names
    part = part_of(space, space.from_flat(problem.flat), curvature.space)
    assert torch.equal(part, problem.flat[indices(problem, names)])
    alone = ParameterSpace(Layout({"a": (len(part),)}, [["a"]], 1), Alone(), torch.float64, CPU)
    assert torch.equal(curvature.space.random(3, "gaussian"), alone.random(3, "gaussian"))


def test_values_where_the_selection_begins_do_not_depend_on_micro_batches() -> None:
    problem, _ = model("llama")
    names = chosen(problem, ["model.layers.1.mlp.*"])
    one = curvature_of(problem, names, 1)
    (v,) = probes(one.space, 1)
    assert relative_error(curvature_of(problem, names, 5).hvp([v])[0], one.hvp([v])[0]) < 1e-12
