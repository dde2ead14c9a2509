"""A diagonal that is extended: one long run of random signs, or the mean of two estimates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hvp_core.linop.linear_operator import LinearOperator
from hvp_core.runs.algorithm import Found
from hvp_core.sharding.collective import Alone
from hvp_operations.checking import Seed
from hvp_operations.diagonal import OPERATION, DiagonalSpec
from torch import Tensor

from tests.core.dense import DenseOperator, QuickSpace
from tests.core.extended import answer, going_on
from tests.core.spectra import matrix
from tests.core.test_diagonal_estimates import (
    PLENTY,
    SKETCH_OF_EIGHT,
    SPECTRUM,
    Answer,
    N,
    noisy,
    signs,
)
from tests.core.test_sharded_runs import SHAPES, ShardedMatrix
from tests.core.written import is_same, run

A = matrix(SPECTRUM)


def found(
    operator: LinearOperator | Tensor,
    spec: DiagonalSpec,
    earlier: Answer | None = None,
    num_vectors: int = PLENTY,
) -> Answer:
    operator = DenseOperator(operator) if isinstance(operator, Tensor) else operator
    before = None
    if earlier is not None:
        before = Found(result=earlier.result, vectors=[earlier.diagonal, earlier.error])
    made = answer(going_on(OPERATION, spec, operator, before, num_vectors=num_vectors), operator)
    return Answer(made.result, *made.vectors)


def spec_of(method: Any, max_products: int, seed: int = 0, **more: Any) -> DiagonalSpec:
    values = {"rtol": 1e-9, **more}
    return DiagonalSpec(method, max_products=max_products, seed=Seed(seed), **values)


def test_random_signs_that_are_gone_on_with_are_those_of_one_long_run() -> None:
    short = found(A, spec_of("hutchinson", 24))
    longer = found(A, spec_of("hutchinson", 16), short)
    again = found(A, spec_of("hutchinson", 8), longer)
    whole = found(A, spec_of("hutchinson", 48))
    samples = torch.stack([signs(index) * (A @ signs(index)) for index in range(48)])
    torch.testing.assert_close(again.diagonal, samples.mean(0), rtol=0, atol=1e-13)
    torch.testing.assert_close(again.error, samples.std(0) / 48**0.5, rtol=1e-11, atol=0)
    assert (longer.result.num_products, again.result.num_products) == (16, 8)
    assert (again.result.num_probes, again.result.num_samples) == (48, 48)
    for name, value in vars(whole.result).items():
        if name not in ("num_products", "reason", "provenance", "parts"):
            expected = pytest.approx(value, rel=1e-11) if isinstance(value, float) else value
            assert getattr(again.result, name) == expected, name


def test_a_diagonal_by_default_goes_on_by_the_method_that_its_samples_are_of() -> None:
    short = found(A, spec_of("auto", 24), num_vectors=12)  # no room for a sketch
    longer = found(A, spec_of("auto", 16), short)
    assert (short.result.method, longer.result.method) == ("hutchinson", "hutchinson")
    assert longer.result.reason == "it goes on from samples of this method"
    assert longer.result.num_samples == 40


def test_a_sketch_is_extended_by_another_one_and_the_mean_has_the_least_variance() -> None:
    spec = spec_of("xdiag", 24)
    short = found(A, spec)
    longer = found(A, spec_of("xdiag", 40), short)
    # The new run's own estimate: of signs that are none of the first run's.
    new = found(A, spec_of("xdiag", 40, seed=12 * 0x9E3779B97F4A7C15 % 2**64))
    assert short.result.num_probes == 12
    e, f = (float(each.error.norm()) for each in (short, new))
    w = e**2 / (e**2 + f**2)
    torch.testing.assert_close(longer.diagonal, w * new.diagonal + (1 - w) * short.diagonal)
    error = ((w * new.error) ** 2 + ((1 - w) * short.error) ** 2).sqrt()
    torch.testing.assert_close(longer.error, error)
    assert float(longer.error.norm()) == pytest.approx(1 / math.hypot(1 / e, 1 / f))
    assert float(longer.error.norm()) < min(e, f)
    result = longer.result
    assert (result.num_products, result.num_probes, result.num_samples) == (40, 32, 0)
    assert result.provenance["share_of_this_run"] == f"{w:.3f}"
    assert result.reason.endswith(
        "the answer is the mean with that of the job that it goes on from"
    )


def test_a_mean_of_estimates_meets_the_tolerance_with_what_is_missing() -> None:
    a = A + 10 * torch.eye(N).double()
    short = found(a, spec_of("xdiag", 40), num_vectors=SKETCH_OF_EIGHT)
    rtol = 0.8 * short.result.relative_standard_error
    longer = found(a, spec_of("xdiag", 59, rtol=rtol), short, SKETCH_OF_EIGHT)
    whole = found(a, spec_of("xdiag", 59, rtol=rtol), None, SKETCH_OF_EIGHT)
    assert longer.result.outcome == whole.result.outcome == "CONVERGED"
    assert longer.result.relative_standard_error <= rtol
    # A sketch that was full is no better the second time, and costs its products again.
    assert longer.result.num_products <= 0.6 * whole.result.num_products
    assert whole.result.num_products < 40 + longer.result.num_products
    exact = found(a, spec_of("xdiag", 400), short, SKETCH_OF_EIGHT)
    assert exact.result.method == "exact"
    torch.testing.assert_close(exact.diagonal, a.diagonal(), rtol=0, atol=1e-12)
    assert float(exact.error.norm()) == 0


@pytest.mark.parametrize("method", ["hutchinson", "xdiag"])
@pytest.mark.parametrize("count", [25, pytest.param(400, marks=pytest.mark.slow)])
def test_intervals_of_extended_runs_hold_their_elements(method: str, count: int) -> None:
    operator, inside = DenseOperator(A, QuickSpace(N)), 0.0
    total, squares = torch.zeros(N).double(), torch.zeros(N).double()
    for seed in range(count):
        short = found(operator, spec_of(method, 24, seed))
        longer = found(operator, spec_of(method, 16, seed), short)
        inside += longer.within(A.diagonal()) / count
        total += longer.diagonal - A.diagonal()
        squares += (longer.diagonal - A.diagonal()) ** 2
    assert 0.93 <= inside <= 0.99
    z = total / squares.sqrt()
    assert float(z.abs().max()) < 4.75  # but with a chance of 1e-4
    assert float(z.square().mean()) < 2


def test_of_a_coarse_operator_the_mean_is_one_of_the_exact_diagonal() -> None:
    # Nearly diagonal, so that samples are so close together that a shift of 5 % shows.
    a, inside = torch.diag(10 + SPECTRUM) + 0.01 * A, 0.0
    for seed in range(10):
        operator = noisy(a, 0.05)
        short = found(operator, spec_of("hutchinson", 40, seed))
        longer = found(operator, spec_of("hutchinson", 40, seed), short)
        corrections = [each.result.num_corrections for each in (short, longer)]
        assert short.result.num_samples == longer.result.num_samples == 0
        assert corrections[0] >= 4
        assert corrections[1] >= corrections[0] + 4
        assert float((longer.diagonal - a.diagonal()).norm()) <= 0.04 * longer.result.norm
        inside += longer.within(a.diagonal()) / 10
    assert 0.9 <= inside <= 0.995


def test_coarse_samples_that_were_not_compared_are_compared_by_the_extension() -> None:
    a = torch.diag(10 + SPECTRUM) + 0.01 * A
    blind = found(noisy(a, 0.05, exact=None), spec_of("hutchinson", 20))
    assert (blind.result.outcome, blind.result.num_samples) == ("UNVERIFIED", 20)
    longer = found(noisy(a, 0.05), spec_of("hutchinson", 30, rtol=0.02), blind)
    assert longer.result.outcome == "CONVERGED"
    assert longer.result.num_corrections >= 4
    assert longer.within(a.diagonal()) >= 0.8
    assert float((longer.diagonal - a.diagonal()).norm()) <= 0.04 * longer.result.norm


class Coarse(ShardedMatrix):
    """Products that are too large by a part in a hundred, beside the true ones."""

    noise = 0.01

    def apply(self, vectors: Sequence[Tensor], *, borrow: bool = False) -> list[Tensor]:
        return [1.01 * each for each in super().apply(vectors, borrow=borrow)]

    def exact(self) -> LinearOperator:
        return ShardedMatrix(self._a, Alone())


@pytest.mark.parametrize("kind", [ShardedMatrix, Coarse])
def test_sums_over_parts_go_on_as_the_diagonal_does(kind: type[ShardedMatrix]) -> None:
    n = 91
    operator = kind(matrix(torch.linspace(1, 3, n).double()), Alone())
    spec = spec_of("auto", 40, per="tensor")
    short = found(operator, spec)
    longer = found(operator, replace(spec, max_products=30), short)
    sizes = [math.prod(shape) for shape in SHAPES.values()]
    assert [each.name for each in longer.result.parts] == list(SHAPES)
    flat = operator.space.to_flat(longer.diagonal)
    for part, before, block, true in zip(
        longer.result.parts,
        short.result.parts,
        flat.split(sizes),
        matrix(torch.linspace(1, 3, n).double()).diagonal().split(sizes),
        strict=True,
    ):
        assert part.value == pytest.approx(float(block.sum()), rel=1e-12)
        assert abs(part.value - float(true.sum())) <= 4 * part.standard_error
        assert 0 < part.standard_error < 1.1 * before.standard_error
        assert part.high - part.low < 1.1 * (before.high - before.low)
    if kind is ShardedMatrix:
        whole = found(operator, replace(spec, max_products=70)).result
        for part, other in zip(longer.result.parts, whole.parts, strict=True):
            numbers = [vars(each) for each in (part, other)]
            assert numbers[0] == {
                **numbers[1],
                **{
                    name: pytest.approx(numbers[1][name], rel=1e-9)
                    for name in ("value", "standard_error", "low", "high")
                },
            }


def test_an_extension_goes_through_its_snapshots_like_any_run() -> None:
    for method, num_vectors in (("hutchinson", PLENTY), ("xdiag", SKETCH_OF_EIGHT)):
        spec = spec_of(method, 40)
        operator = DenseOperator(A)
        short = answer(going_on(OPERATION, spec, operator, None, num_vectors=num_vectors), operator)
        algorithm = going_on(OPERATION, spec, operator, short, num_vectors=num_vectors)
        _, one, _ = run(algorithm, operator, interrupted=False)
        _, other, _ = run(algorithm, operator, interrupted=True)
        assert is_same(vars(one.result), vars(other.result))
        assert is_same(list(one.vectors), list(other.vectors))


def test_what_more_signs_add_nothing_to_is_not_extended() -> None:
    assert OPERATION.extension is not None
    refusal, spec = OPERATION.extension.refusal, DiagonalSpec()
    exact = found(A, spec_of("auto", 300))
    assert exact.result.method == "exact"
    assert "its standard error is 0" in refusal(spec, exact.result)
    blind = found(noisy(A, 0.05, exact=None), spec_of("xdiag", 30))
    assert blind.result.outcome == "UNVERIFIED"
    assert "not compared with exact ones" in refusal(spec, blind.result)
    plain = found(noisy(A, 0.05, exact=None), spec_of("hutchinson", 30))
    assert (plain.result.outcome, plain.result.num_samples) == ("UNVERIFIED", 30)
    assert not refusal(spec, plain.result)
    old = replace(found(noisy(A, 0.05), spec_of("hutchinson", 30)).result, num_corrections=0)
    assert "another version's" in refusal(spec, old)
