"""Singular values of operators of prescribed spectrum, found, verified and complete."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hvp_core.errors import CurvatureError
from hvp_core.krylov.svds import Svds
from hvp_core.linop.compositions import Transposed
from hvp_core.runs.algorithm import Advance, drive
from hvp_operations.checking import Seed
from hvp_operations.svds import SvdsResult, SvdsSpec
from torch import Tensor

from tests.core.dense import DenseMap, DenseOperator
from tests.core.written import is_same
from tests.core.written import run as run_written


def matrix(m: int, n: int, values: Tensor | list[float], seed: int = 0) -> Tensor:
    """A float64 matrix (m, n) with these singular values, zeros behind, and random vectors."""
    generator = torch.Generator().manual_seed(seed)
    r = len(values)
    u, v = (
        torch.linalg.qr(torch.randn(size, r, generator=generator, dtype=torch.float64))[0]
        for size in (m, n)
    )
    return u @ torch.diag(torch.as_tensor(values, dtype=torch.float64)) @ v.T


def gaussian(m: int, n: int) -> Tensor:
    generator = torch.Generator().manual_seed(m * n)
    return torch.randn(m, n, generator=generator, dtype=torch.float64)


@dataclass(frozen=True)
class Run:
    """A finished run, what it found as tensors, and what it reported."""

    result: SvdsResult
    values: Tensor
    u: Tensor
    v: Tensor
    reported: list[Advance]


def svds(
    a: Tensor | DenseMap,
    k: int,
    *,
    tol: float = 0.0,
    max_products: int = 2000,
    num_vectors: int = 40,
    seed: int = 3,
) -> Run:
    operator = DenseMap(a) if isinstance(a, Tensor) else a
    least = min(operator.domain.dimension, operator.codomain.dimension)
    algorithm = Svds(
        spec=SvdsSpec(k=k, tol=tol, seed=Seed(seed)),
        max_products=max_products,
        num_vectors=min(num_vectors, least),
    )
    reported: list[Advance] = []
    found = drive(algorithm, operator, reported.append)
    count = len(found.result.singular_values)
    assert len(found.vectors) == 2 * count
    values = torch.tensor(found.result.singular_values, dtype=torch.float64)
    u, v = torch.stack(list(found.vectors[:count])), torch.stack(list(found.vectors[count:]))
    return Run(found.result, values, u, v, reported)


DECAY = 2.0 ** -torch.arange(60, dtype=torch.float64)
REPEATED = [3.0, 3.0, 3.0, 2.0, 2.0, *torch.linspace(1, 0.1, 55).tolist()]
CASES: dict[str, tuple[Tensor, int]] = {
    "tall": (gaussian(90, 60), 4),
    "wide": (gaussian(60, 90), 4),
    "square": (gaussian(50, 50), 4),
    "decay": (matrix(80, 70, DECAY), 8),
    "repeated, all copies": (matrix(60, 75, REPEATED), 5),
    "repeated, some copies": (matrix(75, 60, REPEATED), 2),
    "clustered": (matrix(70, 60, [1, 1 - 1e-9, 1 - 2e-9, *torch.linspace(0.7, 0, 57).tolist()]), 3),
    "of rank 3, within": (matrix(80, 60, [3.0, 2.0, 1.0]), 2),
    "of rank 3, all": (matrix(60, 80, [3.0, 2.0, 1.0]), 3),
    "of rank 3, beyond": (matrix(80, 60, [3.0, 2.0, 1.0]), 6),
    "zero": (torch.zeros(60, 80, dtype=torch.float64), 3),
    "all of them": (gaussian(7, 5), 5),
    "one row": (gaussian(1, 9), 1),
    "one column": (gaussian(9, 1), 1),
    "multiple of an isometry": (matrix(60, 50, [2.0] * 50), 3),
}


@pytest.mark.parametrize("name", CASES)
def test_the_values_are_those_of_the_dense_matrix_and_none_is_missed(name: str) -> None:
    a, k = CASES[name]
    operator = DenseMap(a)
    found = svds(operator, k)
    true, scale = torch.linalg.svdvals(a)[:k], float(torch.linalg.norm(a, 2))
    assert found.result.outcome == "CONVERGED"
    assert found.result.num_products == operator.count
    torch.testing.assert_close(found.values, true, rtol=0, atol=1e-13 * scale)
    assert found.result.completeness.shown
    assert found.result.completeness.margin <= 1e-9 * scale
    for rows in (found.u, found.v):
        torch.testing.assert_close(
            rows @ rows.T, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-12
        )
    limit = 1e-12 * scale
    assert float((a @ found.v.T - found.u.T * found.values).norm(dim=0).max()) <= limit
    assert float((a.T @ found.u.T - found.v.T * found.values).norm(dim=0).max()) <= limit
    assert found.result.adjoint_defect < 1e-11


def test_a_small_value_is_known_to_rounding_of_the_largest_and_not_to_its_root() -> None:
    """The singular values of JᵀJ, squared, would be lost below 1e-8 of the largest."""
    a = matrix(40, 30, [1.0, 1e-3, 1e-6, 1e-9, 1e-12])
    found = svds(a, 4)
    torch.testing.assert_close(
        found.values, torch.tensor([1.0, 1e-3, 1e-6, 1e-9], dtype=torch.float64), rtol=0, atol=1e-15
    )


def test_a_run_without_the_search_for_copies_would_have_missed_some() -> None:
    found = svds(matrix(60, 75, REPEATED), 5, tol=1e-3)
    stages = [advance.stage for advance in found.reported]
    first = stages.index("completeness")
    before = found.reported[first - 1].detail.singular_values
    assert max(abs(a - b) for a, b in zip(before, found.values.tolist(), strict=True)) > 0.5
    assert found.result.completeness.num_products > 0


def bound_holds(a: Tensor, found: Run) -> None:
    """What is claimed of a run's result is so."""
    true = torch.linalg.svdvals(a.double())
    for value, bound in zip(found.values, found.result.error_bounds, strict=True):
        assert float((true - value).abs().min()) <= bound
    if found.result.completeness.shown:
        beyond = true[: len(found.values)] - found.values
        assert float(beyond.max()) <= found.result.completeness.margin


@pytest.mark.parametrize(
    "seed", [*range(6), *[pytest.param(s, marks=pytest.mark.slow) for s in range(6, 50)]]
)
def test_no_claim_about_a_random_spectrum_is_wrong(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    m, n = draw(30, 90), draw(30, 90)
    distinct = torch.rand(draw(1, 8), generator=generator, dtype=torch.float64) * 4
    values = distinct.repeat_interleave(draw(1, 13))[: min(m, n)]
    if draw(0, 2):
        rest = torch.rand(min(m, n) - len(values), generator=generator, dtype=torch.float64)
        values = torch.cat((values, rest))
    dtype = (torch.float64, torch.float32)[draw(0, 2)]
    a = matrix(m, n, values, seed).to(dtype)
    k = draw(1, 9)
    tol = (0.0, 1e-2)[draw(0, 2)]
    found = svds(a, k, tol=tol, num_vectors=draw(k + 2, 40), seed=seed)
    bound_holds(a, found)
    if found.result.outcome == "CONVERGED":
        true = torch.linalg.svdvals(a.double())[:k]
        allowed = found.result.completeness.margin + max(found.result.error_bounds)
        assert float((true - found.values).abs().max()) <= allowed


@pytest.mark.parametrize("seed", [4, 58])
def test_what_an_earlier_round_has_leaked_does_not_keep_the_next_one_from_beginning(
    seed: int,
) -> None:
    """With repeated values near the wanted ones, where the first round shows nothing."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(46, generator=generator, dtype=torch.float64)
    values[:15] = values[:15].round(decimals=1)
    found = svds(matrix(61, 46, values, seed), 5, tol=1e-6)
    assert found.result.outcome == "CONVERGED"
    assert found.result.num_products <= 200
    true = values.sort(descending=True).values[:5]
    assert bool((true <= found.values + found.result.completeness.margin).all())


def test_a_budget_that_runs_out_is_told_and_what_is_claimed_holds() -> None:
    a = gaussian(90, 70)
    found = svds(a, 3, max_products=20)
    assert found.result.outcome == "MAX_PRODUCTS"
    assert found.result.num_products <= 20
    assert not found.result.completeness.shown
    bound_holds(a, found)


def test_where_there_is_no_room_to_show_completeness_it_is_not_claimed() -> None:
    a = matrix(60, 50, [1.0, 1 - 1e-4, *torch.linspace(1 - 2e-4, 0.9, 48).tolist()])
    found = svds(a, 1, max_products=300, num_vectors=4)
    assert found.result.outcome in ("MULTIPLICITY_UNCERTAIN", "MAX_PRODUCTS")
    assert math.isinf(found.result.completeness.margin)
    bound_holds(a, found)


def test_bounds_of_coarse_products_are_those_of_the_exact_operator() -> None:
    exact = matrix(70, 50, DECAY[:40])
    coarse = exact.to(torch.bfloat16).double()
    found = svds(DenseMap(coarse, noise=2**-8, exact=exact), 3)
    assert found.result.outcome == "NOISE_LIMIT"
    bound_holds(exact, found)
    nothing = svds(DenseMap(coarse, noise=2**-8, exact=None), 3)
    assert nothing.result.outcome == "UNVERIFIED"
    assert not nothing.result.error_bounds
    assert not nothing.result.completeness.shown


def test_products_that_are_not_finite_end_the_run() -> None:
    a = gaussian(20, 10)
    a[3, 4] = math.nan
    with pytest.raises(CurvatureError, match="NON_FINITE"):
        svds(a, 2)


def test_a_state_that_is_written_goes_on_as_if_nothing_had_happened() -> None:
    a = matrix(60, 75, REPEATED)
    algorithm = Svds(spec=SvdsSpec(k=4), max_products=400, num_vectors=12)
    reported, found, last = run_written(algorithm, DenseMap(a), interrupted=False)
    others, again, final = run_written(algorithm, DenseMap(a), interrupted=True)
    assert is_same(reported, others)
    assert is_same(found.result, again.result)
    assert is_same(list(found.vectors), list(again.vectors))
    assert is_same(last.basis.B, final.basis.B)
    assert last.num_restarts > 0


def test_a_transpose_has_the_transposed_products_and_an_operator_without_them_says_so() -> None:
    a = gaussian(4, 3)
    operator, v, u = DenseMap(a), torch.ones(3).double(), torch.ones(4).double()
    transposed: Any = Transposed(operator)
    assert torch.equal(transposed.apply([u])[0], a.T @ u)
    assert torch.equal(transposed.apply_transposed([v])[0], a @ v)
    assert (transposed.domain.dimension, transposed.codomain.dimension) == (4, 3)
    square = DenseOperator(gaussian(3, 3))
    assert torch.equal(square.apply_transposed([v])[0], square.apply([v])[0])
    square.symmetric = False
    with pytest.raises(TypeError, match="transpose"):
        square.apply_transposed([v])


def test_a_tolerance_that_any_vector_meets_is_refused() -> None:
    with pytest.raises(ValueError, match="tol"):
        Svds(spec=SvdsSpec(tol=1.0), max_products=20, num_vectors=4)
