"""Preconditioned systems: theorems, SciPy with the same M, and what is refused."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from hvp_core.errors import CurvatureError
from hvp_core.krylov.cg import ConjugateGradients
from hvp_core.krylov.preconditioner import LowRankPreconditioner
from hvp_core.linop.linear_operator import LinearOperator
from hvp_core.runs.algorithm import drive
from hvp_operations.checking import checked
from hvp_operations.operation import Facts, SpecError
from hvp_operations.solve import OPERATION, SolveSpec, System
from scipy.sparse import linalg
from torch import Tensor

from tests.core.dense import DenseOperator, DenseSpace
from tests.core.spectra import matrix, random
from tests.core.test_low_rank import approximate
from tests.core.test_solve import coarse, configured, residual
from tests.core.written import is_same, run

N = 80
DECAYING = torch.logspace(-6, 1, N, dtype=torch.float64)
DTYPES = [torch.float64, torch.float32]
METHODS = ["cg", "minres"]


def pairs(a: Tensor, k: int) -> tuple[list[Tensor], tuple[float, ...]]:
    """The k leading eigenvectors and eigenvalues."""
    values, vectors = torch.linalg.eigh(a.double())
    return list(vectors[:, -k:].T.contiguous().to(a)), tuple(values[-k:].tolist())


def solve(
    operator: Tensor | LinearOperator,
    b: Tensor,
    vectors: Iterable[Tensor] = (),
    values: tuple[float, ...] = (),
    **asked: Any,
) -> tuple[System, Tensor]:
    operator = (
        DenseOperator(operator, semidefinite=True) if isinstance(operator, Tensor) else operator
    )
    rows = list(vectors)
    algorithm = configured(
        operator, [b], preconditioner=rows, preconditioner_values=values, **asked
    )
    found = drive(algorithm, operator)
    told = {"": None, True: "diagonal", False: f"low rank, {len(rows)} vectors"}
    kind: Any = "" if not rows else not values
    assert found.result.provenance.get("preconditioner") == told[kind]
    return found.result.systems[0], found.vectors[0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_a_preconditioner_that_is_the_matrix_takes_one_step(method: str, damping: float) -> None:
    spectrum = torch.logspace(-2, 1, N, dtype=torch.float64)
    a, b = matrix(spectrum), random(N)
    vectors, values = pairs(a, N)
    system, x = solve(a, b, vectors, values, method=method, damping=damping)
    assert (system.outcome, system.num_products) == ("CONVERGED", 2)  # a step and its residual
    assert residual(a, x, b, damping) <= 1e-6
    d = torch.logspace(-2, 1, N, dtype=torch.float64)
    system, x = solve(torch.diag(d), b, [d], method=method, damping=damping)
    assert (system.outcome, system.num_products) == ("CONVERGED", 2)


@pytest.mark.parametrize("method", METHODS)
def test_two_steps_do_where_the_rank_is_that_of_the_preconditioner(method: str) -> None:
    """Then P⁻¹(A + λI) has two eigenvalues: λ_k + λ on U, and λ elsewhere."""
    spectrum = torch.zeros(N, dtype=torch.float64)
    spectrum[-9:] = torch.logspace(-1, 1, 9, dtype=torch.float64)
    a, b = matrix(spectrum), random(N)
    system, x = solve(a, b, *pairs(a, 9), method=method, damping=0.03, tol=1e-8)
    assert (system.outcome, system.num_products) == ("CONVERGED", 3)
    assert residual(a, x, b, 0.03) <= 1e-8


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_condition_is_that_of_the_theorem_and_products_are_saved(dtype: torch.dtype) -> None:
    """Frangella, Tropp and Udell 2023, proposition 5.3: κ ≤ (λ_k + λ + ‖A − A_k‖) / λ."""
    a, b, damping = matrix(DECAYING), random(N), 1e-3
    result, approximation, u = approximate(a.to(dtype), 40, oversampling=10)
    P = LowRankPreconditioner(DenseSpace(N, dtype), [*u.to(dtype)], result.eigenvalues, damping)
    P.prepare()
    inverse = torch.stack([P(each) for each in torch.eye(N, dtype=dtype)]).double()
    assert torch.linalg.matrix_norm(inverse - inverse.T) <= 1e-5
    forms = torch.linalg.eigvals(inverse @ (a + damping * torch.eye(N, dtype=torch.float64))).real
    error = float(torch.linalg.matrix_norm(a - approximation, 2))
    bound = (result.eigenvalues[0] + damping + error) / damping
    assert float(forms.min()) > 0
    assert float(forms.max() / forms.min()) <= bound * (1 + 1e-3)
    asked: dict[str, Any] = {"damping": damping, "tol": 1e-2, "max_products": 900}
    plain, _ = solve(a.to(dtype), b.to(dtype), **asked)
    helped, x = solve(a.to(dtype), b.to(dtype), [*u.to(dtype)], result.eigenvalues, **asked)
    assert helped.outcome == plain.outcome == "CONVERGED"
    assert residual(a, x, b, damping) <= 1.01e-2
    assert 4 * helped.num_products <= plain.num_products


@pytest.mark.parametrize("tol", [1e-2, 1e-5])
def test_cg_takes_as_many_steps_as_scipys_with_the_same_preconditioner(tol: float) -> None:
    a, b, damping = matrix(torch.logspace(-1, 1, N).double()), random(N), 1e-2
    u, values = pairs(a, 12)
    damped = torch.tensor(values, dtype=torch.float64) + damping
    scaled = damped[0] / damped - 1
    low_rank = torch.eye(N, dtype=torch.float64) + sum(
        float(each) * torch.outer(v, v) for each, v in zip(scaled, u, strict=True)
    )
    d = a.diagonal().clone()
    for vectors, numbers, inverse in (
        (u, values, low_rank),
        ([d], (), torch.diag(1 / (d + damping))),
    ):
        steps: list[Any] = []
        expected, info = linalg.cg(
            (a + damping * torch.eye(N, dtype=torch.float64)).numpy(),
            b.numpy(),
            rtol=tol,
            atol=0,
            M=inverse.numpy(),
            callback=steps.append,
        )
        system, x = solve(a, b, vectors, numbers, damping=damping, tol=tol)
        assert info == 0
        assert system.num_products == len(steps) + 1
        assert np.linalg.norm(x.numpy() - expected) <= 1e-6 * np.linalg.norm(expected)


def test_the_error_in_the_norm_of_the_matrix_never_grows_under_a_preconditioner() -> None:
    damping, b, space = 1e-3, random(N), DenseSpace(N)
    a = matrix(DECAYING)
    whole = a + damping * torch.eye(N, dtype=torch.float64)
    expected = torch.linalg.solve(whole, b)
    P = LowRankPreconditioner(space, *pairs(a, 10), damping)
    state = ConjugateGradients.begin(space, b, P)
    errors = [expected]
    while not state.end and state.residual_norm > 1e-10 * float(b.norm()):
        argument = state.argument(P)
        state.take(space, argument, whole @ argument, P)
        errors.append(expected - state.rows[0])
    norms = [float((e @ whole @ e).clamp(min=0).sqrt()) for e in errors]
    for before, after in itertools.pairwise(norms):
        assert after <= before * (1 + 1e-9) + 1e-12 * norms[0]
    assert norms[-1] < 1e-6 * norms[0]


@pytest.mark.parametrize("method", METHODS)
def test_vectors_that_rounding_has_bent_still_make_a_positive_definite_matrix(method: str) -> None:
    a, b, damping = matrix(DECAYING), random(N), 1e-9
    u, values = pairs(a, 20)
    bent = [each + 1e-5 * random(N, seed=index) for index, each in enumerate(u)]
    P = LowRankPreconditioner(DenseSpace(N), bent, values, damping)
    inverse = torch.stack([P(each) for each in torch.eye(N, dtype=torch.float64)])
    assert torch.linalg.eigvalsh((inverse + inverse.T) / 2)[0] > 0
    system, x = solve(a, b, bent, values, damping=0.01, method=method, max_products=900)
    assert system.outcome == "CONVERGED"
    assert residual(a, x, b, 0.01) <= 1e-6


def test_coarse_products_with_a_preconditioner_are_refined_to_the_tolerance() -> None:
    a, b = matrix(torch.logspace(-2, 1, 60, dtype=torch.float64)), random(60).float()
    u, values = pairs(a, 15)
    system, x = solve(coarse(a), b, [each.float() for each in u], values, damping=0.5, tol=2e-6)
    assert system.outcome == "CONVERGED"
    assert residual(a, x, b, 0.5) <= 2e-6 * (1 + 1e-3)


def test_a_preconditioner_that_is_far_off_makes_no_false_claim() -> None:
    """In its norm the residual is in the null space, to rounding; in the usual one it is not."""
    a, b, d = matrix(torch.linspace(1, 2, N).double()), random(N), torch.ones(N).double()
    d[7] = 1e-9
    system, x = solve(a, b, [d], method="minres", max_products=400)
    assert system.outcome in ("NOISE_LIMIT", "MAX_PRODUCTS", "CONVERGED")
    assert system.relative_residual == pytest.approx(residual(a, x, b), rel=1e-6, abs=1e-12)


# What is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("element", "damping", "is_refused"),
    [
        (0.0, 0.0, True),
        (0.0, 0.1, False),
        (-1e-9, 0.1, True),
        (float("nan"), 0.1, True),
        (float("inf"), 0.1, True),
        (0.01, 0.0, False),
        (0.1, -0.2, True),
    ],
)
def test_a_diagonal_that_is_not_positive_is_refused_before_any_product(
    element: float, damping: float, is_refused: bool
) -> None:
    d = torch.ones(N, dtype=torch.float64)
    d[7] = element
    operator = DenseOperator(matrix(torch.linspace(1, 2, N, dtype=torch.float64)))
    asked: dict[str, Any] = {"method": "minres", "damping": damping}
    if not is_refused:
        assert solve(operator, random(N), [d], **asked)[0].outcome == "CONVERGED"
        return
    with pytest.raises(CurvatureError, match="PRECONDITIONER_NOT_POSITIVE: 1 of 80") as refusal:
        solve(operator, random(N), [d], **asked)
    assert refusal.value.metadata == {"elements": "1"}
    assert operator.count == 0


def test_an_operator_without_factors_of_its_own_is_refused() -> None:
    operator = DenseOperator(matrix(DECAYING), semidefinite=True)
    with pytest.raises(CurvatureError, match=r"OPERATOR_HAS_NO_FACTORS.*low_rank"):
        configured(operator, [random(N)], factors="kronecker", damping=0.1)


@pytest.mark.parametrize("kind", ["scaled", "twice", "not finite"])
def test_vectors_that_are_not_orthonormal_are_refused_before_any_product(kind: str) -> None:
    operator = DenseOperator(matrix(DECAYING), semidefinite=True)
    u, values = pairs(matrix(DECAYING), 6)
    if kind == "scaled":
        u[2] = 1.01 * u[2]
    elif kind == "twice":
        u[2] = u[3]
    else:
        u[2][5] = torch.nan
    reason = "NON_FINITE" if kind == "not finite" else "VECTORS_NOT_ORTHONORMAL"
    with pytest.raises(CurvatureError, match=reason):
        solve(operator, random(N), u, values, damping=0.1)
    assert operator.count == 0


@pytest.mark.parametrize(
    ("value", "reason", "field"),
    [
        ({"preconditioner": ("v", "w")}, "PRECONDITIONER_INVALID", "preconditioner"),
        ({"preconditioner": ("v",) * 1025}, "PRECONDITIONER_INVALID", "preconditioner"),
        ({"preconditioner_values": (1.0,)}, "PRECONDITIONER_VALUES_INVALID", ""),
        (
            {"preconditioner": ("v", "w"), "preconditioner_values": (1.0,)},
            "PRECONDITIONER_VALUES_INVALID",
            "",
        ),
        (
            {"preconditioner": ("v",), "preconditioner_values": (-1.0,), "damping": 2.0},
            "PRECONDITIONER_VALUES_INVALID",
            "",
        ),
        (
            {"preconditioner": ("v",), "preconditioner_values": (0.0,)},
            "PRECONDITIONER_VALUES_INVALID",
            "",
        ),
        (
            {"preconditioner": ("v",), "preconditioner_values": (1.0,), "damping": -2.0},
            "PRECONDITIONER_VALUES_INVALID",
            "",
        ),
        (
            {"preconditioner": ("v",), "preconditioner_values": (float("nan"),)},
            "PRECONDITIONER_VALUES_INVALID",
            "",
        ),
        (
            {"preconditioner": ("v",), "preconditioner_values": "1"},
            "PRECONDITIONER_VALUES_INVALID",
            "",
        ),
    ],
)
def test_numbers_that_make_no_preconditioner_are_refused_with_the_question(
    value: dict[str, Any], reason: str, field: str
) -> None:
    facts = Facts(num_parameters=2000, kind="ggn")
    with pytest.raises(SpecError) as refusal:
        checked(OPERATION, {"b": ("b",), **value}, facts)
    assert refusal.value.reason == reason
    assert refusal.value.field == (field or "preconditioner_values")
    allowed = {"preconditioner": ("v",), "preconditioner_values": (0.0,), "damping": 0.1}
    assert checked(OPERATION, {"b": ("b",), **allowed}, facts)


def test_the_memory_of_a_preconditioner_is_counted() -> None:
    facts = Facts(num_parameters=2000, kind="ggn")
    plain = OPERATION.cost(SolveSpec(("b",), method="cg"), facts)
    low = SolveSpec(("b",), method="cg", preconditioner=("v",), preconditioner_values=(1.0,))
    diagonal = SolveSpec(("b",), method="cg", preconditioner=("v",))
    factored = SolveSpec(("b",), method="cg", factors="kronecker", damping=1.0)
    assert OPERATION.cost(factored, facts).least_vectors == plain.least_vectors + 5
    assert OPERATION.cost(low, facts).least_vectors == plain.least_vectors + 1
    assert OPERATION.cost(diagonal, facts).least_vectors == plain.least_vectors + 2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("is_diagonal", [False, True])
def test_a_run_that_goes_through_bytes_after_every_step_is_the_same_bit_for_bit(
    method: str, is_diagonal: bool
) -> None:
    a, bs = matrix(DECAYING), [random(N, seed=seed) for seed in (1, 2)]
    operator = DenseOperator(a, semidefinite=True)
    u, values = pairs(a, 8)
    algorithm = configured(
        operator,
        bs,
        preconditioner=[a.diagonal().clone()] if is_diagonal else u,
        preconditioner_values=() if is_diagonal else values,
        method=method,
        damping=0.3,
    )
    reported, found, _ = run(algorithm, operator, interrupted=False)
    others, again, _ = run(algorithm, operator, interrupted=True)
    assert is_same(reported, others)
    assert is_same(found.result, again.result)
    assert is_same(list(found.vectors), list(again.vectors))
