"""Stochastic Lanczos quadrature against dense matrices of prescribed spectrum."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hvp_core.errors import CurvatureError
from hvp_core.linop.linear_operator import LinearOperator
from hvp_core.runs.algorithm import Budget, derived_seed, drive
from hvp_core.stochastic.density import Density
from hvp_operations.checking import Seed
from hvp_operations.density import DensityProgress, DensityResult, DensitySpec, Quadrature
from hvp_operations.density import record as sdk
from torch import Tensor

from tests.core.dense import DenseOperator
from tests.core.spectra import matrix
from tests.core.written import is_same, run

PLENTY = 10**9
#: A bulk, negative values, outliers near and far: what a Hessian looks like.
SPECTRUM = torch.cat(
    (
        torch.tensor([-0.8, -0.3], dtype=torch.float64),
        torch.linspace(-0.1, 1, 150, dtype=torch.float64) ** 3,
        torch.tensor([2.0, 2.1, 9.0], dtype=torch.float64),
    )
)
N = len(SPECTRUM)


def density(
    a: Tensor | LinearOperator,
    num_probes: int,
    num_steps: int,
    *,
    seed: int = 0,
    num_vectors: int = PLENTY,
) -> DensityResult:
    operator = DenseOperator(a) if isinstance(a, Tensor) else a
    spec = DensitySpec(num_probes=num_probes, num_steps=num_steps, seed=Seed(seed))
    budget = Budget(max_products=num_probes * num_steps, num_vectors=num_vectors)
    result: DensityResult = drive(Density.configure(spec, operator, budget), operator).result
    assert result.num_products <= budget.max_products
    return result


def as_given(result: DensityResult, n: int) -> sdk.DensityResult:
    """What the SDK makes of it."""
    return sdk.DensityResult(
        quadratures=result.quadratures,
        orthogonality_defect=result.orthogonality_defect,
        num_products=result.num_products,
        loss=0.0,
        provenance={**result.provenance, "num_parameters": str(n)},
    )


def probe(n: int, index: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """The probe of this index, of norm 1."""
    space = DenseOperator(torch.eye(n, dtype=dtype)).domain
    return space.random(derived_seed(seed, index), "rademacher") / math.sqrt(n)


def moment(quadrature: Quadrature, degree: int) -> float:
    return math.fsum(
        weight * node**degree
        for node, weight in zip(quadrature.nodes, quadrature.weights, strict=True)
    )


def moments_are_exact(a: Tensor, quadrature: Quadrature, x: Tensor, most: int, rel: float) -> None:
    """Relative to the moments of |A|, with which rounding goes."""
    values, u = torch.linalg.eigh(a.double())
    seen = (u.T @ x.double()).square()
    for degree in range(most + 1):
        true, size = (float((seen * each**degree).sum()) for each in (values, values.abs()))
        assert abs(moment(quadrature, degree) - true) <= rel * size, degree


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("num_steps", [1, 2, 7, 30])
def test_weights_are_those_of_a_probability_and_nodes_lie_within_the_spectrum(
    num_steps: int, dtype: torch.dtype
) -> None:
    result = density(matrix(SPECTRUM).to(dtype), 5, num_steps)
    slack = 100 * torch.finfo(dtype).eps
    for quadrature in result.quadratures:
        assert len(quadrature.nodes) == len(quadrature.weights) == num_steps
        assert list(quadrature.nodes) == sorted(quadrature.nodes)
        assert math.fsum(quadrature.weights) == pytest.approx(1, abs=1e-14)
        assert min(quadrature.weights) >= 0
        assert -0.8 - slack <= quadrature.nodes[0] <= quadrature.nodes[-1] <= 9 + slack
    assert result.num_products == 5 * num_steps
    assert result.orthogonality_defect < 10 * torch.finfo(dtype).eps


@pytest.mark.parametrize("num_steps", [1, 2, 5, 12, 25])
def test_each_probe_has_its_moments_up_to_twice_the_steps_less_one(num_steps: int) -> None:
    a = matrix(SPECTRUM)
    result = density(a, 4, num_steps)
    for index, quadrature in enumerate(result.quadratures):
        moments_are_exact(a, quadrature, probe(N, index), 2 * num_steps - 1, 1e-10)
    # And the next one is not: there is something to be exact about.
    x, quadrature = probe(N, 0), result.quadratures[0]
    if num_steps < 5:
        true = float(x @ torch.linalg.matrix_power(a, 2 * num_steps) @ x)
        assert abs(moment(quadrature, 2 * num_steps) - true) > 1e-6 * true


def test_in_float32_moments_hold_to_its_rounding() -> None:
    a = matrix(SPECTRUM).float()
    for index, quadrature in enumerate(density(a, 3, 10).quadratures):
        moments_are_exact(a, quadrature, probe(N, index, dtype=torch.float32), 19, 2e-5)


def test_with_as_many_steps_as_dimensions_the_quadrature_is_the_spectrum_itself() -> None:
    spectrum = torch.cat((torch.linspace(-1, 2, 25), torch.tensor([4.0]))).double()
    a = matrix(spectrum)
    values, u = torch.linalg.eigh(a)
    for num_steps in (26, 100):
        for index, quadrature in enumerate(density(a, 3, num_steps).quadratures):
            seen = (u.T @ probe(26, index)).square()
            np.testing.assert_allclose(quadrature.nodes, values, rtol=0, atol=1e-12)
            np.testing.assert_allclose(quadrature.weights, seen, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("num_vectors", [PLENTY, 3 * 4])
def test_three_distinct_eigenvalues_end_a_probe_after_three_steps(
    num_vectors: int, dtype: torch.dtype
) -> None:
    spectrum = torch.tensor([-1.0] * 5 + [0.5] * 30 + [3.0] * 10).double()
    a = matrix(spectrum)
    result = density(a.to(dtype), 4, 20, num_vectors=num_vectors)
    assert result.num_products == 12
    tolerance = 100 * torch.finfo(dtype).eps
    values, u = torch.linalg.eigh(a)
    for index, quadrature in enumerate(result.quadratures):
        np.testing.assert_allclose(quadrature.nodes, [-1, 0.5, 3], rtol=0, atol=tolerance)
        seen = (u.T @ probe(45, index)).square()
        true = [float(seen[(values - node).abs() < 0.1].sum()) for node in (-1, 0.5, 3)]
        np.testing.assert_allclose(quadrature.weights, true, rtol=0, atol=tolerance)


def test_a_probe_that_ends_early_leaves_the_others_to_go_on() -> None:
    # A probe with like signs on a pair of coordinates sees the eigenvalue 1 there, otherwise -1.
    a = torch.block_diag(*[torch.tensor([[0.0, 1.0], [1.0, 0.0]])] * 2).double()
    result = density(a, 12, 4)
    for index, quadrature in enumerate(result.quadratures):
        signs = probe(4, index).sign()
        pairs = sorted({float(signs[0] * signs[1]), float(signs[2] * signs[3])})
        assert quadrature.nodes == pytest.approx(pairs)
        assert quadrature.weights == pytest.approx([1 / len(pairs)] * len(pairs))
    lengths = [len(each.nodes) for each in result.quadratures]
    assert set(lengths) == {1, 2}
    assert result.num_products == sum(lengths)


@pytest.mark.parametrize("value", [0.0, -2.5])
def test_a_multiple_of_the_identity_has_one_node(value: float) -> None:
    result = density(value * torch.eye(9, dtype=torch.float64), 2, 5)
    assert [each.nodes for each in result.quadratures] == [(value,)] * 2
    assert [each.weights for each in result.quadratures] == [(1.0,)] * 2


def test_a_single_dimension_has_one_node() -> None:
    (quadrature,) = density(torch.tensor([[3.5]]).double(), 1, 5).quadratures
    assert quadrature == Quadrature(nodes=(3.5,), weights=(1.0,))


# Memory --------------------------------------------------------------------------------------


class Counted(DenseOperator):
    """Notes how many vectors came at once."""

    def __init__(self, a: Tensor):
        super().__init__(a)
        self.sizes: list[int] = []

    def apply(self, vectors: Any, *, borrow: bool = False) -> list[Tensor]:
        self.sizes.append(len(vectors))
        return super().apply(vectors, borrow=borrow)


def test_all_probes_that_fit_share_each_product_call() -> None:
    operator = Counted(matrix(SPECTRUM))
    whole = density(operator, 7, 10)
    assert operator.sizes == [7] * 10
    assert whole.provenance["probes_in_lockstep"] == "7"


@pytest.mark.parametrize(("num_vectors", "sizes"), [(13 * 3, [3, 3, 1]), (13, [1] * 7)])
def test_probes_in_groups_give_the_same_numbers_as_all_at_once(
    num_vectors: int, sizes: list[int]
) -> None:
    a = matrix(SPECTRUM)
    whole, operator = density(a, 7, 10), Counted(a)
    parts = density(operator, 7, 10, num_vectors=num_vectors)
    assert operator.sizes == [size for size in sizes for _ in range(10)]
    for one, other in zip(whole.quadratures, parts.quadratures, strict=True):
        np.testing.assert_allclose(one.nodes, other.nodes, rtol=0, atol=1e-12)
        np.testing.assert_allclose(one.weights, other.weights, rtol=0, atol=1e-12)
    assert parts.num_products == 70
    assert 0 < parts.orthogonality_defect < 1e-14


def test_an_operator_is_not_given_more_at_once_than_it_says() -> None:
    for num_vectors in (PLENTY, 24):
        operator = Counted(matrix(SPECTRUM))
        operator.most_together = 3
        result = density(operator, 7, 30, num_vectors=num_vectors)
        assert operator.sizes == [3] * 60 + [1] * 30
        assert (result.orthogonality_defect == 1) == (num_vectors == 24)


def test_where_no_basis_fits_low_moments_hold_and_it_is_said() -> None:
    a = matrix(SPECTRUM)
    operator = Counted(a)
    result = density(operator, 7, 60, num_vectors=12)
    assert operator.sizes == [4] * 60 + [3] * 60
    assert result.orthogonality_defect == 1
    assert result.provenance["orthogonality"] == "of neighbours only"
    for index, quadrature in enumerate(result.quadratures):
        assert math.fsum(quadrature.weights) == pytest.approx(1, abs=1e-13)
        moments_are_exact(a, quadrature, probe(N, index), 20, 1e-10)


def test_copies_of_an_outlier_share_its_weight_where_no_basis_fits() -> None:
    a = matrix(SPECTRUM)
    (quadrature,) = density(a, 1, 120, num_vectors=3).quadratures
    nodes, weights = np.array(quadrature.nodes), np.array(quadrature.weights)
    copies = np.abs(nodes - 9) < 1e-9
    assert copies.sum() > 1
    outlier = torch.linalg.eigh(a)[1][:, -1]
    assert weights[copies].sum() == pytest.approx(float(outlier @ probe(N, 0)) ** 2, rel=1e-9)


def test_the_defect_is_that_of_the_basis() -> None:
    a = matrix(SPECTRUM).float()
    algorithm = Density(
        spec=DensitySpec(num_probes=1, num_steps=40), num_steps=40, num_together=1, is_kept=True
    )
    operator = DenseOperator(a)
    state = algorithm.begin(operator)
    basis = state.probes[0].rows
    while algorithm.step(operator, state) is not None:
        pass
    q = basis.double()
    true = float((q @ q.T - torch.eye(40, dtype=torch.float64)).abs().max())
    result: DensityResult = algorithm.result(operator, state).result
    assert result.orthogonality_defect == pytest.approx(true, rel=1e-6)


# Statistics ----------------------------------------------------------------------------------


def test_the_smoothed_density_lies_within_the_band_of_the_dense_one() -> None:
    found = as_given(density(matrix(SPECTRUM), 50, 80), N)
    sigma = 0.15
    x = np.linspace(-1.3, 9.6, 200)
    values = SPECTRUM.numpy()
    kernel = np.exp(-0.5 * ((x[:, None] - values) / sigma) ** 2) / (sigma * math.sqrt(2 * math.pi))
    true = kernel.mean(1)
    mean, error = found.density(x, sigma)
    # Where the density is nothing, rounding is what is left.
    assert (np.abs(mean - true) <= 3 * error + 1e-12).mean() >= 0.99
    assert (np.abs(mean - true) <= 5 * error + 1e-12).all()
    assert np.trapezoid(mean, x) == pytest.approx(1, abs=1e-3)


def test_standard_errors_cover_the_truth_as_often_as_they_say() -> None:
    a = matrix(SPECTRUM)
    inside, values = 0, []
    for seed in range(200):
        trace = as_given(density(a, 30, 1, seed=seed), N).trace()
        inside += abs(float(trace.value) - float(SPECTRUM.sum())) <= 2 * float(trace.standard_error)
        values.append(float(trace.value))
    # Of what lies within two standard errors with a probability of 0.92, fewer than 170 of 200
    # would be seen once in 3000 times, and all of 200 once in ten million.
    assert 170 <= inside < 200
    # And the estimate has no bias.
    error = np.std(values, ddof=1) / math.sqrt(len(values))
    assert abs(np.mean(values) - float(SPECTRUM.sum())) <= 3 * error


@pytest.mark.parametrize("num_steps", [1, 3, 10, 40])
def test_a_count_is_off_by_no_more_than_its_resolution(num_steps: int) -> None:
    a = matrix(SPECTRUM)
    values, u = torch.linalg.eigh(a)
    points = [-math.inf, -0.5, -1e-3, 0.0, 1e-3, 0.2, 0.999, 1.5, 2.05, 8.9, 9.1, math.inf]
    result = density(a, 3, num_steps)
    for index, quadrature in enumerate(result.quadratures):
        seen = (u.T @ probe(N, index)).square()
        one = as_given(replace(result, quadratures=(quadrature,)), N)
        for low, high in itertools.combinations(points, 2):
            true = N * float(seen[(values > low) & (values <= high)].sum())
            found = one.count(low, high)
            assert abs(found.value - true) <= found.resolution + 1e-9, (low, high)
    # What says the order of everything has nothing to hide; a finer one has less.
    assert one.count(-math.inf, math.inf).resolution == 0


def test_more_steps_resolve_counts_better() -> None:
    a = matrix(SPECTRUM)
    resolutions = [
        as_given(density(a, 3, num_steps), N).count(-math.inf, 0).resolution
        for num_steps in (5, 20, 80)
    ]
    assert resolutions == sorted(resolutions, reverse=True)
    assert resolutions[-1] < resolutions[0] / 4


def test_probes_of_different_seeds_and_places_are_different() -> None:
    a = matrix(SPECTRUM)
    first, second = density(a, 4, 3, seed=1), density(a, 4, 3, seed=2)
    assert len({each for result in (first, second) for each in result.quadratures}) == 8
    assert density(a, 4, 3, seed=1).quadratures == first.quadratures


# A run ---------------------------------------------------------------------------------------


def test_every_step_is_reported_with_the_ends_of_the_spectrum() -> None:
    operator = DenseOperator(matrix(SPECTRUM))
    spec = DensitySpec(num_probes=4, num_steps=20)
    algorithm = Density.configure(spec, operator, Budget(max_products=80, num_vectors=46))
    reported, found, _ = run(algorithm, operator, interrupted=False)
    details: list[DensityProgress] = [advance.detail for advance in reported]
    assert [advance.num_products for advance in reported] == [2 * step for step in range(1, 41)]
    assert [detail.num_steps for detail in details] == [*range(1, 21)] * 2
    assert [detail.num_probes_done for detail in details] == [0] * 19 + [2] * 20 + [4]
    nodes = [node for each in found.result.quadratures for node in each.nodes]
    assert (details[-1].smallest, details[-1].largest) == pytest.approx((min(nodes), max(nodes)))
    assert [detail.largest for detail in details] == sorted(detail.largest for detail in details)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("num_vectors", [PLENTY, 46, 9])
def test_a_run_that_is_written_down_after_every_step_is_the_same_bit_for_bit(
    num_vectors: int, dtype: torch.dtype
) -> None:
    operator = DenseOperator(matrix(SPECTRUM).to(dtype))
    algorithm = Density.configure(
        DensitySpec(num_probes=5, num_steps=20, seed=Seed(3)),
        operator,
        Budget(max_products=100, num_vectors=num_vectors),
    )
    reported, found, _ = run(algorithm, operator, interrupted=False)
    others, again, _ = run(algorithm, operator, interrupted=True)
    assert is_same(reported, others)
    assert is_same(found.result, again.result)


@pytest.mark.parametrize("num_vectors", [PLENTY, 3])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("at", [1, 5])
def test_a_product_that_is_not_finite_ends_the_run(bad: float, at: int, num_vectors: int) -> None:
    a = matrix(SPECTRUM)
    count = 0

    def product(v: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return (a @ v) * (bad if count == at else 1)

    operator = DenseOperator(product, DenseOperator(a).domain)
    with pytest.raises(CurvatureError, match="NON_FINITE"):
        density(operator, 2, 8, num_vectors=num_vectors)


def test_what_a_product_returns_is_not_written_to() -> None:
    a = matrix(SPECTRUM)
    results: list[tuple[Tensor, Tensor]] = []

    def product(v: Tensor) -> Tensor:
        w = a @ v
        results.append((w, w.clone()))
        return w

    for num_vectors in (PLENTY, 3):
        density(DenseOperator(product, DenseOperator(a).domain), 2, 8, num_vectors=num_vectors)
    assert all(torch.equal(now, before) for now, before in results)
    identity = DenseOperator(lambda v: v, DenseOperator(a).domain)
    assert density(identity, 2, 8).quadratures[1].nodes == pytest.approx((1.0,))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_intervals_of_counts_hold_the_truth_at_ends_anywhere(dtype: torch.dtype) -> None:
    a = matrix(SPECTRUM).to(dtype)
    inside, total = 0, 0
    for seed in range(3):
        found = as_given(density(a, 8, 25, seed=seed), N)
        found = replace(found, provenance={**found.provenance, "dtype": str(dtype)[6:]})
        for low, high in itertools.combinations(
            (-math.inf, -0.5, 1e-3, 0.5, 1.5, 5.0, math.inf), 2
        ):
            true = int(((low < SPECTRUM) & (high >= SPECTRUM)).sum())
            count = found.count(low, high)
            assert count.low - 1e-9 <= count.value <= count.high + 1e-9
            inside += count.low - 1e-6 <= true <= count.high + 1e-6
            total += 1
        outlier = found.count(5.0, math.inf)
        assert outlier.low <= 1 <= outlier.high <= 6
    assert inside >= 0.93 * total


def test_the_distance_of_two_densities_is_that_of_the_dense_spectra() -> None:
    other = SPECTRUM + 0.3 * torch.linspace(0, 1, N)
    one, two = (as_given(density(matrix(each), 12, 60), N) for each in (SPECTRUM, other))
    true = float((SPECTRUM.sort().values - other.sort().values).abs().mean())
    found = one.distance(two)
    assert abs(found.value - true) <= 2 * found.standard_error + found.resolution
    assert found.value > 3 * one.distance(as_given(density(matrix(SPECTRUM), 12, 60), N)).value
    again = one.distance(as_given(density(matrix(SPECTRUM), 12, 60, seed=1), N))
    assert again.value <= 2 * again.standard_error
