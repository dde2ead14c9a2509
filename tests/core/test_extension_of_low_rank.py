"""A low-rank matrix that is extended: Nyström's method on the rest, eigenpairs from known ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hvp_core.runs.algorithm import Found, derived_seed
from hvp_operations.checking import Seed
from hvp_operations.low_rank import OPERATION, LowRankSpec
from hvp_operations.operation import Facts
from torch import Tensor

from tests.core.dense import DenseOperator, DenseSpace
from tests.core.extended import answer, going_on
from tests.core.spectra import matrix
from tests.core.test_low_rank import DECAYING, DTYPES, ROUNDING, N, norm
from tests.core.written import is_same, run


class Made:
    """An answer, and its matrix A_k."""

    def __init__(self, found: Found):
        self.found, self.result = found, found.result
        u = torch.stack(list(found.vectors)).double()
        self.values = torch.tensor(self.result.eigenvalues, dtype=torch.float64)
        self.matrix = u.T @ torch.diag(self.values) @ u


def algorithm(
    operator: DenseOperator, k: int, method: Any, seed: int, earlier: Made | None, **values: Any
) -> Any:
    spec = LowRankSpec(k, method, seed=Seed(seed), **values)
    kind = "ggn" if operator.semidefinite else "hessian"
    cost = OPERATION.cost(spec, Facts(num_parameters=operator.domain.dimension, kind=kind))
    return going_on(
        OPERATION,
        spec,
        operator,
        None if earlier is None else earlier.found,
        max_products=cost.max_products,
        num_vectors=cost.wished_vectors,
    )


def made(
    a: Tensor,
    k: int,
    earlier: Made | None = None,
    *,
    seed: int = 1,
    method: Any = "auto",
    semidefinite: bool = True,
    **values: Any,
) -> Made:
    operator = DenseOperator(a, semidefinite=semidefinite)
    seed += 0 if earlier is None else 1
    found = Made(answer(algorithm(operator, k, method, seed, earlier, **values), operator))
    assert operator.count == found.result.num_products
    error = norm(a.double() - found.matrix)
    assert found.result.error <= error <= found.result.error_bound
    assert len(found.result.eigenvalues) == k
    assert found.result.orthogonality < 1e4 * torch.finfo(a.dtype).eps
    return found


def sketch(count: int, seed: int) -> Tensor:
    """The random vectors of a run, as columns."""
    space = DenseSpace(N)
    return torch.stack([space.random(derived_seed(seed, i), "sphere") for i in range(count)], 1)


def test_without_a_truncation_it_is_the_approximation_of_both_sketches() -> None:
    a = matrix(torch.linspace(0.1, 2, N).double())
    short = made(a, 9, oversampling=0)
    longer = made(a, 23, short, oversampling=0)
    assert longer.result.num_products - longer.result.num_check_products == 14
    omega = torch.cat((sketch(9, 1), sketch(14, 2)), 1)
    y = a @ omega
    expected = y @ torch.linalg.solve(omega.T @ y, y.T)
    torch.testing.assert_close(longer.matrix, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_lies_between_what_was_known_and_the_operator(dtype: torch.dtype) -> None:
    a = matrix(DECAYING).to(dtype)
    allowed = ROUNDING[dtype] * norm(a)
    short = made(a, 8)
    for k, oversampling in ((8, 10), (12, 3), (30, 0)):
        longer = made(a, k, short, oversampling=oversampling)
        new = longer.result.num_products - longer.result.num_check_products
        assert new == k - 8 + oversampling
        assert float(torch.linalg.eigvalsh(a.double() - longer.matrix).min()) >= -allowed
        true = torch.linalg.eigvalsh(a.double())[-k:]
        assert bool((longer.values <= true + allowed).all())
        assert norm(a.double() - longer.matrix) <= norm(a.double() - short.matrix) + allowed
    again = made(a, 30, longer, seed=2)
    assert norm(a.double() - again.matrix) <= norm(a.double() - longer.matrix) + allowed


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_exact_where_the_rank_is_at_most_k(dtype: torch.dtype) -> None:
    spectrum = torch.cat((torch.zeros(N - 12), torch.linspace(1, 3, 12))).double()
    a = matrix(spectrum).to(dtype)
    for first, then in ((5, 12), (12, 20), (5, N), (N, N)):
        longer = made(a, then, made(a, first, oversampling=2))
        fresh = made(a, then, seed=7)
        left, allowed = (norm(a.double() - each.matrix) for each in (longer, fresh))
        assert left <= allowed + fresh.result.shift  # no more than rounding leaves of any run
        assert fresh.result.shift <= ROUNDING[dtype]


def test_fewer_products_than_a_run_of_its_own_leave_about_as_much_or_less_of_the_operator() -> None:
    for spectrum, most in ((1 / torch.arange(1, N + 1).double(), 1.0), (DECAYING, 1.1)):
        a, errors = matrix(spectrum), torch.zeros(2).double()
        for seed in range(3):
            short = made(a, 10, seed=10 * seed)
            longer = made(a, 20, short, seed=10 * seed)
            fresh = made(a, 20, seed=10 * seed + 5)
            for index, each in enumerate((longer, fresh)):
                errors[index] += (a - each.matrix).trace()  # which is no eigenvalue's alone
        assert longer.result.num_products == fresh.result.num_products - 10
        assert errors[0] <= most * errors[1]


def test_eigenpairs_are_searched_from_known_ones() -> None:
    spectrum = torch.cat((torch.tensor([-9.0, -7, 8, 6, 5, -4]), torch.linspace(-1, 1, N - 6)))
    a = matrix(spectrum.double())
    short = made(a, 3, semidefinite=False, tol=1e-8)
    longer = made(a, 6, short, semidefinite=False, tol=1e-8)
    assert (longer.result.method, longer.result.outcome) == ("eigsh", "CONVERGED")
    assert longer.result.reason.endswith("it goes on from 3 vectors")
    expected = torch.tensor([-9.0, -7, -4, 5, 6, 8], dtype=torch.float64)
    torch.testing.assert_close(longer.values, expected, rtol=0, atol=1e-9)
    again = made(a, 6, longer, semidefinite=False, tol=1e-6, seed=2)
    fresh = made(a, 6, semidefinite=False, tol=1e-6, seed=4)
    assert again.result.num_products <= fresh.result.num_products - 6


@pytest.mark.parametrize("method", ["nystrom", "eigsh"])
def test_an_extension_goes_through_its_snapshots_like_any_run(method: Any) -> None:
    a = matrix(DECAYING)
    operator = DenseOperator(a, semidefinite=True)
    short = made(a, 4, method=method)
    going = algorithm(operator, 9, method, 2, short)
    reported, one, _ = run(going, operator, interrupted=False)
    others, other, _ = run(going, operator, interrupted=True)
    assert is_same(reported, others)
    assert is_same(vars(one.result), vars(other.result))
    assert is_same(list(one.vectors), list(other.vectors))


def test_what_adds_nothing_is_no_extension() -> None:
    assert OPERATION.extension is not None
    refusal = OPERATION.extension.refusal
    known = made(matrix(DECAYING), 8).result
    assert "the job has 8 already; ask for 8 or more" in refusal(LowRankSpec(7), known)
    assert "no random vector would be added" in refusal(LowRankSpec(8, oversampling=0), known)
    assert not refusal(LowRankSpec(8, oversampling=1), known)
    coarse = DenseOperator(matrix(DECAYING), semidefinite=True, noise=1e-2, exact=None)
    blind = answer(algorithm(coarse, 8, "auto", 1, None), coarse).result
    assert blind.outcome == "UNVERIFIED"
    assert "ask anew" in refusal(LowRankSpec(9), blind)
