"""Traces of functions of dense matrices: closed forms, intervals, ends, and states written down."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hvp_core.errors import CurvatureError
from hvp_core.runs.algorithm import Advance, Budget, derived_seed, drive
from hvp_core.stochastic.trace_of import TraceOf
from hvp_operations.checking import Seed, checked
from hvp_operations.operation import Facts, SpecError
from hvp_operations.trace_of import OPERATION, TraceOfResult, TraceOfSpec
from torch import Tensor

from tests.core.dense import DenseOperator, QuickSpace
from tests.core.spectra import matrix
from tests.core.written import run

PLENTY = 10**6
#: A few large eigenvalues and a tail, as curvature has them; none is negative.
SPECTRUM = torch.cat((torch.tensor([4.0, 3.0, 2.0]), torch.linspace(0.2, 1, 37))).double()
N = len(SPECTRUM)
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "log": torch.log,
    "sqrt": torch.sqrt,
    "inverse": torch.reciprocal,
    "exp": torch.exp,
}


class Together(DenseOperator):
    """A dense matrix that takes all its vectors in one product."""

    def __init__(self, a: Tensor, *, semidefinite: bool = True, **more: Any):
        super().__init__(a, semidefinite=semidefinite, **more)
        self._a = a

    def apply(self, vectors: Sequence[Tensor], *, borrow: bool = False) -> list[Tensor]:
        self.count += len(vectors)
        return list(torch.stack(list(vectors)) @ self._a.T)


def configured(
    operator: DenseOperator, max_products: int, num_vectors: int = PLENTY, **spec: Any
) -> TraceOf:
    values = {"max_products": max_products, **spec, "seed": Seed(spec.get("seed", 0))}
    budget = Budget(max_products=max_products, num_vectors=num_vectors)
    return TraceOf.configure(TraceOfSpec(**values), operator, budget)


def trace_of(
    a: Tensor | DenseOperator, function: str, max_products: int = 300, **spec: Any
) -> TraceOfResult:
    operator = a if isinstance(a, DenseOperator) else Together(a)
    before = operator.count
    algorithm = configured(operator, max_products, function=function, **spec)
    result: TraceOfResult = drive(algorithm, operator).result
    assert operator.count - before == result.num_products - result.num_exact_products
    assert result.num_products <= max_products
    assert result.num_probes == len(result.probes)
    return result


def true_value(spectrum: Tensor, function: str, damping: float = 0.0) -> float:
    return float(FUNCTIONS[function](spectrum + damping).sum())


# Theorems --------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_with_signs_a_diagonal_matrix_has_no_spread_whatever_the_function(
    function: str, dtype: torch.dtype
) -> None:
    spectrum = SPECTRUM.to(dtype)
    found = trace_of(torch.diag(spectrum), function, 600, rtol=0.01, damping=0.1)
    true = true_value(spectrum.double(), function, 0.1)
    assert found.low <= true <= found.high
    assert found.value == pytest.approx(true, rel=2e-3)
    assert found.outcome == "CONVERGED"
    assert found.num_probes == 16
    assert found.quadrature_error <= 0.2 * 0.01 * abs(true)
    # All probes see the same weights: they differ in their steps alone.
    assert found.standard_error <= found.quadrature_error
    assert all(each.low <= true <= each.high for each in found.probes)


@pytest.mark.parametrize("semidefinite", [True, False])
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_each_probes_bounds_hold_its_form(
    function: str, semidefinite: bool, dtype: torch.dtype
) -> None:
    a = matrix(SPECTRUM)
    operator = Together(a.to(dtype), semidefinite=semidefinite)
    found = trace_of(operator, function, 110, damping=0.02)
    values, u = torch.linalg.eigh(a)
    forms = []
    for index, each in enumerate(found.probes):
        z = operator.domain.random(derived_seed(0, index), "rademacher").double()
        forms.append(float(((u.T @ z) ** 2 * FUNCTIONS[function](values + 0.02)).sum()))
        assert each.low <= forms[-1] <= each.high
        assert math.fsum(each.quadrature.weights) == pytest.approx(1)
    mean = sum(forms) / len(forms)
    slack = found.quadrature_error + found.rounding
    assert abs(found.value - mean) <= slack
    spread = torch.tensor(forms).double().std() / math.sqrt(len(forms))
    assert found.standard_error == pytest.approx(float(spread), rel=0.2)
    assert found.high - found.low > 2 * found.standard_error


def test_of_few_distinct_eigenvalues_steps_leave_nothing_open() -> None:
    spectrum = torch.tensor([0.5] * 10 + [1.0] * 5 + [3.0] * 5).double()
    for function in FUNCTIONS:
        found = trace_of(torch.diag(spectrum), function, 100, rtol=1e-9, damping=0.1)
        assert (found.outcome, found.num_steps) == ("CONVERGED", 3)
        assert found.quadrature_error <= 1e-10 * abs(found.value)
        assert found.low <= true_value(spectrum, function, 0.1) <= found.high


def test_counts_are_whole_numbers_where_eigenvalues_stand_apart() -> None:
    a = matrix(torch.cat((SPECTRUM, torch.tensor([-2.0, -1.0]).double())))
    operator = Together(a, semidefinite=False)
    cases: list[tuple[dict[str, float], int]] = [
        ({"low": 1.5}, 3),
        ({"high": -0.4}, 2),
        ({"low": -0.4, "high": 1e9}, N),
        ({"low": 100.0}, 0),
        ({"low": 1.5, "damping": -1.0}, 2),
        ({}, N + 2),
    ]
    for values, true in cases:
        found = trace_of(operator, "count", 120, **values)
        assert found.low - 1e-9 <= true <= found.high + 1e-9, values
        assert found.high - found.low < 12
        assert 0 <= found.low <= found.high <= N + 2


# Intervals -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("function", ["log", "inverse", "exp"])
def test_intervals_hold_the_truth_in_95_of_100_runs_and_no_bias_is_beyond_what_is_told(
    function: str,
) -> None:
    # Of three distinct eigenvalues, whose form every probe knows exactly after three steps.
    spectrum = torch.tensor([0.25] * 30 + [1.0] * 14 + [3.0] * 8).double()
    a, true, inside = matrix(spectrum), true_value(spectrum, function), 0
    values, quadrature = [], []
    operator = Together(a)
    operator.domain = operator.codomain = QuickSpace(len(a))
    count = 2000
    for seed in range(count):
        found = trace_of(operator, function, 54, num_steps=4, rtol=1e-9, seed=seed)
        inside += found.low <= true <= found.high
        values.append(found.value)
        quadrature.append(found.quadrature_error)
    assert found.num_probes >= 12
    assert 0.93 <= inside / count <= 0.97
    spread = torch.tensor(values).double()
    # A probe that is known well enough, beside the others, ends before its form is exact.
    allowed = 3.5 * float(spread.std()) / math.sqrt(count) + sum(quadrature) / count
    assert abs(float(spread.mean()) - true) <= allowed


def test_intervals_of_few_steps_hold_the_truth_more_often_than_they_have_to() -> None:
    """What steps leave open is allowed for in full: nothing is lost where they are too few."""
    a, true = matrix(SPECTRUM), true_value(SPECTRUM, "log", 0.05)
    inside, wide = 0, 0
    for seed in range(40):
        found = trace_of(a, "log", 36, num_steps=2, rtol=1e-9, seed=seed, damping=0.05)
        assert found.outcome == "MAX_STEPS"
        inside += found.low <= true <= found.high
        wide += found.quadrature_error > found.standard_error
    assert inside >= 39
    assert wide >= 30


def test_more_products_narrow_the_interval() -> None:
    a = matrix(SPECTRUM)
    coarse, fine = (
        sum(
            found.high - found.low
            for seed in range(2)
            for found in [trace_of(a, "log", most, rtol=1e-9, damping=0.5, seed=seed)]
        )
        for most in (60, 240)
    )
    assert fine < coarse / 1.8


def test_a_run_ends_when_its_tolerance_is_met() -> None:
    a = matrix(SPECTRUM)
    for values in ({"rtol": 0.05}, {"rtol": 1e-9, "atol": 2.0}):
        found = trace_of(a, "inverse", 5000, damping=0.1, **values)
        assert found.outcome == "CONVERGED"
        most = max(values["rtol"] * found.value, values.get("atol", 0))
        assert found.standard_error + found.quadrature_error <= most
        assert 16 <= found.num_probes < 200


# Definiteness ----------------------------------------------------------------------------------


@pytest.mark.parametrize("function", ["log", "inverse", "sqrt"])
def test_a_negative_eigenvalue_ends_the_run_with_the_damping_that_helps(function: str) -> None:
    spectrum = torch.cat((torch.tensor([-0.5]).double(), SPECTRUM))
    operator = Together(matrix(spectrum), semidefinite=False)
    found = trace_of(operator, function, 300, damping=0.2)
    assert found.outcome == "INDEFINITE"
    assert math.isnan(found.value)
    assert (found.low, found.high) == (-math.inf, math.inf)
    assert -0.5 - 1e-9 <= found.smallest <= -0.2
    assert found.num_products < 150  # and not the whole budget
    assert found.probes
    assert all(math.isnan(each.value) for each in found.probes)
    assert max(len(each.quadrature.nodes) for each in found.probes) == found.num_steps
    helped = trace_of(operator, function, 150, damping=-found.smallest + 0.3)
    assert helped.outcome in ("CONVERGED", "MAX_PRODUCTS")
    assert helped.low <= true_value(spectrum, function, -found.smallest + 0.3) <= helped.high


@pytest.mark.parametrize("function", ["log", "inverse"])
def test_a_null_space_is_no_positive_matrix(function: str) -> None:
    spectrum = torch.cat((torch.zeros(6).double(), SPECTRUM))
    for dtype in (torch.float64, torch.float32):
        assert trace_of(matrix(spectrum).to(dtype), function, 200).outcome == "INDEFINITE"
        found = trace_of(matrix(spectrum).to(dtype), function, 120, damping=0.1)
        assert found.low <= true_value(spectrum, function, 0.1) <= found.high
    root = trace_of(matrix(spectrum), "sqrt", 120)
    assert root.low <= true_value(spectrum, "sqrt") <= root.high


def test_what_rounding_does_not_tell_from_a_negative_eigenvalue_is_the_limit() -> None:
    spectrum = torch.cat((torch.zeros(6).double(), SPECTRUM))
    found = trace_of(matrix(spectrum).float(), "log", 900, damping=1.3e-5)
    assert found.outcome == "NOISE_LIMIT"
    assert found.low == -math.inf
    assert true_value(spectrum, "log", 1.3e-5) <= found.high
    fine = trace_of(matrix(spectrum), "log", 300, damping=1.3e-5)
    assert fine.outcome in ("CONVERGED", "MAX_PRODUCTS", "MAX_STEPS")
    assert -math.inf < fine.low <= true_value(spectrum, "log", 1.3e-5) <= fine.high


def test_where_the_spectrum_ends_was_not_found_in_few_steps_one_side_is_open() -> None:
    operator = Together(matrix(SPECTRUM), semidefinite=False)
    found = trace_of(operator, "log", 60, num_steps=2)
    assert found.outcome == "MAX_STEPS"
    assert found.low == -math.inf
    assert found.quadrature_error == math.inf
    assert true_value(SPECTRUM, "log") <= found.high < 0


@pytest.mark.parametrize("function", ["log", "exp"])
def test_the_ends_that_a_run_takes_for_those_of_the_spectrum_are_beyond_them(function: str) -> None:
    operator = Together(matrix(SPECTRUM), semidefinite=False)
    operator.most_together = 2
    for seed in range(25):
        algorithm = configured(operator, 60, function=function, seed=seed, num_steps=15)
        state = algorithm.begin(operator)
        while algorithm.step(operator, state) is not None and state.scout:
            assert state.low_end <= 0.2
            assert state.high_end >= 4.0
        assert state.low_end <= 0.2
        assert state.high_end >= 4.0


# Precision -------------------------------------------------------------------------------------


def noisy(a: Tensor, noise: float, exact: Any = "true") -> DenseOperator:
    """Products that are too large, and off by something that is not even linear."""

    def product(v: Tensor) -> Tensor:
        w = a @ v
        return w * (1 + noise) + noise * w.norm() / math.sqrt(N) * torch.cos(37 * w)

    true = (lambda v: a @ v) if exact == "true" else exact
    space = DenseOperator(a).domain
    return DenseOperator(product, space, semidefinite=True, noise=noise, exact=true)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_of_a_coarse_operator_every_product_is_an_exact_one(function: str) -> None:
    a = matrix(SPECTRUM)
    found = trace_of(noisy(a, 0.05), function, 80, damping=0.1)
    plain = trace_of(DenseOperator(a), function, 80, damping=0.1)
    assert found.num_exact_products == found.num_products
    assert found.low <= true_value(SPECTRUM, function, 0.1) <= found.high
    assert found.value == pytest.approx(plain.value, rel=1e-12)
    assert found.outcome == plain.outcome != "UNVERIFIED"


@pytest.mark.parametrize("damping", [0.5, 0.0])
def test_without_memory_for_exact_products_nothing_is_said_of_the_exact_operator(
    damping: float,
) -> None:
    a = matrix(torch.cat((torch.zeros(10).double(), SPECTRUM[10:])))
    found = trace_of(noisy(a, 0.05, exact=None), "log", 200, damping=damping)
    assert found.outcome == "UNVERIFIED"
    assert found.num_exact_products == 0
    assert math.isnan(found.value) == (damping == 0)


def test_a_tolerance_below_rounding_is_the_limit() -> None:
    a = torch.diag(SPECTRUM).float()
    found = trace_of(a, "log", 900, rtol=1e-7, damping=0.1)
    assert found.outcome == "NOISE_LIMIT"
    assert found.rounding > 1e-7 * abs(found.value)
    assert found.low <= true_value(SPECTRUM, "log", 0.1) <= found.high


# Ends ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("semidefinite", [True, False])
def test_the_zero_operator_has_the_function_of_its_damping(
    function: str, semidefinite: bool
) -> None:
    zero = Together(torch.zeros(50, 50).double(), semidefinite=semidefinite)
    found = trace_of(zero, function, 60, damping=0.5)
    true = 50 * float(FUNCTIONS[function](torch.tensor(0.5).double()))
    assert (found.outcome, found.standard_error) == ("CONVERGED", 0)
    assert found.low == pytest.approx(true, rel=1e-14) == found.high
    bare = trace_of(zero, function, 60)
    if function in ("log", "inverse"):
        assert bare.outcome == "INDEFINITE"
    else:
        assert bare.value == (50 if function == "exp" else 0)
    assert trace_of(zero, "count", 60, low=-1.0, high=1e-9).low == pytest.approx(50)
    assert trace_of(zero, "count", 60, low=1e-9).high == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_few_parameters_are_enough(n: int, function: str) -> None:
    spectrum = SPECTRUM[:n]
    for semidefinite in (True, False):
        operator = Together(matrix(spectrum), semidefinite=semidefinite)
        found = trace_of(operator, function, 60)
        assert found.low <= true_value(spectrum, function) <= found.high
        assert found.num_steps <= n


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_product_that_is_no_number_is_named(bad: float) -> None:
    a = matrix(SPECTRUM)
    a[3, 3] = bad
    with pytest.raises(CurvatureError) as caught:
        trace_of(a, "exp", 50)
    assert caught.value.reason == "NON_FINITE"


@pytest.mark.parametrize("num_vectors", [24, 40, 100, 400, PLENTY])
@pytest.mark.parametrize("semidefinite", [True, False])
def test_a_run_holds_no_more_vectors_than_it_may(num_vectors: int, semidefinite: bool) -> None:
    operator = Together(matrix(SPECTRUM), semidefinite=semidefinite)
    algorithm = configured(operator, 80, num_vectors=num_vectors, function="log", damping=0.1)
    state = algorithm.begin(operator)
    while True:
        runs = [*state.probes, *([state.scout] if state.scout else [])]
        assert sum(len(each.rows) + 2 for each in runs) <= num_vectors
        if algorithm.step(operator, state) is None:
            break
    result: TraceOfResult = algorithm.result(operator, state).result
    assert result.low <= true_value(SPECTRUM, "log", 0.1) <= result.high


def test_an_operator_is_not_given_more_at_once_than_it_says() -> None:
    sizes: list[int] = []

    class Few(Together):
        most_together = 3

        def apply(self, vectors: Sequence[Tensor], *, borrow: bool = False) -> list[Tensor]:
            sizes.append(len(vectors))
            return super().apply(vectors, borrow=borrow)

    trace_of(Few(matrix(SPECTRUM)), "exp", 200)
    assert max(sizes) == 3


@pytest.mark.parametrize("semidefinite", [True, False])
@pytest.mark.parametrize(("max_products", "num_steps"), [(6, None), (12, None), (9, 3), (30, 10)])
def test_the_fewest_products_give_a_standard_error(
    max_products: int, num_steps: int | None, semidefinite: bool
) -> None:
    values = {"max_products": max_products, "num_steps": num_steps}
    assert checked(OPERATION, values, HESSIAN).max_products == max_products
    operator = Together(matrix(SPECTRUM), semidefinite=semidefinite)
    for function in ("log", "exp"):
        found = trace_of(operator, function, max_products, num_steps=num_steps, damping=0.1)
        assert 0 < found.standard_error < math.inf
        assert found.low < found.value < found.high


# Runs ------------------------------------------------------------------------------------------

CASES: dict[str, dict[str, Any]] = {
    "log": {"function": "log", "damping": 0.1},
    "log, groups of two": {"function": "log", "damping": 0.1, "num_vectors": 30},
    "inverse, with its end found": {"function": "inverse", "semidefinite": False},
    "exp": {"function": "exp", "num_steps": 5},
    "count": {"function": "count", "low": 1.5, "max_products": 60},
    "indefinite": {"function": "log", "damping": -0.3, "semidefinite": False},
    "exhausted": {"function": "sqrt", "rank": 2},
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_that_is_interrupted_at_every_step_gives_the_same_bits(case: str) -> None:
    values = dict(CASES[case])
    spectrum = SPECTRUM.clone()
    spectrum[values.pop("rank", N) :] = 0
    semidefinite = values.pop("semidefinite", True)
    operator = Together(matrix(spectrum), semidefinite=semidefinite)
    algorithm = configured(operator, values.pop("max_products", 120), rtol=0.05, **values)
    reported, found, state = run(algorithm, operator, interrupted=False)
    others, again, _ = run(algorithm, operator, interrupted=True)
    assert repr(reported) == repr(others)  # of what is no number too
    assert repr(found.result) == repr(again.result)
    assert len(reported) > 1
    assert algorithm.step(operator, state) is None


def test_progress_tells_the_estimate_so_far() -> None:
    reported: list[Advance] = []
    operator = Together(matrix(SPECTRUM))
    algorithm = configured(operator, 120, function="log", damping=0.2, rtol=1e-9)
    found = drive(algorithm, operator, reported.append)
    details = [each.detail for each in reported]
    assert [each.num_products for each in reported][:3] == [8, 16, 24]
    assert details[0].standard_error < math.inf
    assert details[-1].value == pytest.approx(found.result.value)
    assert [each.num_probes for each in details] == sorted(each.num_probes for each in details)
    assert details[-1].table().rows[0][0] == str(found.result.num_probes)


def test_other_seeds_are_other_estimates_and_the_same_seed_the_same() -> None:
    a = matrix(SPECTRUM)
    one, two, other = (trace_of(a, "log", 100, seed=seed) for seed in (1, 1, 2))
    assert one == two
    assert one.value != other.value


# Rules -----------------------------------------------------------------------------------------

HESSIAN = Facts(num_parameters=100, kind="hessian")


@pytest.mark.parametrize(
    ("values", "reason", "word"),
    [
        ({"function": "det"}, "FUNCTION_UNSUPPORTED", "log, exp"),
        ({"function": None}, "FUNCTION_UNSUPPORTED", "log, exp"),
        ({"low": 0.0}, "LOW_INVALID", "log has none"),
        ({"function": "exp", "high": 0.0}, "HIGH_INVALID", "exp has none"),
        ({"function": "count", "low": 2.0, "high": 1.0}, "LOW_INVALID", "below high"),
        ({"function": "count", "low": 1.0, "high": 1.0}, "LOW_INVALID", "below high"),
        ({"function": "count", "low": math.inf}, "LOW_INVALID", "finite"),
        ({"damping": math.nan}, "DAMPING_INVALID", "finite"),
        ({"num_steps": 0}, "NUM_STEPS_INVALID", "1 to 2000"),
        ({"num_steps": 3000}, "NUM_STEPS_INVALID", "1 to 2000"),
        ({"rtol": 0.0}, "RTOL_INVALID", "0 < rtol < 1"),
        ({"rtol": 1.0}, "RTOL_INVALID", "0 < rtol < 1"),
        ({"atol": -1.0}, "ATOL_INVALID", "0 or more"),
        ({"max_products": 5}, "MAX_PRODUCTS_INVALID", "6 to"),
        ({"max_products": 20, "num_steps": 10}, "MAX_PRODUCTS_INVALID", "30 to"),
        ({"max_products": 10**6}, "MAX_PRODUCTS_INVALID", "200000"),
        ({"seed": -1}, "SEED_INVALID", ""),
    ],
)
def test_a_question_without_an_answer_is_refused_with_what_would_do(
    values: dict[str, Any], reason: str, word: str
) -> None:
    with pytest.raises(SpecError) as refusal:
        checked(OPERATION, values, HESSIAN)
    assert refusal.value.reason == reason
    assert word in refusal.value.message
