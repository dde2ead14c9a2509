"""Diagonals of dense matrices by every method: theorems, errors, ends, and states written down."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hvp_core.errors import CurvatureError
from hvp_core.linop.linear_operator import LinearOperator
from hvp_core.runs.algorithm import Advance, Budget, derived_seed, drive
from hvp_core.stochastic.diagonal import Diagonal
from hvp_core.stochastic.vector_moments import VectorMoments
from hvp_core.stochastic.xdiag import XDiagSketch
from hvp_operations.checking import Seed, checked
from hvp_operations.diagonal import OPERATION, DiagonalResult, DiagonalSpec, basis_vectors, beside
from hvp_operations.operation import Facts, SpecError
from torch import Tensor

from tests.core.dense import DenseOperator, DenseSpace, QuickSpace
from tests.core.spectra import matrix
from tests.core.written import is_same, run

PLENTY = 10**6
SKETCH_OF_EIGHT = beside(1) + basis_vectors(8)
METHODS = ("hutchinson", "xdiag")
#: A few large eigenvalues of either sign and a tail, as curvature has them.
SPECTRUM = torch.cat((torch.tensor([-4.0, 3.0, 2.0, 8.0]), torch.linspace(-1, 1, 56))).double()
N = len(SPECTRUM)


class Answer:
    """A result with its vectors."""

    def __init__(self, result: DiagonalResult, diagonal: Tensor, error: Tensor):
        self.result, self.diagonal, self.error = result, diagonal, error

    def within(self, true: Tensor, rounding: float = 0.0) -> float:
        """The share of the elements whose intervals hold the truth."""
        half = self.result.interval_factor * self.error + rounding
        return float(((self.diagonal - true).abs() <= half).double().mean())


def configured(
    operator: LinearOperator, max_products: int, *, num_vectors: int = PLENTY, **spec: Any
) -> Diagonal:
    values = {"max_products": max_products, **spec, "seed": Seed(spec.get("seed", 0))}
    budget = Budget(max_products=max_products, num_vectors=num_vectors)
    return Diagonal.configure(DiagonalSpec(**values), operator, budget)


def diagonal(
    a: Tensor | DenseOperator, max_products: int, *, num_vectors: int = PLENTY, **spec: Any
) -> Answer:
    operator = DenseOperator(a) if isinstance(a, Tensor) else a
    before = operator.count
    algorithm = configured(operator, max_products, num_vectors=num_vectors, **spec)
    found = drive(algorithm, operator)
    assert operator.count - before == found.result.num_products - found.result.num_exact_products
    assert found.result.num_products <= max_products
    assert found.vectors[0].dtype == found.vectors[1].dtype == operator.domain.dtype
    return Answer(found.result, *found.vectors)


def signs(index: int, n: int = N, seed: int = 0) -> Tensor:
    return DenseSpace(n).random(derived_seed(seed, index), "rademacher")


# Theorems --------------------------------------------------------------------------------------


def test_one_vector_of_random_signs_gives_all_of_a_diagonal_matrix() -> None:
    operator = DenseOperator(torch.diag(SPECTRUM))
    algorithm = configured(operator, 40, method="hutchinson", num_vectors=beside(1))
    state = algorithm.begin(operator)
    algorithm.step(operator, state)
    assert state.num_products == 1
    assert torch.equal(state.samples.mean, SPECTRUM)
    found = diagonal(torch.diag(SPECTRUM), 40, method="hutchinson")
    assert torch.equal(found.diagonal, SPECTRUM)
    assert not found.error.any()
    assert (found.result.outcome, found.result.num_products) == ("CONVERGED", 16)


def test_the_error_of_signs_is_what_is_beside_the_diagonal() -> None:
    # Var = Σ_{j≠i} A_ij²: the spread of many samples, and what a run says of the mean of 40.
    a = matrix(torch.linspace(-1, 2, 410).double())
    variance = a.square().sum(1) - a.diagonal().square()
    found = diagonal(a, 400, method="hutchinson", rtol=1e-9)
    expected = (variance / 400).sqrt()
    assert torch.allclose(found.error, expected, rtol=0.2)
    assert float(((found.diagonal - a.diagonal()) / expected).abs().max()) < 4.5
    a = matrix(SPECTRUM)
    few = diagonal(a, 40, method="hutchinson", rtol=1e-9)
    samples = torch.stack([signs(k) * (a @ signs(k)) for k in range(40)])
    assert torch.allclose(few.diagonal, samples.mean(0), atol=1e-13)
    assert torch.allclose(few.error, samples.std(0) / math.sqrt(40), atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_matrix_of_low_rank_is_known_once_a_basis_spans_its_range(dtype: torch.dtype) -> None:
    spectrum = torch.zeros(90).double()
    spectrum[:5] = torch.tensor([-0.5, 1.0, 2.0, 3.0, 5.0])
    a = matrix(spectrum).to(dtype)
    for method in ("xdiag", "auto"):
        found = diagonal(a, 60, method=method)
        assert not found.error.any()
        assert float((found.diagonal - a.diagonal()).norm()) <= found.result.rounding
        assert found.result.rounding <= (1e-4 if dtype == torch.float32 else 1e-11)
        assert (found.result.outcome, found.result.method) == ("CONVERGED", "xdiag")
        # A group of eight random vectors, and the products of the five vectors of the basis.
        assert (found.result.num_products, found.result.interval_factor) == (13, 0)


def one_left_out(a: Tensor, omega: Tensor) -> Tensor:
    """The estimates (n, k) by their definition, with a basis made anew for each vector."""
    found = []
    for index in range(omega.shape[1]):
        others = torch.cat((omega[:, :index], omega[:, index + 1 :]), 1)
        q, _ = torch.linalg.qr(a @ others)
        rest = a @ omega[:, index]
        rest = rest - q @ (q.T @ rest)
        found.append((q * (a @ q)).sum(1) + omega[:, index] * rest)
    return torch.stack(found, 1)


@pytest.mark.parametrize("k", [2, 6, 13])
def test_each_vector_is_left_out_in_turn(k: int) -> None:
    a = matrix(SPECTRUM)
    omega = torch.stack([signs(index) for index in range(k)], 1)
    found = diagonal(a, 2 * k, method="xdiag", rtol=1e-9)
    samples = one_left_out(a, omega)
    assert torch.allclose(found.diagonal, samples.mean(1), atol=1e-12)
    means = torch.stack(
        [one_left_out(a, omega[:, torch.arange(k) != index]).mean(1) for index in range(k)], 1
    )
    jackknife = means.std(1) * (k - 1) / math.sqrt(k)
    expected = (jackknife * samples.std(1) / math.sqrt(k)).sqrt()
    assert torch.allclose(found.error, expected, rtol=1e-8)
    assert (found.result.outcome, found.result.num_probes) == ("MAX_PRODUCTS", k)


def test_errors_are_right_where_two_products_are_nearly_parallel() -> None:
    # Behind five large eigenvalues there is a gap of 1e-7: leaving two vectors out loses one.
    spectrum = torch.cat((torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0]), 1e-7 * torch.rand(55))).double()
    a = matrix(spectrum)
    omega = torch.stack([signs(index) for index in range(6)], 1)
    space, sketch = DenseSpace(N), XDiagSketch.begin(DenseSpace(N), 6)
    for vector in omega.T:
        sketch.extend(space, vector, a @ vector)
    for row in sketch.range.rows:
        sketch.project(space, a @ row)
    found = sketch.estimate(space, VectorMoments.of(space))
    samples = one_left_out(a, omega)
    means = torch.stack(
        [one_left_out(a, omega[:, torch.arange(6) != index]).mean(1) for index in range(6)], 1
    )
    expected = (means.std(1) * samples.std(1) * 5 / 6).sqrt()
    assert torch.allclose(found.value, samples.mean(1), atol=1e-13)
    assert torch.allclose(found.error, expected, rtol=1e-3)


# Errors ----------------------------------------------------------------------------------------


def covers(method: str, count: int, max_products: int, **spec: Any) -> float:
    """The mean share of the elements in their intervals; that there is no bias is checked."""
    a, inside = matrix(SPECTRUM), 0.0
    total, squares = torch.zeros(N).double(), torch.zeros(N).double()
    operator = DenseOperator(a, QuickSpace(N))
    for seed in range(count):
        found = diagonal(operator, max_products, method=method, rtol=1e-9, seed=seed, **spec)
        inside += found.within(a.diagonal()) / count
        total += found.diagonal - a.diagonal()
        squares += (found.diagonal - a.diagonal()) ** 2
    z = total / squares.sqrt()  # each about normal, of 60 elements in five cases
    assert float(z.abs().max()) < 4.75  # but with a chance of 6e-4
    assert float(z.square().mean()) < 2
    return inside


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("method", "max_products", "num_vectors", "count"),
    [
        ("hutchinson", 40, PLENTY, 2000),
        ("xdiag", 16, PLENTY, 2000),
        ("xdiag", 32, PLENTY, 500),
        ("xdiag", 40, SKETCH_OF_EIGHT, 500),
        ("auto", 40, PLENTY, 500),
    ],
)
def test_intervals_hold_95_of_100_elements_and_estimates_have_no_bias(
    method: str, max_products: int, num_vectors: int, count: int
) -> None:
    inside = covers(method, count, max_products, num_vectors=num_vectors)
    assert 0.94 <= inside <= (0.96 if method == "hutchinson" else 0.99)


@pytest.mark.parametrize(("method", "most"), [("hutchinson", 0.97), ("xdiag", 0.99)])
def test_intervals_of_forty_runs_hold_their_elements(method: str, most: float) -> None:
    assert 0.93 <= covers(method, 40, 32) <= most


def test_norms_are_those_of_the_diagonal_and_of_its_error() -> None:
    a = matrix(SPECTRUM)
    true = float(a.diagonal().norm())
    norms = [diagonal(a, 16, method="hutchinson", seed=seed).result.norm for seed in range(40)]
    squares = torch.tensor(norms).square()
    spread = float(squares.std()) / math.sqrt(40)
    assert abs(float(squares.mean()) - true**2) <= 4 * spread
    found = diagonal(a, 400, method="xdiag", rtol=1e-9)
    assert found.result.relative_standard_error * found.result.norm == pytest.approx(
        float(found.error.norm())
    )


def test_a_run_ends_when_its_tolerance_is_met() -> None:
    a = matrix(SPECTRUM) + 10 * torch.eye(N).double()
    cases: list[dict[str, Any]] = [{"rtol": 0.1}, {"rtol": 1e-9, "atol": 8.0}]
    for method in METHODS:
        for values in cases:
            found = diagonal(a, 5000, method=method, **values).result
            assert found.outcome == "CONVERGED"
            error = found.relative_standard_error * found.norm
            assert error <= max(values["rtol"] * found.norm, values.get("atol", 0))
            assert 16 <= found.num_products < (60 if method == "hutchinson" else 130)


# Precision -------------------------------------------------------------------------------------


def noisy(a: Tensor, noise: float, exact: Any = "true") -> DenseOperator:
    """Products that are too large, and off by something that is not even linear."""

    def product(v: Tensor) -> Tensor:
        w = a @ v
        return w * (1 + noise) + noise * w.norm() / math.sqrt(N) * torch.cos(37 * w)

    true = (lambda v: a @ v) if exact == "true" else exact
    return DenseOperator(product, DenseSpace(N), noise=noise, exact=true)


def test_of_a_coarse_operator_errors_are_those_of_the_exact_diagonal() -> None:
    # Nearly diagonal, so that samples are so close together that a shift of 5 % shows.
    a = torch.diag(10 + SPECTRUM) + 0.01 * matrix(SPECTRUM)
    inside = 0.0
    for seed in range(30):
        found = diagonal(noisy(a, 0.05), 60, rtol=0.02, seed=seed)
        assert (found.result.method, found.result.outcome) == ("hutchinson", "CONVERGED")
        assert found.result.num_exact_products >= 4
        assert float((found.diagonal - a.diagonal()).norm()) <= 0.04 * found.result.norm
        inside += found.within(a.diagonal()) / 30
    assert 0.9 <= inside <= 0.99


@pytest.mark.parametrize("method", METHODS)
def test_without_memory_for_exact_products_nothing_is_said_of_the_exact_operator(
    method: str,
) -> None:
    found = diagonal(noisy(matrix(SPECTRUM), 0.05, exact=None), 50, method=method).result
    assert (found.outcome, found.num_exact_products) == ("UNVERIFIED", 0)


def test_a_sketch_is_made_of_exact_products_alone() -> None:
    a = matrix(SPECTRUM)
    found = diagonal(noisy(a, 0.05), 48, method="xdiag", rtol=1e-9)
    plain = diagonal(a, 48, method="xdiag", rtol=1e-9)
    assert found.result.num_exact_products == found.result.num_products == 48
    assert torch.allclose(found.diagonal, plain.diagonal, rtol=1e-12)


def test_a_tolerance_below_rounding_is_the_limit() -> None:
    a = torch.diag(SPECTRUM).float()
    found = diagonal(a, 40, method="hutchinson", rtol=1e-9)
    assert found.result.outcome == "NOISE_LIMIT"
    assert found.result.rounding > 1e-9 * found.result.norm
    assert float((found.diagonal - a.diagonal()).norm()) <= found.result.rounding
    assert diagonal(a, 40, method="hutchinson", rtol=1e-3).result.outcome == "CONVERGED"


# Ends ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["auto", *METHODS])
def test_the_zero_operator_has_the_diagonal_zero(method: str) -> None:
    found = diagonal(torch.zeros(50, 50).double(), 60, method=method)
    assert not found.diagonal.any()
    assert not found.error.any()
    assert (found.result.norm, found.result.relative_standard_error) == (0, 0)
    assert found.result.outcome == "CONVERGED"


@pytest.mark.parametrize("n", [1, 2, 16])
@pytest.mark.parametrize("method", ["auto", *METHODS])
def test_of_few_parameters_each_coordinate_takes_its_turn(n: int, method: str) -> None:
    a = matrix(SPECTRUM[:n])
    found = diagonal(a, 20, method=method)
    assert torch.allclose(found.diagonal, a.diagonal(), rtol=1e-15)
    assert not found.error.any()
    result = found.result
    assert (result.method, result.num_probes, result.num_products) == ("exact", 0, n)
    assert (result.outcome, result.relative_standard_error) == ("CONVERGED", 0)


@pytest.mark.parametrize("method", ["auto", *METHODS])
def test_coordinates_take_their_turns_where_they_cost_less_than_the_tolerance(method: str) -> None:
    a = matrix(SPECTRUM)
    found = diagonal(a, 500, method=method, rtol=1e-5)
    assert (found.result.outcome, found.result.method) == ("CONVERGED", "exact")
    assert torch.allclose(found.diagonal, a.diagonal(), atol=1e-14)
    assert not found.error.any()
    assert found.result.reason.endswith("each of these took its turn")
    assert found.result.num_products <= 32 + N


def test_of_a_diagonal_of_zero_a_tolerance_in_its_units_will_do() -> None:
    a = matrix(SPECTRUM)
    a = a - torch.diag(a.diagonal())
    found = diagonal(a, 40, method="hutchinson", atol=20.0).result
    assert found.outcome == "CONVERGED"
    relative = diagonal(a, 40, method="hutchinson").result
    assert relative.outcome == "MAX_PRODUCTS"
    assert relative.relative_standard_error > 0.5


@pytest.mark.parametrize("method", ["auto", *METHODS])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_product_that_is_no_number_is_named(method: str, bad: float) -> None:
    a = matrix(SPECTRUM)
    a[3, 3] = bad
    with pytest.raises(CurvatureError) as caught:
        diagonal(a, 50, method=method)
    assert caught.value.reason == "NON_FINITE"


# Choice and memory -----------------------------------------------------------------------------


def test_the_method_follows_the_operator_and_the_result_says_why() -> None:
    flat = matrix(torch.linspace(0.5, 1.5, N).double())
    decaying = matrix((2.0 ** -torch.arange(N)).double())
    cases: list[tuple[Tensor | DenseOperator, dict[str, Any], str, str]] = [
        (decaying, {"rtol": 0.01}, "xdiag", "there is memory for a basis"),
        (decaying, {"per": "tensor"}, "hutchinson", "sums"),
        (noisy(decaying, 0.01), {}, "hutchinson", "coarser"),
        (decaying, {"num_vectors": beside(1) + 2}, "hutchinson", "memory"),
        (decaying, {"method": "hutchinson"}, "hutchinson", "asked"),
    ]
    for a, values, method, why in cases:
        found = diagonal(a, 50, **values).result
        assert found.method == method
        assert why in found.reason
    # Of a flat spectrum the sketch ends after two groups; of one with a tail it takes all products.
    probes = diagonal(flat, 48, rtol=0.01)
    assert (probes.result.num_probes, probes.result.num_products) == (32, 48)
    tail = matrix((1 / torch.arange(1, 301)).double())
    sketch, mean = (
        diagonal(tail, 120, rtol=0.01, method=method) for method in ("auto", "hutchinson")
    )
    assert sketch.result.num_probes == 60
    assert sketch.result.provenance["sketch_vectors"] == "60"
    assert probes.result.provenance["sketch_vectors"] == "16"
    assert float(sketch.error.norm()) < 0.5 * float(mean.error.norm())


def test_where_a_sketch_is_full_its_basis_is_taken_out_of_more_samples() -> None:
    a = matrix(SPECTRUM)
    found = diagonal(a, 40, method="xdiag", num_vectors=SKETCH_OF_EIGHT, rtol=1e-9)
    omega = torch.stack([signs(index) for index in range(8)], 1)
    q, _ = torch.linalg.qr(a @ omega)
    z = torch.stack([signs(index) for index in range(8, 32)], 1)
    samples = z * (a @ z - q @ (q.T @ (a @ z))) + (q * (a @ q)).sum(1, keepdim=True)
    both = torch.cat((one_left_out(a, omega), samples), 1)
    assert torch.allclose(found.diagonal, both.mean(1), atol=1e-12)
    alone = diagonal(a, 16, method="xdiag", rtol=1e-9)
    expected = ((8 * alone.error) ** 2 + 24 * samples.var(1)).sqrt() / 32
    assert torch.allclose(found.error, expected, rtol=1e-9)
    assert (found.result.num_probes, found.result.num_products) == (32, 40)


def test_more_products_never_make_an_estimate_worse() -> None:
    a = matrix((0.8 ** torch.arange(200)).double())
    errors = [
        float(diagonal(a, most, method="auto", rtol=1e-9).error.norm())
        for most in (32, 64, 128, 190)
    ]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("num_vectors", [9, 14, 17, 40, 100])
@pytest.mark.parametrize("method", METHODS)
def test_a_run_holds_no_more_vectors_than_it_may(method: str, num_vectors: int) -> None:
    if num_vectors < beside(1) + basis_vectors(2) and method == "xdiag":
        return
    for operator in (DenseOperator(matrix(SPECTRUM)), noisy(matrix(SPECTRUM), 0.01)):
        choice = configured(operator, 50, num_vectors=num_vectors, method=method).choice
        held = beside(choice.num_together) + basis_vectors(choice.num_rows)
        assert held <= num_vectors
        assert choice.num_rows >= 2 or method == "hutchinson"


# Runs ------------------------------------------------------------------------------------------

CASES: dict[str, Callable[[], tuple[DenseOperator, Diagonal]]] = {
    **{
        f"{method} in {num_vectors}": lambda method=method, num_vectors=num_vectors: (  # type: ignore[misc]
            (operator := DenseOperator(matrix(SPECTRUM))),
            configured(operator, 50, method=method, num_vectors=num_vectors, rtol=1e-9),
        )
        for method in ("auto", *METHODS)
        for num_vectors in (27, PLENTY)
    },
    "coarse": lambda: (
        (operator := noisy(matrix(SPECTRUM + 5), 0.02)),
        configured(operator, 60, rtol=0.2, per="layer"),
    ),
    "coordinates": lambda: (
        (operator := DenseOperator(matrix(SPECTRUM))),
        configured(operator, 500, rtol=1e-6),
    ),
    "low rank": lambda: (
        (operator := DenseOperator(matrix((SPECTRUM > 1) * SPECTRUM))),
        configured(operator, 50, method="xdiag"),
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_run_that_is_interrupted_at_every_step_gives_the_same_bits(
    case: Callable[[], tuple[DenseOperator, Diagonal]],
) -> None:
    operator, algorithm = case()
    reported, found, state = run(algorithm, operator, interrupted=False)
    others, again, _ = run(algorithm, operator, interrupted=True)
    assert is_same(reported, others)
    assert is_same(found.result, again.result)
    assert is_same(list(found.vectors), list(again.vectors))
    assert len(reported) > 1 or not found.vectors[1].any()
    assert algorithm.step(operator, state) is None


def test_progress_tells_the_estimate_so_far() -> None:
    reported: list[Advance] = []
    operator = DenseOperator(matrix(SPECTRUM))
    drive(configured(operator, 40, method="hutchinson", rtol=1e-9), operator, reported.append)
    assert [each.num_products for each in reported] == [8, 16, 24, 32, 40]
    assert [each.detail.num_probes for each in reported] == [8, 16, 24, 32, 40]
    errors = [each.detail.standard_error for each in reported]
    assert errors[-1] < errors[0]
    assert reported[-1].detail.table().rows[0][0] == "40"


# Rules -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "reason", "word"),
    [
        ({"method": "xtrace"}, "METHOD_UNSUPPORTED", "xdiag"),
        ({"per": "row"}, "PER_UNSUPPORTED", "tensor"),
        ({"per": "layer", "method": "xdiag"}, "PER_UNSUPPORTED", "hutchinson"),
        ({"rtol": 0.0}, "RTOL_INVALID", "0 < rtol < 1"),
        ({"rtol": 1.0}, "RTOL_INVALID", "0 < rtol < 1"),
        ({"rtol": math.nan}, "RTOL_INVALID", "finite"),
        ({"atol": -1.0}, "ATOL_INVALID", "0 or more"),
        ({"max_products": 5}, "MAX_PRODUCTS_INVALID", "at least 6"),
        ({"max_products": 3, "method": "xdiag"}, "MAX_PRODUCTS_INVALID", "at least 4"),
        ({"seed": -1}, "SEED_INVALID", ""),
    ],
)
def test_a_question_without_an_answer_is_refused_with_what_would_do(
    values: dict[str, Any], reason: str, word: str
) -> None:
    with pytest.raises(SpecError) as refusal:
        checked(OPERATION, values, Facts(num_parameters=100, kind="hessian"))
    assert refusal.value.reason == reason
    assert word in refusal.value.message


def test_no_diagonal_is_asked_of_a_jacobian_and_the_least_products_give_an_error() -> None:
    with pytest.raises(SpecError, match="symmetric"):
        checked(OPERATION, {}, Facts(num_parameters=100, kind="jacobian"))
    for method, least in (("auto", 6), ("hutchinson", 6), ("xdiag", 4)):
        found = diagonal(matrix(SPECTRUM), least, method=method)
        assert 0 < float(found.error.norm()) < math.inf
        assert found.result.num_products == least
    coarse = diagonal(noisy(matrix(SPECTRUM), 0.05), 6)
    assert (coarse.result.num_products, coarse.result.num_exact_products) == (6, 2)
