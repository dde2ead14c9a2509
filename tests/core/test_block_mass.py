"""Masses of the blocks of dense matrices: theorems, intervals, ends, and states written down."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hvp_core.errors import CurvatureError
from hvp_core.linop.linear_operator import LinearOperator
from hvp_core.runs.algorithm import Advance, Budget, derived_seed, drive
from hvp_core.stochastic.block_mass import BlockMass
from hvp_core.stochastic.ratio import interval_of_ratio, ratio_of_means
from hvp_core.vectors.vector_space import Distribution
from hvp_operations.block_mass import OPERATION, BlockMassResult, BlockMassSpec
from hvp_operations.checking import Seed, checked
from hvp_operations.operation import Facts, SpecError
from hvp_operations.partition import Partition
from scipy import stats
from torch import Tensor

from tests.core.dense import DenseOperator, DenseSpace, InParts
from tests.core.spectra import random
from tests.core.written import is_same, run

PLENTY = 10**6
#: Tensors of two layers and of a head.
SIZES = {"net.0.w": 9, "net.0.b": 3, "net.1.w": 8, "net.1.b": 4, "head.w": 16}
N = sum(SIZES.values())
LAYERS = {"net.0": (0, 12), "net.1": (12, 24), "head": (24, 40)}


_INDICES = {derived_seed(0, index): index for index in range(64)}


class EverySign(InParts):
    """The same, whose first 64 probes are all vectors of six signs."""

    def random(self, seed: int, distribution: Distribution) -> Tensor:
        index = _INDICES[seed]
        return torch.tensor([1.0 - 2 * (index >> bit & 1) for bit in range(self.n)]).double()


@cache
def curved(coupling: float = 2.0) -> Tensor:
    """A matrix with a few large eigenvalues in each layer, and less between; not to be changed."""
    a = torch.zeros(N, N).double()
    for index, (start, stop) in enumerate(LAYERS.values()):
        u = torch.stack([random(stop - start, seed=9 * index + row) for row in range(4)])
        a[start:stop, start:stop] = (u.T * torch.tensor([4.0, 3.0, -2.0, 1.0])) @ u * (index + 1)
    b = torch.stack([random(N, seed=20 + row) for row in range(N)])
    return a + coupling * (b + b.T) / 2


def masses_of(a: Tensor, ends: Mapping[str, tuple[int, int]] = LAYERS) -> Tensor:
    """The squared Frobenius norms of its blocks."""
    rows = [a[start:stop] for start, stop in ends.values()]
    return torch.stack(
        [
            torch.stack([row[:, start:stop].square().sum() for start, stop in ends.values()])
            for row in rows
        ]
    )


def fraction_of(a: Tensor) -> float:
    masses = masses_of(a)
    return float(1 - masses.trace() / masses.sum())


def operator_of(a: Tensor, **more: Any) -> DenseOperator:
    return DenseOperator(lambda v: a @ v, InParts(SIZES, a.dtype), **more)


def configured(operator: LinearOperator, num_vectors: int = PLENTY, **values: Any) -> BlockMass:
    earlier = values.pop("earlier", None)
    values = {"by": "layer", **values, "seed": Seed(values.get("seed", 0))}
    facts = Facts(
        num_parameters=operator.domain.dimension,
        kind="hessian",
        parameter_names=tuple(operator.domain.parts()),
    )
    spec = checked(OPERATION, values, facts)
    cost = OPERATION.cost(spec, facts)
    budget = Budget(max_products=cost.max_products, num_vectors=num_vectors, earlier=earlier)
    return BlockMass.configure(spec, operator, budget)


def masses(operator: Tensor | DenseOperator, **values: Any) -> BlockMassResult:
    operator = operator_of(operator) if isinstance(operator, Tensor) else operator
    before = operator.count
    algorithm = configured(operator, **values)
    result: BlockMassResult = drive(algorithm, operator).result
    assert operator.count - before == result.num_products - result.num_exact_products
    assert result.num_products <= algorithm.max_products
    return result


def square(numbers: Sequence[float]) -> Tensor:
    size = math.isqrt(len(numbers))
    return torch.tensor(numbers, dtype=torch.float64).reshape(size, size)


# Theorems --------------------------------------------------------------------------------------


def test_over_all_signs_the_mean_of_a_sample_is_the_mass_of_each_block() -> None:
    sizes = {"a": 2, "b": 3, "c": 1}
    b = torch.stack([random(6, seed=row) for row in range(6)])
    a = b + b.T
    operator = DenseOperator(lambda v: a @ v, EverySign(sizes))
    found = masses(operator, by="tensor", num_probes=64, rtol=1e-12, atol=0.0)
    ends = {"a": (0, 2), "b": (2, 5), "c": (5, 6)}
    torch.testing.assert_close(square(found.masses), masses_of(a, ends), rtol=1e-13, atol=0)
    assert (found.blocks, found.block_sizes) == (("a", "b", "c"), (2, 3, 1))
    true = float(1 - masses_of(a, ends).trace() / masses_of(a, ends).sum())
    assert found.off_block_fraction == pytest.approx(true, rel=1e-13)


def test_of_blocks_of_one_parameter_everything_is_known_from_any_probe() -> None:
    a = torch.tensor([[3.0, -2.0], [-2.0, 0.5]]).double()
    operator = DenseOperator(lambda v: a @ v, InParts({"x": 1, "y": 1}))
    found = masses(operator, by="tensor")
    assert found.masses == (9.0, 4.0, 4.0, 0.25)
    assert found.standard_errors == (0, 0, 0, 0)
    assert found.off_block_fraction == pytest.approx(8 / 17.25, rel=1e-15)
    assert found.low <= 8 / 17.25 <= found.high
    assert found.high - found.low <= 1e-12
    assert (found.outcome, found.num_products) == ("CONVERGED", 32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_block_diagonal_matrix_has_nothing_outside_of_its_blocks(dtype: torch.dtype) -> None:
    found = masses(curved(0.0).to(dtype))
    assert (found.off_block_fraction, found.standard_error, found.low) == (0, 0, 0)
    assert 0 < found.high == pytest.approx(found.rounding)
    assert found.high <= (1e-10 if dtype == torch.float32 else 1e-24)
    assert found.outcome == "CONVERGED"
    assert square(found.masses)[0, 1:].tolist() == [0, 0]


def test_a_block_of_two_equal_halves_is_half_outside() -> None:
    u = torch.ones(N).double()
    found = masses(torch.outer(u, u), by={"one": "net.*", "other": ["head.w"]}, num_probes=400)
    assert found.blocks == ("one", "other")
    assert found.block_sizes == (24, 16)
    true = 2 * 24 * 16 / 40**2
    assert abs(found.off_block_fraction - true) <= 4 * found.standard_error


def test_parts_of_a_probe_are_grouped_as_memory_allows_with_the_same_bits() -> None:
    a = curved()
    plenty = masses(a, by="tensor")
    for num_vectors, together in ((3, 1), (5, 2), (7, 3), (99, 5)):
        operator = operator_of(a)
        algorithm = configured(operator, num_vectors, by="tensor")
        assert algorithm.num_together == together
        found = drive(algorithm, operator).result
        assert replace(found, provenance={}) == replace(plenty, provenance={})


def test_each_block_is_the_mean_of_both_triangles() -> None:
    found = masses(curved(), by="tensor")
    assert torch.equal(square(found.masses), square(found.masses).T)
    assert torch.equal(square(found.standard_errors), square(found.standard_errors).T)
    torch.testing.assert_close(
        1 - square(found.masses).trace() / square(found.masses).sum(),
        torch.tensor(found.off_block_fraction, dtype=torch.float64),
    )


# Ratios ----------------------------------------------------------------------------------------


def hall(residuals: Sequence[Any]) -> tuple[float, float]:
    """Hall's cubic of Student's t of a sum of means, by SciPy, and the quantile it is held to."""
    m = [len(each) for each in residuals]
    variances = [each.var(ddof=1) / size for each, size in zip(residuals, m, strict=True)]
    thirds = [stats.kstat(each, 3) / size**2 for each, size in zip(residuals, m, strict=True)]
    error = math.sqrt(sum(variances))
    t, skewness = sum(each.mean() for each in residuals) / error, sum(thirds) / error**3
    quantiles = [stats.t.ppf(0.975, size - 1) for size in m]
    half = math.sqrt(sum(q**2 * v for q, v in zip(quantiles, variances, strict=True)))
    return t + skewness * t**2 / 3 + skewness**2 * t**3 / 27 + skewness / 6, half / error


@pytest.mark.parametrize("corrected", [False, True])
def test_the_interval_of_a_ratio_is_every_ratio_that_the_test_does_not_refuse(
    corrected: bool,
) -> None:
    generator = np.random.default_rng(1)
    levels = [(generator.exponential(1, m), generator.exponential(4, m)) for m in (19, 5)]
    levels[1] = (levels[1][0] / 10, levels[1][1] / 10)
    levels = levels[: 1 + corrected]
    lists = [(above.tolist(), below.tolist()) for above, below in levels]
    found = ratio_of_means(lists)
    above, below = (sum(level[side].mean() for level in levels) for side in (0, 1))
    assert found.value == pytest.approx(above / below, rel=1e-13)
    ends = interval_of_ratio(lists, found.value, 0.0, 1.0)
    assert 0 < ends[0] < found.value < ends[1] < 1
    for end in ends:
        cubic, quantile = hall([above - end * below for above, below in levels])
        assert abs(cubic) == pytest.approx(quantile, rel=1e-9)


def test_a_divisor_that_may_be_zero_bounds_no_ratio() -> None:
    wide = [((1.0, 2.0), (-1.0, 5.0))]
    assert interval_of_ratio(wide, ratio_of_means(wide).value, 0.0, 1.0) == (0, 1)
    nothing = ratio_of_means([((1.0, 2.0), (0.0, 0.0))])
    assert math.isnan(nothing.value)
    assert nothing.standard_error == math.inf
    assert interval_of_ratio([], nothing.value, 0.0, 1.0) == (0, 1)


def test_a_ratio_that_all_samples_have_is_known() -> None:
    same = [((1.0, 2.0, 3.0, 5.0), (4.0, 8.0, 12.0, 20.0))]
    assert ratio_of_means(same) == (0.25, 0)
    assert interval_of_ratio(same, 0.25, 0.0, 1.0) == pytest.approx((0.25, 0.25), rel=1e-12)
    zero = [((0.0,) * 9, (4.0, 8.0, 12.0, 10.0, 7.0, 6.0, 9.0, 8.0, 9.0))]
    assert interval_of_ratio(zero, 0.0, 0.0, 1.0) == (0, 0)


# Intervals -------------------------------------------------------------------------------------


def held(a: Tensor, true: float, runs: int, **values: Any) -> float:
    """The share of runs whose interval holds the truth."""
    operator = operator_of(a)
    intervals = [masses(operator, seed=Seed(seed), **values) for seed in range(runs)]
    return sum(each.low <= true <= each.high for each in intervals) / runs


def test_intervals_hold_the_fraction_in_95_of_100_runs() -> None:
    a = curved()
    assert held(a, fraction_of(a), 60, num_probes=16, rtol=1e-9, atol=0.0) >= 0.85


@pytest.mark.slow
@pytest.mark.parametrize("num_probes", [8, 16])
@pytest.mark.parametrize("coupling", [0.1, 2.0, 20.0])
def test_intervals_of_few_probes_hold_the_fraction_too(coupling: float, num_probes: int) -> None:
    """Masses of a few large eigenvalues are skewed, and are taken for normal ones."""
    a = curved(coupling)
    share = held(a, fraction_of(a), 150, num_probes=num_probes, rtol=1e-9, atol=0.0)
    assert share >= 0.88, share


@pytest.mark.slow
@pytest.mark.parametrize("rtol", [0.3, 0.15])
def test_intervals_of_runs_that_stop_by_themselves_hold_the_fraction(rtol: float) -> None:
    a = curved()
    assert held(a, fraction_of(a), 80, rtol=rtol, num_probes=400) >= 0.88


def noisy(a: Tensor, noise: float, *, exact: bool = True) -> DenseOperator:
    """The matrix in products that are off by a part of their norm, another one each time."""

    def product(v: Tensor) -> Tensor:
        w = a @ v
        generator = np.random.default_rng(int(float(w.abs().sum()) * 1e6) % 2**31)
        error = torch.from_numpy(generator.standard_normal(len(v)))
        return w + noise * w.norm() * error / len(v) ** 0.5

    exactly = (lambda v: a @ v) if exact else None
    return DenseOperator(product, InParts(SIZES), noise=noise, exact=exactly)


@pytest.mark.parametrize("coupling", [0.0, 2.0])
def test_of_a_coarse_operator_the_interval_is_that_of_the_exact_one(coupling: float) -> None:
    """Noise alone would put some 6 % of the mass outside of the blocks."""
    a = curved(coupling)
    true, hits = fraction_of(a), 0
    for seed in range(15):
        found = masses(noisy(a, 0.3), seed=Seed(seed), num_probes=32, rtol=0.2)
        hits += found.low <= true <= found.high
        assert found.num_exact_products >= 3 * 4
        assert found.outcome in ("CONVERGED", "MAX_PRODUCTS")
    assert hits >= 13


def test_without_memory_for_exact_products_nothing_is_said_of_the_exact_operator() -> None:
    found = masses(noisy(curved(), 0.01, exact=False))
    assert found.outcome == "UNVERIFIED"
    assert found.num_exact_products == 0
    assert found.num_probes <= 64


def test_the_least_products_of_a_coarse_operator_are_compared() -> None:
    found = masses(noisy(curved(), 0.01), max_products=36)
    assert (found.num_probes, found.num_products) == (8, 36)
    assert found.num_exact_products == 6
    assert found.outcome == "MAX_PRODUCTS"


# Ends ------------------------------------------------------------------------------------------


def test_a_run_ends_when_its_tolerance_is_met() -> None:
    found = masses(curved(), rtol=0.1, num_probes=4096)
    assert found.outcome == "CONVERGED"
    assert found.standard_error <= 0.1 * found.off_block_fraction
    assert 16 <= found.num_probes < 4096
    within = masses(curved(), rtol=0.001, atol=found.standard_error, num_probes=4096)
    assert within.standard_error <= found.standard_error
    assert within.num_products <= found.num_products


@pytest.mark.parametrize("values", [{"num_probes": 12}, {"max_products": 38}])
def test_a_run_takes_no_more_than_it_may(values: dict[str, int]) -> None:
    found = masses(curved(), rtol=1e-6, **values)
    assert found.outcome == "MAX_PRODUCTS"
    assert (found.num_probes, found.num_products) == (12, 36)


def test_a_tolerance_below_rounding_is_the_limit() -> None:
    a = curved(0.0).float()
    assert masses(a, atol=0.0).outcome == "NOISE_LIMIT"
    assert masses(a, atol=1e-9).outcome == "CONVERGED"


def test_what_float32_cannot_hold_is_in_the_interval() -> None:
    """A mass of 1e-13 is below what the products' rounding may be, and may be there or not."""
    a = curved(0.0).clone()
    a[0, 30] = a[30, 0] = 1e-5
    found = masses(a.float())
    assert found.low == 0
    assert found.low <= fraction_of(a) <= found.high


def test_where_terms_cancel_rounding_goes_with_the_terms() -> None:
    class Cancelling(DenseOperator):
        size = 1e7

    a = curved().float()
    found = masses(Cancelling(lambda v: a @ v, InParts(SIZES, torch.float32)))
    assert found.outcome == "NOISE_LIMIT"
    assert found.rounding > 0.01
    assert found.high > found.off_block_fraction + found.rounding
    assert found.low == 0
    assert masses(a).outcome != "NOISE_LIMIT"


@pytest.mark.parametrize("values", [{}, {"num_probes": 9}], ids=str)
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_of_the_zero_operator_there_is_no_fraction(noise: float, values: dict[str, int]) -> None:
    found = masses(noisy(torch.zeros(N, N).double(), noise), **values)
    assert found.outcome == "ZERO_OPERATOR"
    assert math.isnan(found.off_block_fraction)
    assert (found.low, found.high) == (0, 1)
    assert set(found.masses) == {0}
    assert found.levels == ()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_product_that_is_no_number_is_named(bad: float) -> None:
    a = curved().clone()
    a[3, 3] = bad
    with pytest.raises(CurvatureError) as caught:
        masses(a)
    assert caught.value.reason == "NON_FINITE"


# Runs ------------------------------------------------------------------------------------------

CASES: dict[str, Callable[[], DenseOperator]] = {
    "exact": lambda: operator_of(curved()),
    "coarse": lambda: noisy(curved(), 0.05),
    "unverified": lambda: noisy(curved(), 0.05, exact=False),
    "zero": lambda: operator_of(torch.zeros(N, N).double()),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("num_vectors", [5, PLENTY])
def test_a_run_that_is_interrupted_at_every_step_gives_the_same_bits(
    case: Callable[[], DenseOperator], num_vectors: int
) -> None:
    operator = case()
    algorithm = configured(operator, num_vectors, rtol=0.2)
    reported, found, state = run(algorithm, operator, interrupted=False)
    others, again, _ = run(algorithm, operator, interrupted=True)
    assert is_same(reported, others)
    assert repr(found.result) == repr(again.result)  # NaN is not itself
    assert algorithm.step(operator, state) is None


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_an_extended_run_is_one_long_run(noise: float) -> None:
    a = curved()
    short = masses(noisy(a, noise), num_probes=20, rtol=1e-6)
    longer = masses(noisy(a, noise), num_probes=50, rtol=1e-6, earlier=short)
    whole = masses(noisy(a, noise), num_probes=50, rtol=1e-6)
    assert longer.num_probes == whole.num_probes == 50
    for name in ("masses", "off_block_fraction", "standard_error", "low", "high", "levels"):
        assert is_same(getattr(longer, name), getattr(whole, name)), name
    assert longer.num_products == 30 * 3
    assert masses(noisy(a, noise), num_probes=20, rtol=0.9, earlier=short).num_products == 0


def test_progress_tells_the_estimate_so_far() -> None:
    reported: list[Advance] = []
    operator = operator_of(curved())
    drive(configured(operator, 5, num_probes=16, rtol=1e-6), operator, reported.append)
    assert [each.num_products for each in reported[:4]] == [2, 3, 5, 6]
    assert [each.detail.num_probes for each in reported[:4]] == [0, 1, 1, 2]
    assert reported[1].detail.standard_error == math.inf
    assert reported[3].detail.standard_error < math.inf
    assert reported[-1].detail.table().rows[0][0] == "16"
    assert {each.stage for each in reported} == {"sampling"}


# Rules -----------------------------------------------------------------------------------------

NAMES = tuple(SIZES)
HESSIAN = Facts(num_parameters=N, kind="hessian", parameter_names=NAMES)


@pytest.mark.parametrize(
    ("values", "reason", "says"),
    [
        ({"by": ["net.*", "tail.*"]}, "PARAMETERS_NOT_FOUND", "nearest are"),
        ({"by": ["net.*", "*.w"]}, "PARAMETERS_INVALID", "tensor net.0.w is in two blocks"),
        ({"by": ["net.*", "net.*"]}, "PARAMETERS_INVALID", "same patterns"),
        ({"by": ["net.0.*", "net.1.*"]}, "PARAMETERS_INVALID", "head.w among them"),
        ({"by": ["net.0.*", []]}, "PARAMETERS_INVALID", "No pattern"),
        ({"by": "row"}, "PARAMETERS_INVALID", "'layer', 'tensor' or lists of patterns"),
        ({"by": 3}, "PARAMETERS_INVALID", "not 3"),
        ({"by": {"": "*"}}, "PARAMETERS_INVALID", "no name of a block"),
        ({"by": ["*"]}, "BY_INVALID", "nothing is outside of one block"),
        ({"num_probes": 7}, "NUM_PROBES_INVALID", "8 to 4096"),
        ({"num_probes": 5000}, "NUM_PROBES_INVALID", "8 to 4096"),
        ({"rtol": 0.0}, "RTOL_INVALID", "0 < rtol < 1"),
        ({"rtol": 1.0}, "RTOL_INVALID", "0 < rtol < 1"),
        ({"atol": -1.0}, "ATOL_INVALID", "0 or more"),
        ({"max_products": 35}, "MAX_PRODUCTS_INVALID", "at least 36"),
        ({"seed": -1}, "SEED_INVALID", "0 or more"),
    ],
)
def test_a_question_without_an_answer_is_refused_with_what_would_do(
    values: dict[str, Any], reason: str, says: str
) -> None:
    with pytest.raises(SpecError, match=says) as caught:
        checked(OPERATION, values, HESSIAN)
    assert caught.value.reason == reason


def test_too_many_blocks_are_refused_and_one_parameter_has_nothing_outside() -> None:
    names = tuple(f"p{index}" for index in range(129))
    many = Facts(num_parameters=129, kind="ggn", parameter_names=names)
    with pytest.raises(SpecError, match="into 129, and 2 to 128") as caught:
        checked(OPERATION, {"by": "tensor"}, many)
    assert caught.value.reason == "BY_INVALID"
    with pytest.raises(SpecError, match="nothing is outside"):
        checked(OPERATION, {}, Facts(num_parameters=1, kind="ggn", parameter_names=("p",)))
    with pytest.raises(SpecError) as caught:
        checked(OPERATION, {}, Facts(num_parameters=9, kind="jacobian", num_outputs=4))
    assert caught.value.reason == "OPERATOR_NOT_SYMMETRIC"


def test_the_cost_is_a_product_for_each_block_and_probe() -> None:
    layers = (*(f"model.layers.{layer}.w" for layer in range(30)), "embed.w", "norm.w")
    facts = Facts(num_parameters=10**8, kind="hessian", parameter_names=layers)
    cost = OPERATION.cost(BlockMassSpec(num_probes=16), facts)
    assert cost.max_products == 32 * (16 + 2 * 4)
    assert OPERATION.cost(BlockMassSpec(max_products=400), facts).max_products == 400
    assert (cost.least_vectors, cost.wished_vectors) == (3, 17)


def test_a_partition_is_the_same_however_it_travels() -> None:
    for by in ("tensor", ["net.*", "head.*"], {"a": "net.*", "b": ["head.w"]}):
        partition = Partition.of(by)
        assert Partition.of(partition) == partition
        assert partition.divide(NAMES)
    assert Partition.of(["net.*", "head.*"]).divide(NAMES) == {
        "net.*": list(NAMES[:4]),
        "head.*": ["head.w"],
    }


def test_a_space_of_one_part_keeps_it_or_not() -> None:
    space = DenseSpace(3)
    assert space.only(torch.ones(3), [0]).tolist() == [1, 1, 1]
    assert space.only(torch.ones(3), []).tolist() == [0, 0, 0]
