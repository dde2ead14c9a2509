"""Traces of dense matrices by every method: theorems, intervals, ends, and states written down."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hvp_core.errors import CurvatureError
from hvp_core.linop.linear_operator import LinearOperator
from hvp_core.runs.algorithm import Advance, Budget, derived_seed, drive
from hvp_core.stochastic.samples import Estimate, Moments, combined
from hvp_core.stochastic.trace import Trace
from hvp_operations.checking import Seed, checked
from hvp_operations.operation import Facts, SpecError
from hvp_operations.students_t import student_t
from hvp_operations.trace import OPERATION, TraceResult, TraceSpec
from torch import Tensor

from tests.core.dense import DenseOperator
from tests.core.spectra import matrix
from tests.core.written import is_same, run

PLENTY = 10**6
METHODS = ("hutchinson", "hutch++", "xtrace", "xnystrace")
#: A few large eigenvalues and a tail, as curvature has them; none is negative.
SPECTRUM = torch.cat((torch.tensor([4.0, 3.0, 2.0]), torch.linspace(0.2, 1, 57))).double()
N = len(SPECTRUM)


class Together(DenseOperator):
    """A dense semidefinite matrix that takes all its vectors in one product."""

    def __init__(self, a: Tensor, **more: Any):
        super().__init__(a, semidefinite=True, **more)
        self._a = a

    def apply(self, vectors: Sequence[Tensor], *, borrow: bool = False) -> list[Tensor]:
        self.count += len(vectors)
        return list(torch.stack(list(vectors)) @ self._a.T)


def configured(
    operator: LinearOperator, max_products: int, *, num_vectors: int = PLENTY, **spec: Any
) -> Trace:
    values = {"max_products": max_products, **spec, "seed": Seed(spec.get("seed", 0))}
    budget = Budget(max_products=max_products, num_vectors=num_vectors)
    return Trace.configure(TraceSpec(**values), operator, budget)


def trace(
    a: Tensor | DenseOperator, max_products: int, *, num_vectors: int = PLENTY, **spec: Any
) -> TraceResult:
    operator = Together(a) if isinstance(a, Tensor) else a
    before = operator.count
    algorithm = configured(operator, max_products, num_vectors=num_vectors, **spec)
    result: TraceResult = drive(algorithm, operator).result
    assert operator.count - before == result.num_products - result.num_exact_products
    assert result.num_products <= max_products
    return result


# Samples ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("degrees", "expected"),
    [(1, 12.706205), (2, 4.302653), (3, 3.182446), (4, 2.776445), (9, 2.262157), (30, 2.042272)],
)
def test_students_t_is_that_of_the_tables(degrees: int, expected: float) -> None:
    assert student_t(degrees) == pytest.approx(expected, abs=1e-6)
    assert student_t(10**6) == pytest.approx(1.95996, abs=3e-3)


def test_running_moments_are_those_of_all_samples_together() -> None:
    samples = 1e6 + torch.randn(50, 3, generator=torch.Generator().manual_seed(0)).double()
    moments = Moments.of(3)
    for sample in samples:
        moments.add(sample)
    estimate = moments.estimate()
    assert torch.allclose(estimate.value, samples.mean(0), rtol=1e-14)
    assert torch.allclose(estimate.standard_error, samples.std(0) / math.sqrt(50), rtol=1e-9)


def test_independent_estimates_add_their_variances() -> None:
    one, three = (torch.tensor([each]).double() for each in (1.0, 3.0))
    terms = [(0.5, Estimate(one, 6 * one, 9)), (1.0, Estimate(three, 4 * one, 3))]
    value, error, half = (float(each) for each in combined(terms))
    assert (value, error) == (3.5, 5.0)
    assert half == pytest.approx(math.hypot(3 * student_t(9), 4 * student_t(3)))


# Theorems --------------------------------------------------------------------------------------


def test_hutchinson_with_signs_is_exact_on_a_diagonal_matrix() -> None:
    found = trace(torch.diag(SPECTRUM), 40, method="hutchinson")
    assert found.value == pytest.approx(float(SPECTRUM.sum()), rel=1e-14)
    assert found.standard_error <= 1e-14 * found.value
    assert found.low <= float(SPECTRUM.sum()) <= found.high
    assert (found.outcome, found.num_products) == ("CONVERGED", 16)


@pytest.mark.parametrize("method", METHODS[1:])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_matrix_of_low_rank_is_known_once_a_basis_spans_its_range(
    method: str, dtype: torch.dtype
) -> None:
    spectrum = torch.zeros(90).double()
    spectrum[:5] = torch.tensor([0.5, 1.0, 2.0, 3.0, 5.0])
    if method != "xnystrace":
        spectrum[0] = -0.5
    found = trace(matrix(spectrum).to(dtype), 60, method=method)
    assert found.standard_error == 0
    assert found.low <= float(spectrum.sum()) <= found.high
    assert found.high - found.low <= (2e-3 if dtype == torch.float32 else 1e-10)
    assert found.outcome == "CONVERGED"
    # A group of eight random vectors, and the products of the five vectors of the basis.
    assert found.num_products == (8 if method == "xnystrace" else 13)


def sphere(index: int) -> Tensor:
    return DenseOperator(torch.eye(N).double()).domain.random(derived_seed(0, index), "sphere")


def one_left_out(a: Tensor, omega: Tensor, method: str) -> Tensor:
    """The estimates by their definitions, with a basis made anew for each vector."""
    samples = []
    for index in range(omega.shape[1]):
        others = torch.cat((omega[:, :index], omega[:, index + 1 :]), 1)
        w = omega[:, index]
        if method == "xtrace":
            q, _ = torch.linalg.qr(a @ others)
            u = w - q @ (q.T @ w)
            rest = (N - q.shape[1]) * (u @ a @ u) / (u @ u)
            samples.append((q.T @ a @ q).trace() + rest)
        else:
            y = a @ others
            low_rank = y @ torch.linalg.solve(others.T @ y, y.T)
            samples.append(low_rank.trace() + N * (w @ (a - low_rank) @ w))
    return torch.stack(samples)


@pytest.mark.parametrize(("method", "k"), [("xtrace", 6), ("xtrace", 2), ("xnystrace", 6)])
def test_each_vector_is_left_out_in_turn(method: str, k: int) -> None:
    a = matrix(SPECTRUM)
    omega = torch.stack([sphere(index) for index in range(k)], 1)
    products = 2 * k if method == "xtrace" else k
    found = trace(a, products, method=method)
    samples = one_left_out(a, omega, method)
    assert found.value == pytest.approx(float(samples.mean()), rel=1e-10)
    means = []
    for index in range(k):
        others = torch.cat((omega[:, :index], omega[:, index + 1 :]), 1)
        if k > 2:
            means.append(one_left_out(a, others, method).mean())
        else:  # one vector is left, and no basis
            means.append(N * (others[:, 0] @ a @ others[:, 0]))
    jackknife = torch.stack(means).std() * (k - 1) / math.sqrt(k)
    expected = float((jackknife * samples.std() / math.sqrt(k)).sqrt())
    assert found.standard_error == pytest.approx(expected, rel=1e-8)
    assert (found.outcome, found.num_probes) == ("MAX_PRODUCTS", k)


def test_hutch_is_the_trace_on_its_basis_and_the_mean_over_the_rest() -> None:
    a = matrix(SPECTRUM)
    draw = DenseOperator(a).domain.random
    vectors = [draw(derived_seed(0, index), "rademacher") for index in range(12)]
    q, _ = torch.linalg.qr(a @ torch.stack(vectors[:6], 1))
    rest = [vector - q @ (q.T @ vector) for vector in vectors[6:]]
    forms = torch.stack([u @ a @ u for u in rest])
    found = trace(a, 18, method="hutch++")
    assert found.value == pytest.approx(float((q.T @ a @ q).trace() + forms.mean()), rel=1e-12)
    assert found.standard_error == pytest.approx(float(forms.std()) / math.sqrt(6), rel=1e-9)


# Intervals -------------------------------------------------------------------------------------


def covers(method: str, count: int, max_products: int, rtol: float) -> None:
    a, true, inside, values = matrix(SPECTRUM), float(SPECTRUM.sum()), 0, []
    for seed in range(count):
        found = trace(a, max_products, method=method, rtol=rtol, seed=seed)
        inside += found.low <= true <= found.high
        values.append(found.value)
    assert 0.93 <= inside / count <= 0.97
    spread = torch.tensor(values).double()
    assert abs(float(spread.mean()) - true) <= 3.5 * float(spread.std()) / math.sqrt(count)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("method", "max_products"),
    [("hutchinson", 40), ("hutch++", 48), ("xtrace", 32), ("xnystrace", 24)],
)
def test_intervals_hold_the_truth_in_95_of_100_runs_and_estimates_have_no_bias(
    method: str, max_products: int
) -> None:
    covers(method, 2000, max_products, 1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_more_products_narrow_the_interval(method: str) -> None:
    a = matrix(SPECTRUM)
    coarse, fine = (
        [trace(a, most, method=method, rtol=1e-9, seed=seed).standard_error for seed in range(10)]
        for most in (16, 50)
    )
    assert sum(fine) < sum(coarse) / 1.4


def test_a_run_ends_when_its_tolerance_is_met() -> None:
    a = matrix(SPECTRUM)
    cases: list[dict[str, Any]] = [{"rtol": 0.1}, {"rtol": 1e-9, "atol": 4.0}]
    for values in cases:
        found = trace(a, 5000, method="hutchinson", **values)
        assert found.outcome == "CONVERGED"
        most = max(values["rtol"] * found.value, values.get("atol", 0))
        assert found.standard_error <= most
        assert 16 <= found.num_products < 60


# Precision -------------------------------------------------------------------------------------


def noisy(a: Tensor, noise: float, exact: Any = "true") -> DenseOperator:
    """Products that are too large, and off by something that is not even linear."""

    def product(v: Tensor) -> Tensor:
        w = a @ v
        return w * (1 + noise) + noise * w.norm() / math.sqrt(N) * torch.cos(37 * w)

    true = (lambda v: a @ v) if exact == "true" else exact
    space = DenseOperator(a).domain
    return DenseOperator(product, space, semidefinite=True, noise=noise, exact=true)


def test_of_a_coarse_operator_intervals_are_those_of_the_exact_one() -> None:
    # Nearly diagonal, so that samples are so close together that a shift of 5 % shows.
    a = torch.diag(SPECTRUM) + 0.005 * matrix(SPECTRUM)
    true, inside = float(a.trace()), 0
    for seed in range(200):
        found = trace(noisy(a, 0.05), 60, rtol=0.005, seed=seed)
        assert found.method == "hutchinson"
        assert found.num_exact_products >= 4
        inside += found.low <= true <= found.high
        assert found.high - found.low < 0.1 * true
    assert inside >= 185


@pytest.mark.parametrize("method", METHODS)
def test_without_memory_for_exact_products_nothing_is_said_of_the_exact_operator(
    method: str,
) -> None:
    found = trace(noisy(matrix(SPECTRUM), 0.05, exact=None), 50, method=method)
    assert found.outcome == "UNVERIFIED"
    assert found.num_exact_products == 0
    assert found.value == pytest.approx(float(SPECTRUM.sum()), rel=0.4)


@pytest.mark.parametrize("method", METHODS[1:])
def test_other_methods_take_what_they_read_of_the_exact_operator(method: str) -> None:
    a = matrix(SPECTRUM)
    found = trace(noisy(a, 0.05), 48, method=method, rtol=1e-9)
    plain = trace(a, 48, method=method, rtol=1e-9)
    assert found.outcome == plain.outcome == "MAX_PRODUCTS"
    assert found.num_exact_products == (32 if method == "hutch++" else found.num_products)
    if method != "hutch++":  # whose basis is another
        assert found.value == pytest.approx(plain.value, rel=1e-12)


def test_a_tolerance_below_rounding_is_the_limit() -> None:
    a = torch.diag(SPECTRUM).float()
    found = trace(a, 40, method="hutchinson", rtol=1e-9)
    assert found.outcome == "NOISE_LIMIT"
    assert found.rounding > 1e-9 * found.value
    assert found.low <= float(SPECTRUM.sum()) <= found.high
    assert trace(a, 40, method="hutchinson", rtol=1e-3).outcome == "CONVERGED"


# Ends ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["auto", *METHODS])
def test_the_zero_operator_has_the_interval_zero(method: str) -> None:
    found = trace(torch.zeros(50, 50).double(), 60, method=method)
    assert (found.value, found.standard_error, found.low, found.high) == (0, 0, 0, 0)
    assert found.outcome == "CONVERGED"


@pytest.mark.parametrize("n", [1, 2, 16])
@pytest.mark.parametrize("method", ["auto", *METHODS])
def test_of_few_parameters_each_coordinate_takes_its_turn(n: int, method: str) -> None:
    a = matrix(SPECTRUM[:n])
    found = trace(a, 20, method=method)
    assert found.value == pytest.approx(float(a.trace()), rel=1e-14)
    assert (found.method, found.standard_error, found.num_probes) == ("exact", 0, 0)
    assert (found.num_products, found.outcome) == (n, "CONVERGED")


@pytest.mark.parametrize("method", METHODS)
def test_coordinates_take_their_turns_where_they_cost_less_than_the_tolerance(method: str) -> None:
    a = matrix(torch.linspace(0.5, 1.5, N).double())
    found = trace(a, 500, method=method, rtol=1e-5)
    assert found.outcome == "CONVERGED"
    assert found.value == pytest.approx(float(a.trace()), rel=1e-12)
    assert found.num_products <= 10 * N
    if method != "hutch++":
        assert (found.method, found.standard_error) == ("exact", 0)
        assert method in found.reason


def test_of_a_trace_of_zero_a_tolerance_in_its_units_will_do() -> None:
    spectrum = torch.linspace(-1, 1, N).double()
    operator = DenseOperator(matrix(spectrum))
    assert trace(operator, 50, method="hutchinson", atol=3.0).outcome == "CONVERGED"
    assert trace(operator, 50, method="hutchinson").outcome == "MAX_PRODUCTS"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_product_that_is_no_number_is_named(method: str, bad: float) -> None:
    a = matrix(SPECTRUM)
    a[3, 3] = bad
    with pytest.raises(CurvatureError) as caught:
        trace(a, 50, method=method)
    assert caught.value.reason == "NON_FINITE"


# Choice and memory -----------------------------------------------------------------------------


def test_the_method_follows_the_operator_and_the_result_says_why() -> None:
    a = matrix(SPECTRUM)
    cases: list[tuple[LinearOperator, dict[str, Any], str, str]] = [
        (DenseOperator(a, semidefinite=True), {}, "xnystrace", "no eigenvalue is negative"),
        (DenseOperator(a), {}, "xtrace", "largest eigenvalues"),
        (DenseOperator(a), {"per": "tensor"}, "hutchinson", "blocks"),
        (noisy(a, 0.01), {}, "hutchinson", "coarser"),
        (DenseOperator(a), {"num_vectors": 9}, "hutchinson", "memory"),
        (DenseOperator(a), {"method": "hutch++"}, "hutch++", "asked"),
    ]
    for operator, values, method, why in cases:
        choice = configured(operator, 50, **values).choice
        assert choice.method == method
        assert why in choice.reason


@pytest.mark.parametrize("method", [pytest.param("xtrace", marks=pytest.mark.slow), "xnystrace"])
def test_where_memory_ends_a_sketch_others_follow_and_their_mean_has_no_bias(method: str) -> None:
    a, values = matrix(SPECTRUM), []
    for seed in range(100):
        found = trace(a, 48, method=method, num_vectors=17, rtol=1e-9, seed=seed)
        assert found.num_products == 48
        values.append(found.value)
    mean, error = torch.tensor(values).mean(), torch.tensor(values).std() / 10
    assert abs(float(mean) - float(SPECTRUM.sum())) <= 3.5 * float(error)


@pytest.mark.parametrize("num_vectors", [2, 5, 9, 17, 33, 100])
@pytest.mark.parametrize("method", METHODS)
def test_a_run_holds_no_more_vectors_than_it_may(method: str, num_vectors: int) -> None:
    if num_vectors < 5 and method != "hutchinson":
        return
    operator = Together(matrix(SPECTRUM))
    choice = configured(operator, 50, num_vectors=num_vectors, method=method).choice
    in_flight = 2 * choice.num_together + (1 if choice.num_rows else 0)
    assert choice.num_rows + in_flight <= num_vectors
    assert choice.num_rows >= 2 or method == "hutchinson"


def test_forms_by_a_cheaper_rule_are_taken_where_the_operator_has_one() -> None:
    class WithForms(Together):
        def forms(self, vectors: Sequence[Tensor]) -> list[float]:
            self.count += len(vectors)
            return [float(vector @ self._a @ vector) for vector in vectors]

        def apply(self, vectors: Sequence[Tensor], *, borrow: bool = False) -> list[Tensor]:
            raise AssertionError("a product was taken")

    a = matrix(SPECTRUM)
    found, plain = (
        trace(operator, 24, method="hutchinson", rtol=1e-9)
        for operator in (WithForms(a), Together(a))
    )
    assert found.value == pytest.approx(plain.value, rel=1e-13)
    assert found.rounding < plain.rounding


# Runs ------------------------------------------------------------------------------------------

CASES: dict[str, Callable[[], tuple[DenseOperator, Trace]]] = {
    **{
        f"{method} in {num_vectors}": lambda method=method, num_vectors=num_vectors: (  # type: ignore[misc]
            (operator := Together(matrix(SPECTRUM))),
            configured(operator, 50, method=method, num_vectors=num_vectors, rtol=1e-9),
        )
        for method in METHODS
        for num_vectors in (17, PLENTY)
    },
    "coarse": lambda: (
        (operator := noisy(matrix(SPECTRUM), 0.02)),
        configured(operator, 60, rtol=0.1),
    ),
    "coordinates": lambda: (
        (operator := Together(matrix(SPECTRUM))),
        configured(operator, 500, rtol=1e-6),
    ),
    "low rank": lambda: (
        (operator := Together(matrix((SPECTRUM > 1) * SPECTRUM))),
        configured(operator, 50, method="xtrace"),
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_run_that_is_interrupted_at_every_step_gives_the_same_bits(
    case: Callable[[], tuple[DenseOperator, Trace]],
) -> None:
    operator, algorithm = case()
    reported, found, state = run(algorithm, operator, interrupted=False)
    others, again, _ = run(algorithm, operator, interrupted=True)
    assert is_same(reported, others)
    assert is_same(found.result, again.result)
    assert len(reported) > 1 or found.result.standard_error == 0
    assert algorithm.step(operator, state) is None


def test_progress_tells_the_estimate_so_far() -> None:
    reported: list[Advance] = []
    operator = Together(matrix(SPECTRUM))
    drive(configured(operator, 40, method="hutchinson", rtol=1e-9), operator, reported.append)
    assert [each.num_products for each in reported] == [8, 16, 24, 32, 40]
    assert [each.detail.num_probes for each in reported] == [8, 16, 24, 32, 40]
    errors = [each.detail.standard_error for each in reported]
    assert errors[-1] < errors[0]
    assert reported[-1].detail.table().rows[0][0] == "40"


def test_other_seeds_are_other_estimates_and_the_same_seed_the_same() -> None:
    a = matrix(SPECTRUM)
    for method in METHODS:
        one, two, other = (trace(a, 48, method=method, seed=seed) for seed in (1, 1, 2))
        assert one == two
        assert one.value != other.value


# Rules -----------------------------------------------------------------------------------------

HESSIAN = Facts(num_parameters=100, kind="hessian")


@pytest.mark.parametrize(
    ("values", "reason", "word"),
    [
        ({"method": "xnystrace"}, "METHOD_UNSUPPORTED", "xtrace"),
        ({"method": "hutch"}, "METHOD_UNSUPPORTED", "hutch++"),
        ({"per": "row"}, "PER_UNSUPPORTED", "tensor"),
        ({"per": "layer", "method": "xtrace"}, "PER_UNSUPPORTED", "hutchinson"),
        ({"rtol": 0.0}, "RTOL_INVALID", "0 < rtol < 1"),
        ({"rtol": 1.0}, "RTOL_INVALID", "0 < rtol < 1"),
        ({"rtol": math.nan}, "RTOL_INVALID", "finite"),
        ({"atol": -1.0}, "ATOL_INVALID", "0 or more"),
        ({"max_products": 5}, "MAX_PRODUCTS_INVALID", "at least 6"),
        ({"max_products": 3, "method": "hutch++"}, "MAX_PRODUCTS_INVALID", "at least 4"),
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


def test_the_least_products_give_a_standard_error_and_a_matrix_has_to_be_semidefinite() -> None:
    ggn = replace(HESSIAN, kind="ggn")
    for method, least in (("hutchinson", 6), ("hutch++", 4), ("xtrace", 4), ("xnystrace", 2)):
        spec = checked(OPERATION, {"method": method, "max_products": least}, ggn)
        found = trace(matrix(SPECTRUM), least, method=spec.method)
        assert 0 < found.standard_error < math.inf
        assert found.num_products == least
    coarse = trace(noisy(matrix(SPECTRUM), 0.05), 6, method="hutchinson")
    assert (coarse.num_products, coarse.num_exact_products) == (6, 2)
    with pytest.raises(CurvatureError, match="METHOD_UNSUPPORTED"):
        configured(DenseOperator(matrix(SPECTRUM)), 50, method="xnystrace")
