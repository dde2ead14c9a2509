"""The empirical Fisher matrix against the gradients of single examples, and the laws of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from hvp_core.autodiff import looks
from hvp_core.autodiff.passes import Passes
from hvp_core.autodiff.product_spec import FISHER_SEQUENCE, GGN, ProductSpec, Unit
from hvp_core.losses.loss import CrossEntropy, Logistic, Loss, SquaredError
from hvp_core.model.data import token_batch
from torch import Tensor, nn

from tests.core.problems import Problem, llama_config, llama_problem, module_problem, ragged_tokens
from tests.core.references import empirical_fisher, llama, relative_error, unflatten
from tests.core.test_gauss_newton import DECODERS, data, probes_of
from tests.core.test_schedules import SCHEDULES, curvature_of, distance

EXACT = 1e-9
UNITS: tuple[Unit, ...] = get_args(Unit)


def dense(name: str, problem: Problem, unit: Unit) -> Tensor:
    _, reference, config = DECODERS[name]
    ids, labels, mask = ragged_tokens()
    return empirical_fisher(
        lambda p: reference(p, ids, mask, config()), labels, problem.parameters, problem.flat, unit
    )


@pytest.mark.parametrize(
    "name",
    [pytest.param(each, marks=[pytest.mark.slow] * (each == "llama")) for each in DECODERS],
)
@pytest.mark.parametrize("unit", UNITS)
def test_of_a_decoder_it_is_made_of_the_gradients_of_single_units(name: str, unit: Unit) -> None:
    problem = DECODERS[name][0]()
    probes = probes_of(problem, 3)
    expected = [dense(name, problem, unit) @ each for each in probes]
    for micro_batch_size in (1, 2, 3, 5):  # the last of two has one row, that of three has two
        curvature = problem.curvature(micro_batch_size)
        assert distance(curvature.empirical_fisher(probes, unit), expected) < EXACT
        assert distance(curvature.empirical_fisher(probes[:1], unit), expected[:1]) < EXACT


@pytest.mark.parametrize("unit", UNITS)
def test_the_head_in_pieces_sees_whole_rows(unit: Unit) -> None:
    problem = llama_problem(positions_at_once=4)  # of six: the last has two
    probes = probes_of(problem, 2)
    expected = [dense("llama", problem, unit) @ each for each in probes]
    curvature = problem.curvature(2)
    assert distance(curvature.empirical_fisher(probes, unit), expected) < EXACT
    assert distance(curvature.empirical_fisher(probes[:1], unit), expected[:1]) < EXACT


LOSSES: dict[str, tuple[Loss, Tensor]] = {
    "squared error": (SquaredError(), data(5, 2)),
    "logistic": (Logistic(), (data(5, 2) > 0).double()),
    "cross-entropy": (CrossEntropy(), torch.tensor([0, 1, -100, 1, 0])),
}


def of_a_network(loss: Loss, targets: Tensor) -> Problem:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    return module_problem(module, loss, data(5, 3), targets)


def unit_losses(problem: Problem, name: str, unit: Unit) -> Any:
    """Losses of the units by the loss's formula, as a function of the flat parameters."""
    targets, x = problem.batch.targets, problem.batch.inputs["x"]

    def losses(flat: Tensor) -> Tensor:
        p = unflatten(flat, problem.parameters)
        z = torch.tanh(x @ p["0.weight"].T + p["0.bias"]) @ p["2.weight"].T + p["2.bias"]
        if name == "squared error":
            return (z - targets).square().sum(1) / 2
        if name == "cross-entropy":
            return nn.functional.cross_entropy(z, targets, reduction="none", ignore_index=-100)
        each = nn.functional.softplus(z) - targets * z
        return each.flatten() if unit == "token" else each.sum(1)

    return losses


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("way", ["traced", "by torch"])
def test_it_is_right_for_every_loss_traced_or_not(
    monkeypatch: pytest.MonkeyPatch, name: str, unit: Unit, way: str
) -> None:
    if way == "by torch":

        def refuse(*_: Any) -> Any:
            raise RuntimeError("nothing is traced")

        monkeypatch.setattr(looks, "trace_graph", refuse)
    loss, targets = LOSSES[name]
    problem = of_a_network(loss, targets)
    gradients = torch.func.jacrev(unit_losses(problem, name, unit))(problem.flat)
    expected = gradients.T @ gradients / loss.weight(targets)
    basis = list(torch.eye(problem.flat.numel(), dtype=torch.float64))
    curvature = problem.curvature(2, strict=way == "traced")
    assert relative_error(torch.stack(curvature.empirical_fisher(basis, unit)), expected) < EXACT
    alone = torch.stack([curvature.empirical_fisher([each], unit)[0] for each in basis[:3]])
    assert relative_error(alone, expected[:3]) < EXACT
    kind: Any = f"empirical_fisher_{unit}"
    forms = torch.tensor(curvature.quadratic(kind, basis), dtype=torch.float64)
    assert relative_error(forms, expected.diagonal()) < EXACT


@pytest.mark.parametrize("unit", UNITS)
def test_it_is_symmetric_without_negative_direction_and_of_the_rank_of_its_units(
    unit: Unit,
) -> None:
    problem = llama_problem()
    labels = ragged_tokens()[1]
    counted = (labels[:, 1:] != -100).sum(1)
    curvature = problem.curvature(2)
    probes = torch.stack(probes_of(problem, 24))
    gram = torch.stack(curvature.empirical_fisher(list(probes), unit)) @ probes.T
    assert relative_error(gram, gram.T) < 1e-11
    values = torch.linalg.eigvalsh(gram)
    assert float(values[0]) > -1e-12 * float(values[-1])
    units = int(counted.sum()) if unit == "token" else int((counted > 0).sum())
    assert int((values > 1e-10 * values[-1]).sum()) == units < len(values)


def test_with_one_target_a_row_both_units_give_one_matrix() -> None:
    ids, labels, mask = ragged_tokens()
    labels[:] = -100
    labels[torch.arange(5), torch.tensor([3, 2, 5, 1, 4])] = 7
    base = llama_problem()
    problem = Problem(base.chain, base.parameters, token_batch(ids, labels, mask))
    curvature, probes = problem.curvature(2), probes_of(problem, 2)
    token, sequence = (curvature.empirical_fisher(probes, unit) for unit in UNITS)
    assert distance(sequence, token) < 1e-13


def test_a_row_without_a_target_adds_nothing() -> None:
    ids, labels, mask = ragged_tokens()
    labels[3] = -100
    base = llama_problem()
    probes = probes_of(base, 1)

    def found(rows: Sequence[int]) -> list[Tensor]:
        batch = token_batch(ids[rows], labels[rows], mask[rows])
        curvature = Problem(base.chain, base.parameters, batch).curvature(2)
        return [curvature.empirical_fisher(probes, unit)[0] for unit in UNITS]

    assert distance(found([0, 1, 2, 3, 4]), found([0, 1, 2, 4])) < 1e-12


def test_over_labels_drawn_from_the_model_its_mean_is_the_gauss_newton_matrix() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x = data(1, 3)
    chances = module(x).softmax(-1)[0].detach()
    (probe,) = probes_of(module_problem(module, CrossEntropy(), x, torch.tensor([0])), 1)
    problems = [module_problem(module, CrossEntropy(), x, torch.tensor([c])) for c in range(3)]
    mean = sum(
        p * each.curvature(1).empirical_fisher([probe], "token")[0]
        for p, each in zip(chances, problems, strict=True)
    )
    assert relative_error(torch.as_tensor(mean), problems[0].curvature(1).ggn([probe])[0]) < EXACT


@pytest.mark.parametrize("unit", UNITS)
def test_every_schedule_and_other_products_between_give_the_same(unit: Unit) -> None:
    problem = llama_problem()
    vectors = probes_of(problem, 3)
    expected = curvature_of(problem, 5, schedule="lean").empirical_fisher(vectors, unit)
    ggn = curvature_of(problem, 5, schedule="lean").ggn(vectors)
    for schedule in SCHEDULES:
        curvature = curvature_of(problem, 2, schedule=schedule)
        for _ in range(2):
            assert distance(curvature.empirical_fisher(vectors, unit), expected) < 1e-12
            assert distance(curvature.ggn(vectors), ggn) < 1e-12
            curvature.hvp(vectors[:1])
            assert distance(curvature.empirical_fisher(vectors[:1], unit), expected[:1]) < 1e-12


@pytest.mark.slow
def test_numbers_of_32_and_16_bits_agree_to_their_rounding() -> None:
    single, double = llama_problem(torch.float32), llama_problem()
    probes = probes_of(double, 1)
    for unit in UNITS:
        expected = double.curvature(2).empirical_fisher(probes, unit)
        found = single.curvature(2).empirical_fisher([each.float() for each in probes], unit)
        assert distance([each.double() for each in found], expected) < 1e-4
        rounded = curvature_of(single, precision="bfloat16")
        found = rounded.empirical_fisher([each.float() for each in probes], unit)
        assert distance([each.double() for each in found], expected) < 0.1
        wide = curvature_of(single, precision="float64")
        found = wide.empirical_fisher([each.float() for each in probes], unit)
        theta = Problem(
            double.chain, unflatten(single.flat.double(), double.parameters), double.batch
        )
        exact = theta.curvature(2).empirical_fisher(
            [each.float().double() for each in probes], unit
        )
        assert distance([each.double() for each in found], exact) < 1e-6


def test_a_specification_that_contradicts_itself_is_refused() -> None:
    rule, measure = GGN.cotangents, FISHER_SEQUENCE.measure
    for contradiction in (
        lambda: ProductSpec("", "", Passes("tangent", "none"), rule),
        lambda: ProductSpec("", "", Passes("tangent", "cotangent")),
        lambda: ProductSpec("", "", Passes("value", "pair"), rule),
        lambda: ProductSpec("", "", Passes("value", "none"), measure=measure),
        lambda: ProductSpec("", "", Passes("tangent", "cotangent"), rule, measure),
    ):
        with pytest.raises(ValueError, match=r"belong together|needs tangents|nothing to|go back"):
            contradiction()


@pytest.mark.parametrize("unit", UNITS)
def test_the_covariance_is_the_fisher_matrix_about_the_mean_gradient(unit: Unit) -> None:
    ids, labels, mask = ragged_tokens()
    labels[3] = -100  # a row without a target is no unit
    problem = replace(llama_problem(), batch=token_batch(ids, labels, mask))
    counted = labels[:, 1:] != -100
    fisher = empirical_fisher(
        lambda p: llama(p, ids, mask, llama_config()),
        labels,
        problem.parameters,
        problem.flat,
        unit,
    )
    gradient = problem.curvature(5).gradient()
    total = int(counted.sum())
    units = total if unit == "token" else 4
    # Σ (g − m)(g − m)ᵀ = Σ g gᵀ − U m mᵀ, and U m is the sum of the gradients.
    expected = fisher - total / units * torch.outer(gradient, gradient)
    probes = probes_of(problem, 3)
    for micro_batch_size in (1, 2, 5):
        curvature = problem.curvature(micro_batch_size)
        found = curvature.product(f"gradient_covariance_{unit}", probes)
        assert distance(found, [expected @ each for each in probes]) < EXACT
        forms = curvature.quadratic(f"gradient_covariance_{unit}", probes)
        assert forms == pytest.approx([float(v @ expected @ v) for v in probes], rel=EXACT)
    assert torch.linalg.eigvalsh(expected)[0] > -1e-12
    # At another point the mean is another.
    curvature.parameters = problem.flat * 1.1
    moved = curvature.gradient()
    again = curvature.product(f"gradient_covariance_{unit}", [moved])[0]
    plain = curvature.empirical_fisher([moved], unit)[0]
    assert distance([plain - again], [total / units * float(moved @ moved) * moved]) < EXACT
