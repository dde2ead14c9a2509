"""A search for singular values that goes on from another one's triplets claims what holds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hvp_core.runs.algorithm import Found
from hvp_operations.checking import Seed
from hvp_operations.svds import OPERATION, SvdsSpec
from torch import Tensor

from tests.core.dense import DenseMap
from tests.core.extended import answer, going_on
from tests.core.test_svds import CASES, DECAY, matrix
from tests.core.written import is_same, run


def found(
    a: Tensor | DenseMap, k: int, tol: float, earlier: Found | None = None, **more: Any
) -> Found:
    operator = DenseMap(a) if isinstance(a, Tensor) else a
    seed = 3 if earlier is None else int(earlier.result.provenance["seed"]) + 1
    spec = SvdsSpec(k=k, tol=tol, seed=Seed(more.pop("seed", seed)))
    more = {"max_products": 2000, "num_vectors": 43 + k, **more}
    made = answer(going_on(OPERATION, spec, operator, earlier, **more), operator)
    assert made.result.num_products <= more["max_products"]
    return made


def check(a: Tensor, answered: Found) -> None:
    """Values, vectors and claims of an answer that has converged, by the dense matrix."""
    result = answered.result
    k, true = len(result.singular_values), torch.linalg.svdvals(a)
    values = torch.tensor(result.singular_values, dtype=torch.float64)
    bounds = torch.tensor(result.error_bounds, dtype=torch.float64)
    assert result.outcome == "CONVERGED"
    assert bool(((values - true[:k]).abs() <= bounds).all())
    assert bool((true[:k] <= values + result.completeness.margin).all())
    u, v = torch.stack(list(answered.vectors[:k])), torch.stack(list(answered.vectors[k:]))
    for rows in (u, v):
        torch.testing.assert_close(rows @ rows.T, torch.eye(k).double(), rtol=0, atol=1e-10)
    for index in range(k):
        off = float((a @ v[index] - values[index] * u[index]).norm())
        assert off == pytest.approx(result.residuals[index], rel=1e-3, abs=1e-13)


@pytest.mark.parametrize("name", CASES)
def test_more_values_and_smaller_tolerances_go_on_from_what_is_known(name: str) -> None:
    a, k = CASES[name]
    more = min(k + 3, *a.shape)
    for first, then, wanted in ((1e-4, 1e-9, k), (1e-9, 1e-6, more), (0.0, 0.0, more)):
        short = found(a, k, first)
        operator = DenseMap(a)
        longer = found(operator, wanted, then, short)
        check(a, longer)
        assert operator.count == longer.result.num_products
        fresh = found(a, wanted, then, seed=4).result
        assert longer.result.num_products <= 1.05 * fresh.num_products
        assert longer.result.adjoint_defect < 1e-10


def test_what_is_settled_takes_no_product_but_those_that_verify_it() -> None:
    a = matrix(400, 300, 1 / torch.arange(1, 301).double())
    short = found(a, 20, 1e-6, num_vectors=79)
    again = found(a, 20, 1e-6, short, num_vectors=79)
    check(a, again)
    fresh = found(a, 20, 1e-6, seed=4, num_vectors=79).result
    verified = 2 * 20
    shown = again.result.completeness.num_products
    assert (
        again.result.num_products - verified - shown
        <= 12
        < 80
        <= (fresh.num_products - verified - fresh.completeness.num_products)
    )


def test_a_value_that_the_earlier_search_has_missed_is_found() -> None:
    """The triplets are right to the last digit, and are not the first ones."""
    for name in ("tall", "wide", "repeated, all copies"):
        a, k = CASES[name]
        u, values, vt = torch.linalg.svd(a, full_matrices=False)
        for missed in (0, 1):
            kept = [index for index in range(k + 1) if index != missed]
            short = found(a, k, 1e-8)
            result = replace(
                short.result,
                singular_values=tuple(values[kept].tolist()),
                residuals=(1e-15,) * k,
                transposed_residuals=(1e-15,) * k,
            )
            wrong = Found(result=result, vectors=[*u[:, kept].T, *vt[kept]])
            check(a, found(a, k, 1e-8, wrong))


def test_a_budget_that_ran_out_is_gone_on_with() -> None:
    a, k = CASES["tall"]
    short = found(a, k, 1e-9, max_products=40)
    assert short.result.outcome == "MAX_PRODUCTS"
    longer = found(a, k, 1e-9, short)
    check(a, longer)
    fresh = found(a, k, 1e-9, seed=4).result
    assert longer.result.num_products < fresh.num_products


def test_a_state_that_is_written_goes_on_as_if_nothing_had_happened() -> None:
    a = matrix(80, 70, DECAY)
    short = found(a, 4, 1e-9)
    operator = DenseMap(a)
    spec = SvdsSpec(k=6, tol=1e-6, seed=Seed(4))
    algorithm = going_on(OPERATION, spec, operator, short, max_products=99, num_vectors=30)
    reported, one, _ = run(algorithm, operator, interrupted=False)
    others, other, _ = run(algorithm, operator, interrupted=True)
    assert is_same(reported, others)
    assert is_same(vars(one.result), vars(other.result))
    assert is_same(list(one.vectors), list(other.vectors))


def test_fewer_values_are_no_extension() -> None:
    assert OPERATION.extension is not None
    a, k = CASES["tall"]
    known = found(a, k, 1e-4).result
    assert "the job has 4 already; ask for 4 or more" in OPERATION.extension.refusal(
        SvdsSpec(k=3), known
    )
    assert OPERATION.extension.new_seed


@pytest.mark.parametrize(
    "seed", [*range(5), *[pytest.param(s, marks=pytest.mark.slow) for s in range(5, 60)]]
)
def test_no_claim_is_wrong_that_rests_on_triplets_which_are_only_nearly_right(seed: int) -> None:
    """Some of the wanted are missing among them, and all are as far off as counts as settled."""
    generator = torch.Generator().manual_seed(seed)

    def below(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    m, n, k = below(25, 70), below(25, 70), below(1, 8)
    values = torch.rand(min(m, n), generator=generator, dtype=torch.float64)
    values[: min(m, n) // 3] = values[: min(m, n) // 3].round(decimals=1)  # some are repeated
    a, tol = matrix(m, n, values, seed), 10.0 ** -below(2, 9)
    u, sigma, vt = torch.linalg.svd(a, full_matrices=False)
    kept = torch.randperm(k + 2, generator=generator)[:k].sort().values
    off = 0.3 * tol * float(sigma[0]) / 4 / k**0.5
    near = [
        torch.linalg.qr(
            x + off * torch.randn(*x.shape, generator=generator).double() / len(x) ** 0.5
        )
        for x in (u[:, kept], vt[kept].T)
    ]
    left, right = (q * r.diagonal().sign() for q, r in near)  # as the vectors were
    known = (left * (a @ right)).sum(0)
    order = known.argsort(descending=True)
    left, right, known = left[:, order], right[:, order], known[order]
    residuals = [(a @ right - left * known).norm(dim=0), (a.T @ left - right * known).norm(dim=0)]
    result = replace(
        found(a, k, tol).result,
        singular_values=tuple(known.tolist()),
        residuals=tuple(residuals[0].tolist()),
        transposed_residuals=tuple(residuals[1].tolist()),
    )
    wrong = Found(result=result, vectors=[*left.T, *right.T])
    longer = found(a, min(k + below(0, 4), m, n), tol, wrong).result
    count = len(longer.singular_values)
    got, bounds = (
        torch.tensor(each, dtype=torch.float64)
        for each in (longer.singular_values, longer.error_bounds)
    )
    assert longer.outcome == "CONVERGED"
    assert bool((sigma[:count] <= got + longer.completeness.margin).all())
    assert bool(((got[:, None] - sigma).abs().amin(1) <= bounds).all())
