"""Low-rank approximations: the theorems on Nyström's, bounds on the error, and the state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hvp_core.errors import CurvatureError
from hvp_core.linop.linear_operator import LinearOperator
from hvp_core.runs.algorithm import Advance, Budget, drive
from hvp_core.stochastic.low_rank import LowRank
from hvp_core.stochastic.nystrom import orthonormalise
from hvp_operations.checking import Seed
from hvp_operations.low_rank import OPERATION, LowRankResult, LowRankSpec
from hvp_operations.operation import Facts
from torch import Tensor

from tests.core.dense import DenseOperator, DenseSpace
from tests.core.spectra import matrix
from tests.core.written import is_same, run

N = 80
DECAYING = torch.logspace(-6, 1, N, dtype=torch.float64)
DTYPES = [torch.float64, torch.float32]
#: What rounding leaves, relative to the norm.
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5}


def configured(operator: LinearOperator, spec: LowRankSpec) -> LowRank:
    kind = "ggn" if operator.semidefinite else "hessian"
    cost = OPERATION.cost(spec, Facts(num_parameters=operator.domain.dimension, kind=kind))
    budget = Budget(max_products=cost.max_products, num_vectors=cost.wished_vectors)
    return LowRank.configure(spec, operator, budget)


def approximate(
    a: Tensor, k: int, *, semidefinite: bool = True, **values: Any
) -> tuple[LowRankResult, Tensor, Tensor]:
    """The result, A_k and U of a matrix; products are counted from outside."""
    operator = DenseOperator(a, semidefinite=semidefinite)
    found = drive(configured(operator, LowRankSpec(k, **values)), operator)
    result, u = found.result, torch.stack(list(found.vectors)).double()
    assert result.num_products == operator.count
    values_of = torch.tensor(result.eigenvalues, dtype=torch.float64)
    assert (values_of.diff() >= 0).all()
    return result, u.T @ torch.diag(values_of) @ u, u


def norm(a: Tensor) -> float:
    return float(torch.linalg.matrix_norm(a.double(), 2))


# Nyström ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [5, 12, N])
def test_nystrom_is_exact_where_the_rank_is_at_most_k(dtype: torch.dtype, k: int) -> None:
    spectrum = torch.zeros(N, dtype=torch.float64)
    spectrum[-5:] = torch.tensor([0.01, 0.5, 2, 2, 7])
    a = matrix(spectrum)
    result, found, u = approximate(a.to(dtype), k)
    assert result.method == "nystrom"
    assert norm(found - a) <= ROUNDING[dtype] * 7
    assert result.error <= result.error_bound <= 20 * ROUNDING[dtype] * 7
    assert norm(u @ u.T - torch.eye(k)) <= ROUNDING[dtype]
    assert result.orthogonality == pytest.approx(norm(u @ u.T - torch.eye(k)), rel=0.2, abs=1e-13)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 8, 30])
@pytest.mark.parametrize("oversampling", [0, 10])
def test_nystrom_is_at_most_the_operator_and_so_are_its_eigenvalues(
    dtype: torch.dtype, k: int, oversampling: int
) -> None:
    a = matrix(DECAYING)
    for seed in range(3):
        result, found, u = approximate(a.to(dtype), k, oversampling=oversampling, seed=Seed(seed))
        allowed = ROUNDING[dtype] * norm(a) + result.shift
        assert torch.linalg.eigvalsh(a - found)[0] >= -allowed
        values = torch.tensor(result.eigenvalues, dtype=torch.float64)
        assert (values >= 0).all()
        assert (values <= DECAYING[-k:] + allowed).all()
        assert norm(u @ u.T - torch.eye(k)) <= ROUNDING[dtype]
        assert result.num_products == k + oversampling + 10


@pytest.mark.parametrize("oversampling", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_the_mean_error_of_nystrom_is_below_its_theorems(oversampling: int) -> None:
    """Frangella, Tropp and Udell 2023, proposition 2.2."""
    a, k = matrix(DECAYING), 12
    errors = [
        norm(a - approximate(a, k + oversampling, oversampling=0, seed=Seed(seed))[1])
        for seed in range(8)
    ]
    tail = DECAYING.flip(0)[k:]
    p = oversampling
    bound = (1 + 2 * k / (p - 1)) * tail[0] + 2 * torch.e**2 * (k + p) / (p * p - 1) * tail.sum()
    assert sum(errors) / len(errors) <= float(bound)


def test_an_operator_of_zero_has_eigenvalues_of_zero() -> None:
    for dtype in DTYPES:
        result, found, u = approximate(torch.zeros(N, N, dtype=dtype), 7)
        assert result.eigenvalues == (0.0,) * 7
        assert not found.any()
        assert norm(u @ u.T - torch.eye(7)) <= ROUNDING[dtype]
        assert result.error_bound == 0


def test_all_of_a_matrix_can_be_asked_for() -> None:
    for n in (1, 2, 9):
        spectrum = torch.linspace(1, 2, n, dtype=torch.float64)
        a = matrix(spectrum)
        for method, semidefinite in (("nystrom", True), ("eigsh", False)):
            result, found, _ = approximate(a, n, method=method, semidefinite=semidefinite)
            assert norm(found - a) <= 1e-12
            assert result.error_bound <= 1e-11
            assert result.failure_probability == 0  # the check has seen all of the space


# Eigenpairs -------------------------------------------------------------------------------------


def test_of_an_indefinite_matrix_the_largest_magnitudes_are_taken_and_it_is_the_best() -> None:
    spectrum = torch.cat((torch.tensor([-9, -4, 3, 6, 20]), torch.linspace(-0.5, 0.5, N - 5)))
    a = matrix(spectrum.double())
    result, found, _ = approximate(a, 5, semidefinite=False)
    assert (result.method, result.outcome) == ("eigsh", "CONVERGED")
    assert result.eigenvalues == pytest.approx([-9, -4, 3, 6, 20], abs=1e-4)
    assert norm(a - found) == pytest.approx(0.5, abs=1e-3)
    assert "may be negative" in result.reason
    short, found, _ = approximate(a, 5, semidefinite=False, max_products=20, tol=0.0, seed=Seed(2))
    assert short.outcome == "MAX_PRODUCTS"
    assert short.num_products <= 20
    assert norm(a - found) <= short.error_bound


def test_nystrom_of_what_may_be_indefinite_is_refused() -> None:
    operator = DenseOperator(matrix(DECAYING))
    budget = Budget(max_products=40, num_vectors=99)
    with pytest.raises(CurvatureError, match=r"METHOD_UNSUPPORTED.*eigsh"):
        LowRank.configure(LowRankSpec(5, "nystrom"), operator, budget)


# The error --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("power", [0.0, 2.0])
def test_the_error_lies_between_its_bounds_and_these_are_not_far_apart(
    dtype: torch.dtype, power: float
) -> None:
    spectrum = torch.arange(1, N + 1, dtype=torch.float64).flip(0) ** -power
    a = matrix(spectrum)
    for seed in range(4):
        result, found, _ = approximate(a.to(dtype), 10, seed=Seed(seed), oversampling=5)
        true = norm(a - found)
        assert result.error * (1 - 1e-9) <= true <= result.error_bound
        assert result.error_bound <= 4 * true + 1e-4 * norm(a)
        assert result.failure_probability == 1e-3


def test_coarse_products_are_not_used_where_exact_ones_can_be_had() -> None:
    a, k = matrix(DECAYING), 15
    rounded = a.bfloat16().double()

    def coarse(v: Tensor) -> Tensor:
        return (rounded @ v.bfloat16().double()).float()

    space = DenseSpace(N, torch.float32)
    exact = DenseOperator(
        coarse,
        space,
        semidefinite=True,
        noise=2**-8,
        exact=lambda v: (a @ v.double()).float(),
    )
    found = drive(configured(exact, LowRankSpec(k)), exact)
    wide, expected, _ = approximate(a.float(), k)
    u = torch.stack(list(found.vectors)).double()
    approximation = u.T @ torch.diag(torch.tensor(found.result.eigenvalues).double()) @ u
    assert norm(approximation - expected) <= 1e-4
    assert found.result.num_exact_products == found.result.num_products == wide.num_products
    assert exact.count == 0
    assert found.result.is_exact

    alone = DenseOperator(coarse, space, semidefinite=True, noise=2**-8, exact=None)
    found = drive(configured(alone, LowRankSpec(k)), alone)
    u = torch.stack(list(found.vectors)).double()
    approximation = u.T @ torch.diag(torch.tensor(found.result.eigenvalues).double()) @ u
    assert (found.result.outcome, found.result.is_exact) == ("UNVERIFIED", False)
    assert norm(approximation - a) <= 2 * 2**-4 * norm(a)  # the root of the noise, twice
    assert norm(u @ u.T - torch.eye(k)) <= 1e-5


# Parts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_vectors_are_made_orthonormal_though_they_are_nearly_dependent(dtype: torch.dtype) -> None:
    rows = torch.randn(6, N, dtype=dtype, generator=torch.Generator().manual_seed(0))
    rows[3] = rows[0] + torch.finfo(dtype).eps * rows[3]
    rows[5] = rows[1] + rows[2]
    given = rows.clone().double()
    r = orthonormalise(DenseSpace(N, dtype), rows)
    q = rows.double()
    assert norm(q @ q.T - torch.eye(6)) <= ROUNDING[dtype]
    assert norm(r.T @ q - given) <= ROUNDING[dtype] * norm(given)
    assert torch.equal(r, r.triu())
    with pytest.raises(CurvatureError, match="NON_FINITE"):
        orthonormalise(DenseSpace(3), torch.zeros(2, 3, dtype=torch.float64))


def test_what_is_not_finite_is_said() -> None:
    a = matrix(DECAYING)
    a[3, 3] = torch.inf
    with pytest.raises(CurvatureError, match="NON_FINITE"):
        approximate(a, 5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", ["nystrom", "eigsh"])
def test_a_run_that_goes_through_bytes_after_every_step_is_the_same_bit_for_bit(
    dtype: torch.dtype, method: Any
) -> None:
    operator = DenseOperator(matrix(DECAYING).to(dtype), semidefinite=True)
    algorithm = configured(operator, LowRankSpec(4, method, oversampling=9, seed=Seed(3)))
    reported, found, _ = run(algorithm, operator, interrupted=False)
    others, again, _ = run(algorithm, operator, interrupted=True)
    stages = {advance.stage for advance in reported}
    assert stages == {"sampling" if method == "nystrom" else "searching", "checking"}
    assert is_same(reported, others)
    assert is_same(found.result, again.result)
    assert is_same(list(found.vectors), list(again.vectors))


def test_progress_tells_the_vectors_and_then_the_error() -> None:
    told: list[Advance] = []
    operator = DenseOperator(matrix(DECAYING), semidefinite=True)
    found = drive(configured(operator, LowRankSpec(12)), operator, told.append)
    assert [each.num_products for each in told] == [8, 16, 22, *range(23, 33)]
    assert [each.detail.num_vectors for each in told][-1] == 22
    assert told[-1].detail.error == pytest.approx(found.result.error, rel=1e-6)
    assert told[0].detail.table().rows
