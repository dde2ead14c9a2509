"""A finished run that is extended is the longer run: of it only what is new is computed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hvp_core.runs.algorithm import Budget, Found, drive
from hvp_core.stochastic.density import Density
from hvp_core.stochastic.trace import Trace
from hvp_operations.checking import Seed
from hvp_operations.density import OPERATION as DENSITY
from hvp_operations.density import DensityResult, DensitySpec
from hvp_operations.trace import OPERATION as TRACE
from hvp_operations.trace import TraceResult, TraceSpec
from torch import Tensor

from tests.core.dense import DenseOperator
from tests.core.spectra import matrix, random
from tests.core.written import is_same, run

A = matrix(torch.cat((torch.linspace(-1, 1, 80), torch.tensor([3.0, 5.0]))).double())


def density(
    num_probes: int, num_vectors: int, earlier: DensityResult | None = None
) -> tuple[DensityResult, int]:
    """A density of probes of 9 steps, and products with the operator, from outside."""
    operator = DenseOperator(A)
    spec = DensitySpec(num_probes=num_probes, num_steps=9, seed=Seed(4))
    budget = Budget(max_products=900, num_vectors=num_vectors, earlier=earlier)
    result: DensityResult = drive(Density.configure(spec, operator, budget), operator).result
    return result, operator.count


@pytest.mark.parametrize("num_vectors", [999, 25, 8])  # all at once, in twos, bases not kept
def test_a_density_with_more_probes_is_that_of_one_long_run_bit_for_bit(num_vectors: int) -> None:
    short, _ = density(3, num_vectors)
    longer, count = density(8, num_vectors, earlier=short)
    whole, all_products = density(8, num_vectors)
    assert longer.quadratures == whole.quadratures
    assert longer.orthogonality_defect == whole.orthogonality_defect
    assert (longer.num_products, whole.num_products) == (count, all_products) == (45, 72)
    again, count = density(9, num_vectors, earlier=longer)
    assert again.quadratures == density(9, num_vectors)[0].quadratures
    assert count == 9


def test_an_extended_density_goes_through_its_snapshots_like_any_run() -> None:
    short, _ = density(2, 25)
    spec = DensitySpec(num_probes=5, num_steps=9, seed=Seed(4))
    budget = Budget(max_products=99, num_vectors=25, earlier=short)
    operator = DenseOperator(A)
    algorithm = Density.configure(spec, operator, budget)
    _, found, _ = run(algorithm, operator, interrupted=False)
    _, again, _ = run(algorithm, operator, interrupted=True)
    assert is_same(vars(found.result), vars(again.result))


def trace(spec: TraceSpec, earlier: TraceResult | None = None, noise: float = 0.0) -> TraceResult:
    def rough(v: Tensor) -> Tensor:
        w = A @ v
        seed = int(float(w.abs().sum()) * 1e6) % 2**31
        return w + noise * w.norm() * random(len(v), seed=seed) / len(v) ** 0.5

    operator = DenseOperator(
        rough if noise else A, DenseOperator(A).domain, noise=noise, exact=lambda v: A @ v
    )
    budget = Budget(max_products=spec.max_products or 900, num_vectors=99, earlier=earlier)
    found: Found = drive(Trace.configure(spec, operator, budget), operator)
    result: TraceResult = found.result
    return result


@pytest.mark.parametrize("noise", [0.0, 1e-3])
def test_a_trace_with_more_samples_is_that_of_one_long_run(noise: float) -> None:
    spec = TraceSpec(method="hutchinson", rtol=1e-9, max_products=48, seed=Seed(2))
    short = trace(spec, noise=noise)
    assert short.outcome == "MAX_PRODUCTS"
    longer = trace(replace(spec, max_products=24), earlier=short, noise=noise)
    assert longer.num_products == 24
    assert longer.num_probes == longer.levels[0].count > short.num_probes
    whole = trace(replace(spec, max_products=72), noise=noise)
    if noise:  # the last products of a run go into the level that needs them more
        assert abs(longer.value - whole.value) < whole.high - whole.low
        assert longer.levels[1].count >= short.levels[1].count
    else:
        assert longer == replace(whole, num_products=24)
    assert longer.low < float(A.trace()) < longer.high


def test_a_trace_by_default_goes_on_by_the_method_that_its_samples_are_of() -> None:
    spec = TraceSpec(per="tensor", rtol=1e-3, max_products=40, seed=Seed(2))
    short = trace(spec)
    longer = trace(replace(spec, per=None, max_products=60), short)
    assert (short.method, longer.method) == ("hutchinson", "hutchinson")
    assert longer.standard_error < short.standard_error
    assert longer.num_probes == 100


def test_what_holds_no_samples_is_not_extended() -> None:
    assert TRACE.extension is not None
    assert DENSITY.extension is not None
    sketched = trace(TraceSpec(method="xtrace", max_products=24, rtol=1e-9))
    assert "only a job by hutchinson" in TRACE.extension.refusal(TraceSpec(), sketched)
    exact = trace(TraceSpec(method="hutchinson", atol=1e-12, rtol=1e-12))
    assert exact.method == "exact"
    assert TRACE.extension.refusal(TraceSpec(), exact)
    known, _ = density(3, 99)
    assert "has 3 already" in DENSITY.extension.refusal(DensitySpec(num_probes=3), known)
    assert not DENSITY.extension.refusal(DensitySpec(num_probes=4), known)
