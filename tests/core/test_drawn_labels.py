"""The Fisher matrix of labels drawn from the model: what it is made of, and its expectation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hvp_core.autodiff import looks
from hvp_core.autodiff.product_spec import Draws
from hvp_core.curvature.curvature import Curvature
from hvp_core.curvature.drawn_labels import uniform_numbers
from hvp_core.errors import CurvatureError
from hvp_core.losses.loss import (
    CrossEntropy,
    Logistic,
    Loss,
    MeanSquaredError,
    OwnLoss,
    SquaredError,
)
from hvp_core.settings import ComputeSettings
from torch import Tensor, nn

from tests.core.problems import CPU, Problem, llama_problem, module_problem, ragged_tokens
from tests.core.references import empirical_fisher, relative_error, unflatten
from tests.core.test_gauss_newton import DECODERS, data
from tests.core.test_schedules import SCHEDULES, curvature_of, distance
from tests.core.test_schedules import probes as probes_of
from tests.core.test_selected_parameters import indices
from tests.core.test_what_is_kept import Smoothed

EXACT = 1e-10
TWO = Draws(seed=7, num_samples=2)


LOSSES: dict[str, tuple[Loss, Tensor]] = {
    "squared error": (SquaredError(), data(5, 2)),
    "mean squared error": (MeanSquaredError(), data(5, 2)),
    "logistic": (Logistic(), (data(5, 2) > 0).double()),
    "cross-entropy": (CrossEntropy(), torch.tensor([0, 1, -100, 1, 0])),
}


def of_a_network(
    loss: Loss, targets: Tensor, width: int = 2, dtype: torch.dtype = torch.float64
) -> Problem:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, width)).to(dtype)
    return module_problem(module, loss, data(len(targets), 3).to(dtype), targets)


def of_many_classes(dtype: torch.dtype = torch.float64) -> Problem:
    """Labels of 20 rows, every fifth of them ignored."""
    targets = torch.arange(20) % 6
    targets[::5] = -100
    return of_a_network(CrossEntropy(), targets, 6, dtype)


def drawn(problem: Problem, draws: Draws, micro_batch_size: int = 5) -> Tensor:
    """The labels of the whole batch, (rows, ..., S)."""
    return torch.cat(problem.curvature(micro_batch_size).labels.draw(draws))


def dense(name: str, problem: Problem, draws: Draws) -> Tensor:
    """By the gradient of each target's cross-entropy, with each of its labels."""
    _, reference, config = DECODERS[name]
    ids, _, mask = ragged_tokens()
    total = torch.zeros(())
    for targets in drawn(problem, draws).unbind(-1):
        labels = torch.cat((torch.full((5, 1), -100), targets[:, :-1]), 1)
        total = total + empirical_fisher(
            lambda p: reference(p, ids, mask, config()),
            labels,
            problem.parameters,
            problem.flat,
            "token",
        )
    return total / draws.num_samples


@pytest.mark.slow  # of one draw and of some parameters, tests/core/test_selected_parameters.py
@pytest.mark.parametrize("name", DECODERS)
def test_of_a_decoder_it_is_made_of_the_gradients_of_the_drawn_labels(name: str) -> None:
    problem = DECODERS[name][0]()
    probes, matrix = probes_of(problem, 2), dense(name, problem, TWO)
    expected = [matrix @ each for each in probes]
    curvature = problem.curvature(2)  # the last has one row
    assert distance(curvature.product("fisher", probes, draws=TWO), expected) < EXACT
    forms = curvature.quadratic("fisher", probes, draws=TWO)
    assert forms == pytest.approx([float(v @ matrix @ v) for v in probes], rel=EXACT)


@pytest.mark.slow
def test_of_a_decoder_it_does_not_depend_on_how_the_batch_is_cut() -> None:
    problem, in_pieces = llama_problem(), llama_problem(positions_at_once=4)  # of six
    labels, probes = drawn(problem, TWO), probes_of(problem, 2)
    expected = problem.curvature(5).product("fisher", probes, draws=TWO)
    for micro_batch_size in (1, 2, 3):
        for each in (problem, in_pieces):
            curvature = each.curvature(micro_batch_size)
            assert distance(curvature.product("fisher", probes, draws=TWO), expected) < EXACT
            assert torch.equal(torch.cat(curvature.labels[TWO]), labels)


def test_it_does_not_depend_on_the_size_of_a_micro_batch() -> None:
    problem = of_many_classes()
    labels, probes = drawn(problem, TWO, 20), probes_of(problem, 2)
    expected = problem.curvature(20).product("fisher", probes, draws=TWO)
    for micro_batch_size in (3, 16):
        curvature = problem.curvature(micro_batch_size)
        assert distance(curvature.product("fisher", probes, draws=TWO), expected) < EXACT
        assert torch.equal(torch.cat(curvature.labels[TWO]), labels)


def test_more_draws_begin_with_fewer_and_what_is_ignored_stays_so() -> None:
    problem = of_many_classes()
    few, many = drawn(problem, Draws(3, 2)), drawn(problem, Draws(3, 9))
    assert torch.equal(many[..., :2], few)
    ignored = problem.batch.targets == -100
    assert bool((many[ignored] == -100).all())
    assert bool((many[~ignored] >= 0).all())
    assert len({tuple(each) for each in many[~ignored].T.tolist()}) == 9  # no draw is another


def test_another_seed_is_another_matrix_and_the_same_one_the_same() -> None:
    problem = of_many_classes()
    probes, curvature = probes_of(problem, 1), problem.curvature(20)
    found = {
        seed: curvature.product("fisher", probes, draws=Draws(seed))
        for seed in (0, 1, 2, 3, 4, 5, 2**64 - 1)  # more sets than are kept
    }
    assert distance(found[0], found[1]) > 0.1
    assert distance(found[2**64 - 1], found[5]) > 0.1
    for seed, products in found.items():
        again = curvature.product("fisher", probes, draws=Draws(seed))
        assert distance(again, products) < 1e-13
    curvature.product("fisher", probes)  # by default the seed is 0
    assert distance(curvature.product("fisher", probes), found[0]) < 1e-13


def outputs(problem: Problem, flat: Tensor) -> Tensor:
    p, x = unflatten(flat, problem.parameters), problem.batch.inputs["x"]
    return torch.tanh(x @ p["0.weight"].T + p["0.bias"]) @ p["2.weight"].T + p["2.bias"]


def target_losses(name: str, z: Tensor, targets: Tensor) -> Tensor:
    """The loss of each target, by its formula."""
    if name == "squared error":
        return (z - targets).square().sum(1) / 2
    if name == "mean squared error":
        return (z - targets).square().flatten()
    if name == "cross-entropy":
        return nn.functional.cross_entropy(z, targets, reduction="none", ignore_index=-100)
    return (nn.functional.softplus(z) - targets * z).flatten()


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "way"),
    [
        *[(name, "traced") for name in ("mean squared error", "cross-entropy")],
        *[pytest.param(name, "traced", marks=SLOW) for name in ("squared error", "logistic")],
        ("cross-entropy", "by torch"),
        *[pytest.param(name, "by torch", marks=SLOW) for name in list(LOSSES)[:3]],
    ],
)
def test_it_is_right_for_every_loss_traced_or_not(
    monkeypatch: pytest.MonkeyPatch, name: str, way: str
) -> None:
    if way == "by torch":

        def refuse(*_: Any) -> Any:
            raise RuntimeError("nothing is traced")

        monkeypatch.setattr(looks, "trace_graph", refuse)
    loss, targets = LOSSES[name]
    problem, draws = of_a_network(loss, targets), Draws(1, 3)
    curvature = problem.curvature(2, strict=way == "traced")
    expected = torch.zeros(())
    for labels in torch.cat(curvature.labels.draw(draws)).unbind(-1):
        gradients = torch.func.jacrev(
            lambda flat, labels=labels: target_losses(name, outputs(problem, flat), labels)
        )(problem.flat)
        expected = expected + gradients.T @ gradients / loss.weight(targets) / 3
    basis = list(torch.eye(problem.flat.numel(), dtype=torch.float64))
    found = torch.stack(curvature.product("fisher", basis, draws=draws))
    assert relative_error(found, expected) < EXACT
    alone = [curvature.product("fisher", [each], draws=draws)[0] for each in basis[:3]]
    assert relative_error(torch.stack(alone), expected[:3]) < EXACT
    forms = torch.tensor(curvature.quadratic("fisher", basis, draws=draws), dtype=torch.float64)
    assert relative_error(forms, expected.diagonal()) < EXACT


@pytest.mark.parametrize(
    "name",
    [
        "mean squared error",
        "cross-entropy",
        *[pytest.param(name, marks=SLOW) for name in ("squared error", "logistic")],
    ],
)
def test_its_mean_over_the_draws_is_the_gauss_newton_matrix(name: str) -> None:
    loss, targets = LOSSES[name]
    problem = of_a_network(loss, targets)
    curvature = problem.curvature(5)
    basis = list(torch.eye(problem.flat.numel(), dtype=torch.float64))
    ggn = torch.stack(curvature.ggn(basis))
    matrices = torch.stack(
        [
            torch.stack(curvature.product("fisher", basis, draws=Draws(seed, 8)))
            for seed in range(40)
        ]
    )
    error = matrices.std(0) / math.sqrt(len(matrices))
    # Of 500 numbers that some ten draws make, the largest of a t of 39 degrees; some are always 0.
    assert bool(((matrices.mean(0) - ggn).abs() <= 5 * error + 1e-15).all())
    assert float(error.max()) < 0.1 * float(ggn.diagonal().max())


def test_labels_have_the_frequencies_that_the_model_says() -> None:
    problem, count = of_many_classes(), 20_000
    labels = torch.cat(problem.curvature(20).draw(Draws(11, count)))
    chances = outputs(problem, problem.flat).softmax(-1)
    counted = problem.batch.targets != -100
    for row, chance in zip(labels[counted], chances[counted], strict=True):
        frequency = row.bincount(minlength=len(chance)) / count
        deviation = (frequency - chance).abs() / (chance * (1 - chance) / count).sqrt()
        assert float(deviation.max()) < 5


def test_the_numbers_behind_the_labels_are_uniform_and_those_of_other_rows_others() -> None:
    numbers = uniform_numbers(Draws(5, 40), range(100), (25,), CPU)
    assert numbers.shape == (100, 25, 40, 2)
    assert numbers.dtype == torch.float64
    assert 0 < float(numbers.min()) < 1e-4
    assert 1 > float(numbers.max()) > 1 - 1e-4
    flat = numbers.flatten(0, 2)
    assert len(flat.unique()) == flat.numel()
    error = math.sqrt(1 / 12 / len(flat))
    assert float((flat.mean(0) - 0.5).abs().max()) < 4 * error
    assert float((flat.square().mean(0) - 1 / 3).abs().max()) < 4 * error
    assert abs(float(torch.corrcoef(flat.T)[0, 1])) < 4 / math.sqrt(len(flat))
    assert torch.equal(uniform_numbers(Draws(5, 40), range(30, 33), (25,), CPU), numbers[30:33])
    few = uniform_numbers(Draws(5, 2), range(9, 10), (25,), CPU)
    assert torch.equal(few, numbers[9:10, :, :2])
    others = uniform_numbers(Draws(6, 1), range(100), (25,), CPU)
    assert not bool((others == numbers[:, :, :1]).any())


def test_a_class_without_probability_is_never_drawn() -> None:
    torch.manual_seed(0)
    module = nn.Linear(3, 4).double()
    with torch.no_grad():
        module.bias[1] = module.bias[3] = -math.inf
    x, targets = data(4, 3), torch.tensor([0, 2, 0, 2])
    problem = module_problem(module, CrossEntropy(), x, targets)
    (labels,) = problem.curvature(4).draw(Draws(0, 500))
    assert set(labels.flatten().tolist()) == {0, 2}


def test_it_is_semidefinite_and_of_no_higher_rank_than_there_are_draws() -> None:
    problem = of_many_classes()
    probes = torch.stack(probes_of(problem, 30))
    gram = torch.stack(problem.curvature(20).product("fisher", list(probes))) @ probes.T
    assert relative_error(gram, gram.T) < 1e-11
    values = torch.linalg.eigvalsh(gram)
    assert float(values[0]) > -1e-12 * float(values[-1])
    targets = int((problem.batch.targets != -100).sum())
    assert int((values > 1e-10 * values[-1]).sum()) == targets < len(values)


def test_on_some_of_the_parameters_it_is_a_part_of_that_of_all() -> None:
    problem = of_many_classes()
    at = indices(problem, ["0.bias", "2.weight"])
    curvature = problem.curvature(2, selected=["0.bias", "2.weight"])
    assert torch.equal(torch.cat(curvature.labels.draw(TWO)), drawn(problem, TWO, 2))
    v = data(1, len(at))[0]
    whole = torch.zeros_like(problem.flat)
    whole[at] = v
    (expected,) = problem.curvature(2).product("fisher", [whole], draws=TWO)
    space = curvature.space
    (found,) = curvature.product("fisher", [space.from_flat(v)], draws=TWO)
    assert distance([space.to_flat(found)], [expected[at]]) < EXACT


def test_at_another_point_other_labels_are_drawn() -> None:
    problem = of_many_classes()
    probes = probes_of(problem, 1)
    curvature = problem.curvature(20)
    curvature.product("fisher", probes)
    curvature.parameters = -2 * problem.flat
    moved = replace(problem, parameters={n: -2 * each for n, each in problem.parameters.items()})
    expected = moved.curvature(20).product("fisher", probes)
    assert distance(curvature.product("fisher", probes), expected) < EXACT


def test_every_schedule_and_other_products_between_give_the_same() -> None:
    problem = of_many_classes()
    vectors = probes_of(problem, 3)
    other = Draws(1, 3)

    def products(curvature: Curvature) -> Sequence[Tensor]:
        return curvature.product("fisher", vectors, draws=TWO)

    lean = curvature_of(problem, 20, schedule="lean")
    expected, ggn = products(lean), lean.ggn(vectors)
    of_other = lean.product("fisher", vectors, draws=other)
    for schedule in SCHEDULES:
        curvature = curvature_of(problem, 20, schedule=schedule)
        for _ in range(2):
            assert distance(products(curvature), expected) < 1e-12
            assert distance(curvature.ggn(vectors), ggn) < 1e-12
            assert distance(curvature.product("fisher", vectors, draws=other), of_other) < 1e-12
            curvature.hvp(vectors[:1])


@pytest.mark.parametrize(("precision", "allowed"), [("bfloat16", 0.05), ("float64", 1e-5)])
def test_in_another_precision_it_is_the_same_matrix_where_labels_are_shared(
    precision: Any, allowed: float
) -> None:
    problem = of_many_classes(torch.float32)
    full, probes = problem.curvature(20), probes_of(problem, 2)
    expected = full.product("fisher", probes, draws=TWO)
    curvature = Curvature(
        problem.chain,
        full.space,
        problem.flat,
        problem.batch,
        20,
        ComputeSettings(precision=precision),
        labels=full.labels,
    )
    found = curvature.product("fisher", probes, draws=TWO)
    assert distance(found, expected) < allowed
    assert curvature.labels.draw(TWO) is full.labels.draw(TWO)


def test_a_loss_without_a_distribution_is_refused_by_name() -> None:
    smoothed = of_a_network(Smoothed(0.1), torch.tensor([0, 1, 1, 0, 1]))
    for ask in (smoothed.curvature(2).product, smoothed.curvature(2).quadratic):
        with pytest.raises(CurvatureError, match=r"Smoothed\(smoothing=0.1\).* the ggn") as e:
            ask("fisher", probes_of(smoothed, 1))
        assert e.value.reason == "LOSS_HAS_NO_DISTRIBUTION"

    class Mean(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).square().mean()

    own = module_problem(Mean(3, 1).double(), OwnLoss(), data(4, 3), torch.zeros(4).double())
    with pytest.raises(CurvatureError, match="returns its loss alone") as refused:
        own.curvature(4).product("fisher", probes_of(own, 1))
    assert refused.value.reason == "KIND_UNSUPPORTED"
