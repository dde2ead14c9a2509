"""A trace of a function that is extended is made of the probes of both runs."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hvp_core.runs.algorithm import Budget, derived_seed, drive
from hvp_core.stochastic.trace_of import TraceOf
from hvp_operations.checking import Seed
from hvp_operations.density import MAX_NODES
from hvp_operations.students_t import student_t
from hvp_operations.trace_of import OPERATION, TraceOfResult, TraceOfSpec
from torch import Tensor

from tests.core.dense import DenseOperator, DenseSpace, QuickSpace
from tests.core.spectra import matrix
from tests.core.test_trace_of import FUNCTIONS, SPECTRUM, N, Together, true_value
from tests.core.written import is_same, run

A = matrix(SPECTRUM)
#: Of three distinct eigenvalues, whose form every probe knows exactly after three steps.
THREE = torch.tensor([0.25] * 30 + [1.0] * 14 + [3.0] * 8).double()


def configured(
    operator: DenseOperator, spec: TraceOfSpec, earlier: TraceOfResult | None = None
) -> TraceOf:
    budget = Budget(max_products=spec.max_products or 999, num_vectors=10**6, earlier=earlier)
    return TraceOf.configure(spec, operator, budget)


def found(
    operator: DenseOperator, spec: TraceOfSpec, earlier: TraceOfResult | None = None
) -> TraceOfResult:
    before = operator.count
    result: TraceOfResult = drive(configured(operator, spec, earlier), operator).result
    assert operator.count - before == result.num_products - result.num_exact_products
    return result


def form(a: Tensor, function: str, seed: int, index: int) -> float:
    """z·f(A)z of the probe of an index, by the dense matrix."""
    values, vectors = torch.linalg.eigh(a)
    z = DenseSpace(len(a)).random(derived_seed(seed, index), "rademacher")
    return float(((vectors.T @ z).square() * FUNCTIONS[function](values)).sum())


@pytest.mark.parametrize("function", ["log", "exp"])
@pytest.mark.parametrize("semidefinite", [True, False])
def test_an_extension_is_the_mean_over_the_probes_of_both_runs(
    function: Any, semidefinite: bool
) -> None:
    operator = Together(A, semidefinite=semidefinite)
    spec = TraceOfSpec(function, damping=3.0, max_products=90, num_steps=9, rtol=1e-9, seed=Seed(5))
    short = found(operator, spec)
    longer = found(operator, replace(spec, max_products=120), short)
    again = found(operator, replace(spec, max_products=9), longer)
    assert longer.probes[: short.num_probes] == short.probes
    assert short.num_probes < longer.num_probes < again.num_probes == len(again.probes)
    # The ends of the spectrum are not looked for again: all products go into probes.
    made = longer.probes[short.num_probes :]
    assert longer.num_products == sum(len(each.quadrature.nodes) for each in made) <= 120
    bounds = [(each.spectrum_low, each.spectrum_high) for each in (short, longer, again)]
    assert bounds == [bounds[0]] * 3
    for index, probe in enumerate(again.probes):
        assert (
            probe.low - 1e-9 <= form(A + 3 * torch.eye(N), function, 5, index) <= probe.high + 1e-9
        )
    values, lows, highs = (
        torch.tensor([getattr(each, name) for each in again.probes], dtype=torch.float64)
        for name in ("value", "low", "high")
    )
    count = len(values)
    assert again.value == pytest.approx(float(values.mean()), rel=1e-12)
    assert again.standard_error == pytest.approx(float(values.std()) / math.sqrt(count), rel=1e-9)
    halves = [student_t(count - 1) * float(ends.std()) / math.sqrt(count) for ends in (lows, highs)]
    assert again.low == pytest.approx(float(lows.mean()) - halves[0], rel=1e-9)
    assert again.high == pytest.approx(float(highs.mean()) + halves[1], rel=1e-9)
    open_still = again.quadrature_error + again.rounding
    assert open_still == pytest.approx(float((highs - lows).mean()) / 2, rel=1e-9)


def test_the_tolerance_is_that_of_all_probes_and_what_meets_it_takes_no_product() -> None:
    operator = Together(A)
    spec = TraceOfSpec("log", damping=0.1, rtol=0.1, max_products=2000, seed=Seed(3))
    rough = found(operator, spec)
    assert rough.outcome == "CONVERGED"
    fine = found(operator, replace(spec, rtol=0.05), rough)
    assert fine.outcome == "CONVERGED"
    assert fine.standard_error + fine.quadrature_error <= 0.05 * abs(fine.value)
    whole = found(operator, replace(spec, rtol=0.05))
    assert fine.num_products + rough.num_products <= 1.3 * whole.num_products
    nothing = found(operator, replace(spec, rtol=0.08), fine)
    assert nothing.num_products == 0
    assert nothing == replace(fine, num_products=0, provenance=nothing.provenance)


@pytest.mark.parametrize(
    ("count", "least", "most"), [(30, 24, 30), pytest.param(600, 552, 586, marks=pytest.mark.slow)]
)
def test_intervals_of_extended_runs_hold_the_truth(count: int, least: int, most: int) -> None:
    """In 95 of 100 runs; the ends are 3 standard deviations and more from that."""
    operator = Together(matrix(THREE))
    operator.domain = operator.codomain = QuickSpace(len(THREE))
    spec = TraceOfSpec("log", num_steps=3, rtol=1e-9, max_products=15)
    true, inside = true_value(THREE, "log"), 0
    for seed in range(count):
        asked = replace(spec, seed=Seed(seed))
        longer = found(operator, asked, found(operator, asked))
        inside += longer.low <= true <= longer.high
    assert longer.num_probes == 9
    assert least <= inside <= most


def test_an_extension_goes_through_its_snapshots_like_any_run() -> None:
    spec = TraceOfSpec("sqrt", rtol=1e-9, max_products=40)
    operator = Together(A, semidefinite=False)
    short = found(operator, spec)
    algorithm = configured(operator, spec, short)
    _, one, _ = run(algorithm, operator, interrupted=False)
    _, other, _ = run(algorithm, operator, interrupted=True)
    assert is_same(vars(one.result), vars(other.result))


def test_what_has_no_value_or_no_exact_products_is_not_extended() -> None:
    assert OPERATION.extension is not None
    refusal, spec = OPERATION.extension.refusal, TraceOfSpec("log", max_products=60)
    indefinite = found(Together(A - torch.eye(N), semidefinite=False), spec)
    assert indefinite.outcome == "INDEFINITE"
    assert "ask anew with a damping above 0.3" in refusal(spec, indefinite)
    coarse = found(DenseOperator(A, semidefinite=True, noise=1e-3, exact=None), spec)
    assert coarse.outcome == "UNVERIFIED"
    assert "not taken of the exact operator" in refusal(spec, coarse)
    known = found(Together(A), replace(spec, num_steps=12))
    assert not refusal(spec, known)
    assert "give 12 or more" in refusal(replace(spec, max_products=11), known)
    assert f"a result holds {MAX_NODES}" in refusal(replace(spec, max_products=MAX_NODES), known)
    open_ended = replace(known, quadrature_error=math.inf)
    assert "more steps" in refusal(spec, open_ended)
