"""Linear systems: CG and MINRES against dense solves, SciPy, and the theorems on both."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hvp_core.errors import CurvatureError
from hvp_core.krylov.cg import ConjugateGradients
from hvp_core.krylov.minres import Minres
from hvp_core.krylov.solve import Solve, identity
from hvp_core.linop.linear_operator import LinearOperator
from hvp_core.runs.algorithm import Advance, Budget, drive
from hvp_operations.solve import SolveResult, SolveSpec, System
from scipy.sparse import linalg
from torch import Tensor

from tests.core.dense import DenseOperator, DenseSpace
from tests.core.spectra import matrix, random
from tests.core.written import is_same, run

N = 60
POSITIVE = torch.logspace(-1.5, 0, N, dtype=torch.float64)
INDEFINITE = torch.cat((torch.linspace(-1, -0.1, 20), torch.linspace(0.05, 2, N - 20))).double()
SINGULAR = torch.cat((torch.zeros(10), torch.linspace(0.2, 1, N - 10))).double()
DTYPES = [torch.float64, torch.float32]


def configured(
    operator: LinearOperator,
    b: Sequence[Tensor],
    *,
    x0: Sequence[Tensor] = (),
    preconditioner: Sequence[Tensor] = (),
    num_vectors: int = 10**6,
    **values: Any,
) -> Solve:
    spec = SolveSpec(
        tuple("b" for _ in b),
        x0=tuple("x" for _ in x0),
        preconditioner=tuple("p" for _ in preconditioner),
        **values,
    )
    inputs = {"b": b, "x0": x0, "preconditioner": preconditioner}
    return Solve.configure(
        spec, operator, Budget(max_products=10**6, num_vectors=num_vectors, inputs=inputs)
    )


def solve(
    a: Tensor | LinearOperator, *b: Tensor, semidefinite: bool = False, **values: Any
) -> tuple[SolveResult, list[Tensor]]:
    """Solve systems; the count of products is compared with that of the operator."""
    operator = DenseOperator(a, semidefinite=semidefinite) if isinstance(a, Tensor) else a
    before = getattr(operator, "count", 0)
    found = drive(configured(operator, b, **values), operator)
    if isinstance(a, Tensor):
        assert found.result.num_products == operator.count - before  # type: ignore[attr-defined]
    assert sum(each.num_products for each in found.result.systems) == found.result.num_products
    return found.result, list(found.vectors)


def solve_one(a: Tensor | LinearOperator, b: Tensor, **values: Any) -> tuple[System, list[Tensor]]:
    result, vectors = solve(a, b, **values)
    (system,) = result.systems
    return system, vectors


def residual(a: Tensor, x: Tensor, b: Tensor, damping: float = 0.0) -> float:
    rest = b.double() - a.double() @ x.double() - damping * x.double()
    return float(rest.norm() / b.double().norm())


def coarse(a: Tensor) -> DenseOperator:
    """The matrix with products of bfloat16 operands, and exact ones of float64."""
    rounded = a.bfloat16().double()
    return DenseOperator(
        lambda v: (rounded @ v.bfloat16().double()).float(),
        DenseSpace(len(a), torch.float32),
        semidefinite=True,
        noise=2**-8,
        exact=lambda v: (a @ v.double()).float(),
    )


# What is found ----------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [0.0, 0.3])
@pytest.mark.parametrize("method", ["cg", "minres"])
def test_x_is_that_of_a_dense_solve(method: str, damping: float) -> None:
    a, b = matrix(POSITIVE), random(N)
    system, (x,) = solve_one(a, b, method=method, damping=damping, tol=1e-12)
    assert system.outcome == "CONVERGED"
    expected = torch.linalg.solve(a + damping * torch.eye(N, dtype=torch.float64), b)
    assert (x - expected).norm() <= 1e-10 * expected.norm()
    assert system.relative_residual == pytest.approx(residual(a, x, b, damping), rel=1e-2)
    assert system.is_exact


@pytest.mark.parametrize("damping", [0.0, -0.47, 0.01])
def test_minres_solves_what_is_indefinite(damping: float) -> None:
    a, b = matrix(INDEFINITE), random(N)
    system, (x,) = solve_one(a, b, damping=damping, tol=1e-10, max_products=2000)
    assert system.outcome == "CONVERGED"
    assert residual(a, x, b, damping) <= 1e-10


def test_auto_is_cg_where_no_eigenvalue_can_be_negative_and_minres_elsewhere() -> None:
    b = random(N)
    for semidefinite, damping, method in (
        (True, 0.0, "cg"),
        (True, 0.1, "cg"),
        (True, -0.1, "minres"),
        (False, 0.1, "minres"),
    ):
        operator = DenseOperator(matrix(POSITIVE), semidefinite=semidefinite)
        assert configured(operator, [b], damping=damping).method == method


def test_a_right_hand_side_of_zero_takes_no_product() -> None:
    a = matrix(POSITIVE)
    for start in ((), (random(N, seed=3),)):
        system, (x,) = solve_one(a, torch.zeros(N, dtype=torch.float64), x0=start)
        assert (system.outcome, system.num_products, system.relative_residual) == (
            "CONVERGED",
            0,
            0.0,
        )
        assert not x.any()


def test_a_start_that_is_the_solution_takes_one_product_and_stays() -> None:
    a, b = matrix(POSITIVE), random(N)
    start = torch.linalg.solve(a, b)
    given = start.clone()
    system, (x,) = solve_one(a, b, x0=[start])
    assert (system.outcome, system.num_products) == ("CONVERGED", 1)
    assert system.recursion_residual == system.relative_residual <= 1e-6
    assert torch.equal(x, given)
    assert torch.equal(start, given)


@pytest.mark.parametrize("method", ["cg", "minres"])
def test_a_start_near_the_solution_saves_products_and_a_run_goes_on_from_its_x(method: str) -> None:
    a, b = matrix(POSITIVE), random(N)
    cold, _ = solve_one(a, b, method=method, tol=1e-8)
    early, (x,) = solve_one(a, b, method=method, tol=1e-8, max_products=20)
    assert (early.outcome, early.num_products) == ("MAX_PRODUCTS", 19)
    assert early.relative_residual == pytest.approx(residual(a, x, b))
    assert early.relative_residual < 1
    warm, (better,) = solve_one(a, b, method=method, tol=1e-8, x0=[x])
    assert warm.outcome == "CONVERGED"
    assert residual(a, better, b) <= 1e-8
    near = torch.linalg.solve(a, b) + 1e-4 * random(N, seed=9)
    assert solve_one(a, b, method=method, tol=1e-8, x0=[near])[0].num_products < cold.num_products


@pytest.mark.parametrize("spectrum", [POSITIVE, INDEFINITE, SINGULAR])
@pytest.mark.parametrize("method", ["cg", "minres"])
def test_no_system_takes_more_products_than_it_may_and_x_is_never_worse_than_its_start(
    method: str, spectrum: Tensor
) -> None:
    a, b = matrix(spectrum), random(N)
    for start in ((), (random(N, seed=2),)):
        first = residual(a, start[0], b) if start else 1.0
        for most in (4, 5, 6, 9, 17, 40, 80):
            system, (x, *_) = solve_one(a, b, method=method, x0=start, max_products=most, tol=1e-9)
            assert system.num_products <= most
            assert residual(a, x, b) <= first * (1 + 1e-9)
            assert system.relative_residual == pytest.approx(residual(a, x, b), rel=1e-6, abs=1e-12)


# Theorems ---------------------------------------------------------------------------------------


def iterates(recurrence: type[Any], a: Tensor, b: Tensor, count: int) -> list[tuple[Tensor, float]]:
    """The correction, and the recurrence's residual, after each step."""
    space, found = DenseSpace(len(b), b.dtype), []
    state = recurrence.begin(space, b, identity)
    for _ in range(count):
        argument = state.argument(identity)
        state.take(space, argument, a @ argument, identity)
        found.append((state.rows[0].clone(), state.residual_norm))
        if state.end:
            break
    return found


def test_the_error_of_cg_in_the_norm_of_the_matrix_never_grows() -> None:
    a, b = matrix(POSITIVE), random(N)
    expected = torch.linalg.solve(a, b)
    errors = [expected, *(expected - y for y, _ in iterates(ConjugateGradients, a, b, 90))]
    norms = [float((e @ a @ e).clamp(min=0).sqrt()) for e in errors]
    for before, after in itertools.pairwise(norms):
        assert after <= before * (1 + 1e-9) + 1e-12 * norms[0]
    assert norms[-1] < 1e-7 * norms[0]


@pytest.mark.parametrize("spectrum", [POSITIVE, INDEFINITE])
def test_the_residual_of_minres_never_grows_and_is_the_least_of_the_krylov_space(
    spectrum: Tensor,
) -> None:
    a, b = matrix(spectrum), random(N)
    found = iterates(Minres, a, b, 25)
    norms = [float(b.norm()), *(norm for _, norm in found)]
    assert all(after <= before for before, after in itertools.pairwise(norms))
    space = [b / b.norm()]
    for y, norm in found:
        basis = torch.stack(space, 1)
        coefficients = torch.linalg.lstsq(a @ basis, b).solution
        assert norm == pytest.approx(float((b - a @ basis @ coefficients).norm()), rel=1e-8)
        assert float((b - a @ y).norm()) == pytest.approx(norm, rel=1e-8)
        w = a @ space[-1]
        for _ in range(2):
            w = w - basis @ (basis.T @ w)
        space.append(w / w.norm())


@pytest.mark.parametrize("method", ["cg", "minres"])
def test_a_run_ends_at_the_number_of_distinct_eigenvalues(method: str) -> None:
    values = torch.tensor([0.5, 1.0, 3.0, 7.0]).double()
    spectrum = values.repeat_interleave(N // 4)
    if method == "minres":
        spectrum = spectrum * torch.tensor([1.0, -1.0]).double().repeat(N // 2)
    distinct = len(set(spectrum.tolist()))
    system, (x,) = solve_one(matrix(spectrum), random(N), method=method, tol=1e-10)
    assert (system.outcome, system.num_products) == ("CONVERGED", distinct + 1)
    assert residual(matrix(spectrum), x, random(N)) <= 1e-10


@pytest.mark.parametrize("tol", [1e-2, 1e-4])
def test_cg_takes_as_many_steps_as_scipys(tol: float) -> None:
    a, b = matrix(POSITIVE), random(N)
    steps: list[int] = []
    expected, info = linalg.cg(a.numpy(), b.numpy(), rtol=tol, atol=0, callback=steps.append)
    system, (x,) = solve_one(a, b, semidefinite=True, tol=tol)
    assert info == 0
    assert system.num_products == len(steps) + 1
    np.testing.assert_allclose(x.numpy(), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("spectrum", [POSITIVE, INDEFINITE])
def test_iterates_of_minres_are_scipys(spectrum: Tensor) -> None:
    a, b = matrix(spectrum), random(N)
    for count, (y, _) in enumerate(iterates(Minres, a, b, 12), 1):
        expected, _ = linalg.minres(a.numpy(), b.numpy(), rtol=1e-14, maxiter=count)
        np.testing.assert_allclose(y.numpy(), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("method", ["cg", "minres"])
def test_a_preconditioner_that_is_the_inverse_takes_one_step(method: str) -> None:
    """And the diagonal takes fewer than no preconditioner, on a badly scaled matrix."""
    d = torch.logspace(0, 4, N, dtype=torch.float64)
    a = d.sqrt()[:, None] * matrix(POSITIVE) * d.sqrt()
    b = random(N)
    operator = DenseOperator(a)
    plain = configured(operator, [b], method=method, tol=1e-6, max_products=5000)

    def with_inverse(apply_inverse: Callable[[Tensor], Tensor]) -> System:
        algorithm = Solve(**{**vars(plain), "apply_inverse": apply_inverse})
        found = drive(algorithm, operator)
        assert residual(a, found.vectors[0], b) <= 1e-6
        system: System = found.result.systems[0]
        assert system.outcome == "CONVERGED"
        return system

    inverse = torch.linalg.inv(a)
    assert with_inverse(lambda v: inverse @ v).num_products <= 3
    assert with_inverse(lambda v: v / d).num_products < with_inverse(identity).num_products


# Several at once --------------------------------------------------------------------------------


@pytest.mark.parametrize("num_vectors", [10**6, 30])
@pytest.mark.parametrize("method", ["cg", "minres"])
def test_several_right_hand_sides_give_what_each_gives_alone(method: str, num_vectors: int) -> None:
    a = matrix(POSITIVE)
    bs = [random(N, seed=seed) for seed in (1, 2)]
    bs += [torch.zeros(N, dtype=torch.float64), a @ random(N, seed=3)]
    starts = [bs[1], torch.zeros(N, dtype=torch.float64), bs[0], bs[0]]
    together, found = solve(
        a, *bs, method=method, x0=starts, tol=1e-8, num_vectors=num_vectors, damping=0.01
    )
    for b, x0, system, x in zip(bs, starts, together.systems, found, strict=True):
        alone, (expected,) = solve_one(a, b, method=method, x0=[x0], tol=1e-8, damping=0.01)
        assert system == alone
        assert torch.equal(x, expected)


def test_all_that_go_have_their_products_in_one_call() -> None:
    class Counting(DenseOperator):
        def __init__(self, a: Tensor):
            super().__init__(a, semidefinite=True)
            self.calls: list[int] = []

        def apply(self, vectors: Sequence[Tensor], *, borrow: bool = False) -> list[Tensor]:
            self.calls.append(len(vectors))
            return super().apply(vectors, borrow=borrow)

    operator = Counting(matrix(POSITIVE))
    solve(operator, *(random(N, seed=seed) for seed in range(3)), tol=1e-3)
    assert operator.calls[0] == 3
    iterating, verifying = operator.calls[:-1], operator.calls[-1]
    assert iterating == sorted(iterating, reverse=True)
    assert verifying == 3
    operator.most_together = 2
    operator.calls.clear()
    solve(operator, *(random(N, seed=seed) for seed in range(3)), tol=1e-3)
    assert max(operator.calls) == 2


# What cannot be solved --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_negative_curvature_is_found_and_its_direction_has_it(dtype: torch.dtype) -> None:
    a, b = matrix(INDEFINITE).to(dtype), random(N).to(dtype)
    for damping in (0.0, 0.4):
        system, (_, d) = solve_one(a, b, method="cg", damping=damping)
        assert system.outcome == "NEGATIVE_CURVATURE"
        assert float(d.double().norm()) == pytest.approx(1, rel=1e-6)
        curvature = float(d.double() @ a.double() @ d.double())
        assert curvature < -damping
        assert system.curvature == pytest.approx(curvature, rel=1e-4)
    system, _ = solve_one(a, b, method="cg", damping=1.5)
    assert system.outcome == "CONVERGED"
    assert system.curvature is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_minres_finds_least_squares_where_the_right_hand_side_is_out_of_the_range(
    dtype: torch.dtype,
) -> None:
    exact, b = matrix(SINGULAR), random(N)
    least = residual(exact, torch.linalg.pinv(exact) @ b, b)
    system, (x,) = solve_one(exact.to(dtype), b.to(dtype), method="minres")
    assert system.outcome == "LEAST_SQUARES"
    assert residual(exact, x, b) == pytest.approx(least, rel=1e-5)
    assert system.normal_residual is not None
    assert system.normal_residual < 10 * torch.finfo(dtype).eps ** 0.5


@pytest.mark.parametrize("method", ["cg", "minres"])
def test_a_singular_system_with_a_right_hand_side_in_the_range_is_solved(method: str) -> None:
    a = matrix(SINGULAR)
    b = a @ random(N)
    system, (x,) = solve_one(a, b, method=method, tol=1e-8)
    assert system.outcome == "CONVERGED"
    assert residual(a, x, b) <= 1e-8


def test_cg_on_a_singular_matrix_breaks_down_with_the_best_x_kept() -> None:
    a, b = matrix(SINGULAR), random(N)
    system, (x,) = solve_one(a, b, method="cg")
    assert system.outcome == "BREAKDOWN"
    assert system.relative_residual == pytest.approx(residual(a, x, b))
    assert system.relative_residual < 1
    zero, (nothing,) = solve_one(torch.zeros(N, N, dtype=torch.float64), b, method="cg")
    assert zero.outcome == "BREAKDOWN"
    assert not nothing.any()
    zero, (nothing,) = solve_one(torch.zeros(N, N, dtype=torch.float64), b, method="minres")
    assert zero.outcome == "LEAST_SQUARES"
    assert not nothing.any()


def test_what_is_not_finite_is_said() -> None:
    a = matrix(POSITIVE)
    a[3, 3] = torch.inf
    with pytest.raises(CurvatureError, match="NON_FINITE"):
        solve_one(a, random(N))


# Products that are coarse -----------------------------------------------------------------------


@pytest.mark.parametrize("damping", [0.05, 0.5])
@pytest.mark.parametrize("method", ["cg", "minres"])
def test_coarse_products_are_refined_until_the_true_residual_meets_the_tolerance(
    method: str, damping: float
) -> None:
    a, b = matrix(POSITIVE), random(N).float()
    system, (x,) = solve_one(coarse(a), b, method=method, damping=damping, tol=2e-6)
    assert system.outcome == "CONVERGED"
    assert residual(a, x, b, damping) <= 2e-6 * (1 + 1e-3)


def test_noise_that_does_not_allow_the_tolerance_is_the_outcome() -> None:
    a, b = matrix(torch.logspace(-5, 0, N, dtype=torch.float64)), random(N).float()
    system, (x,) = solve_one(coarse(a), b, tol=1e-6, max_products=5000)
    assert system.outcome == "NOISE_LIMIT"
    assert system.relative_residual == pytest.approx(residual(a, x, b), rel=1e-3)
    operator = DenseOperator(a.float(), exact=lambda v: (a @ v.double()).float())
    float32, (x,) = solve_one(operator, b, method="cg", tol=1e-9, max_products=5000)
    assert float32.outcome == "NOISE_LIMIT"
    assert float32.relative_residual == pytest.approx(residual(a, x, b), rel=0.1)


def test_without_an_exact_product_nothing_is_claimed() -> None:
    a, b = matrix(POSITIVE), random(N)
    operator = DenseOperator(a, semidefinite=True, exact=None)
    system, (x,) = solve_one(operator, b)
    assert (system.outcome, system.is_exact) == ("UNVERIFIED", False)
    assert residual(a, x, b) <= 1e-6


# The state --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("spectrum", "values"),
    [
        (POSITIVE, {"method": "cg", "damping": 0.01}),
        (POSITIVE, {"method": "cg", "num_vectors": 30}),
        (INDEFINITE, {"method": "cg"}),
        (INDEFINITE, {"method": "minres"}),
        (SINGULAR, {"method": "minres", "max_products": 50}),
    ],
)
def test_a_run_that_goes_through_bytes_after_every_step_is_the_same_bit_for_bit(
    dtype: torch.dtype, spectrum: Tensor, values: dict[str, Any]
) -> None:
    operator = DenseOperator(matrix(spectrum).to(dtype))
    b = [random(N, dtype, seed=seed) for seed in (1, 2)]
    algorithm = configured(operator, b, x0=[b[1], torch.zeros_like(b[0])], **values)
    reported, found, _ = run(algorithm, operator, interrupted=False)
    others, again, _ = run(algorithm, operator, interrupted=True)
    assert len({advance.stage for advance in reported}) > 1
    assert is_same(reported, others)
    assert is_same(found.result, again.result)
    assert is_same(list(found.vectors), list(again.vectors))


def test_progress_tells_the_residuals_and_how_many_have_ended() -> None:
    a, bs = matrix(POSITIVE), [random(N, seed=seed) for seed in (1, 2)]
    told: list[Advance] = []
    operator = DenseOperator(a, semidefinite=True)
    drive(configured(operator, bs), operator, told.append)
    assert [each.num_products for each in told] == sorted(each.num_products for each in told)
    assert told[-1].detail.num_ended == 2
    assert max(told[-1].detail.residuals) <= 1e-6
    assert told[0].detail.table().rows


def test_a_residual_a_hair_above_the_tolerance_is_not_taken_for_noise() -> None:
    """The second round of this one goes where its recurrence meets the tolerance and x does not."""
    generator, n = torch.Generator().manual_seed(4), 800
    q, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))
    wide = torch.float64
    bulk, outliers = (
        torch.logspace(-4, -1, n - 20, dtype=wide),
        torch.linspace(0.2, 1, 20, dtype=wide),
    )
    a = (q * torch.cat((bulk, outliers))) @ q.T
    single = a.float()
    operator = DenseOperator(
        lambda v: single @ v,
        DenseOperator(single).domain,
        semidefinite=True,
        exact=lambda v: (a @ v.double()).float(),
    )
    b = torch.randn(n, generator=generator)
    spec = SolveSpec(("b",), damping=1e-3, method="cg", tol=1e-5)
    inputs = {"b": [b], "x0": [], "preconditioner": []}
    budget = Budget(max_products=900, num_vectors=40, inputs=inputs)
    (system,) = drive(Solve.configure(spec, operator, budget), operator).result.systems
    assert system.outcome == "CONVERGED"
    assert system.num_products < 200
