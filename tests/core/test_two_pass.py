"""Lanczos in two passes: what it finds with k + 2 rows, what it claims, and what it takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from hvp_core.krylov.lanczos import Eigsh
from hvp_core.krylov.lanczos_state import wanted
from hvp_core.krylov.two_pass import seen
from hvp_core.runs.algorithm import Budget
from hvp_core.runs.snapshot import written
from hvp_operations.checking import Seed, checked
from hvp_operations.eigsh import OPERATION, EigshSpec, Which, beside_basis
from hvp_operations.operation import Facts, SpecError
from torch import Tensor

from tests.core.dense import DenseOperator
from tests.core.spectra import Run, matrix, random, run
from tests.core.test_certificates import WHICHES, prescribed
from tests.core.written import is_same
from tests.core.written import run as run_written


def laplacian(n: int) -> Tensor:
    """Of a chain of n points: 2 − 2 cos(πj / (n + 1)), with gaps of 1/n² at both ends."""
    beside = torch.ones(n - 1, dtype=torch.float64)
    return 2 * torch.eye(n, dtype=torch.float64) - beside.diag(1) - beside.diag(-1)


def two_pass(a: Tensor, k: int, which: Which, *, num_vectors: int = 0, **options: object) -> Run:
    """A search with k + 2 rows, whose claims have been compared with the dense matrix."""
    found = run(a, k, which, num_vectors=num_vectors or k + 2, method="two_pass", **options)  # type: ignore[arg-type]
    pairs, true = found.pairs, torch.linalg.eigvalsh(a.double())
    assert found.count == pairs.num_products
    assert len(pairs.eigenvalues) == k
    distance = (true[:, None] - pairs.eigenvalues).abs().amin(0)
    assert (distance <= pairs.error_bounds).all()
    orthonormal = pairs.eigenvectors @ pairs.eigenvectors.T
    eps = torch.finfo(a.dtype).eps
    assert float((orthonormal - torch.eye(k)).abs().max()) <= 200 * eps
    if pairs.converged:
        expected, values = true[wanted(true, k, which)], pairs.eigenvalues
        if which == "LM":  # a tie in magnitude may go either way
            expected, values = expected.abs().sort().values, values.abs().sort().values
        assert float((values - expected).abs().max()) <= pairs.completeness.margin
    return found


OUTLIERS = torch.cat(
    (torch.tensor([-9.0, -4.0, -2.5]), torch.linspace(-1, 1, 100), torch.tensor([3.0, 5.0, 11.0]))
).double()


@pytest.mark.parametrize("which", WHICHES)
def test_it_finds_every_end_of_an_indefinite_spectrum(which: Which) -> None:
    pairs = two_pass(matrix(OUTLIERS), 5, which).pairs
    assert pairs.converged
    torch.testing.assert_close(
        pairs.eigenvalues, OUTLIERS[wanted(OUTLIERS, 5, which)], rtol=0, atol=1e-11
    )


@pytest.mark.parametrize(
    ("spectrum", "k", "which"),
    [
        ([0.0] * 25, 3, "LM"),
        ([1.0] * 30, 3, "LA"),
        ([3.0], 1, "LA"),
        ([-2.0, 1.0], 2, "SA"),
        ([1.0] * 25 + [5.0] * 5, 30, "LM"),
        ([1.0] * 25 + [5.0] * 5, 7, "LA"),
        ([-1.0] * 10 + [0.5] * 20 + [2.0] * 3, 4, "BE"),
    ],
)
def test_multiples_of_the_identity_and_a_few_values_are_found_as_often_as_they_are_there(
    spectrum: Sequence[float], k: int, which: Which
) -> None:
    values = torch.tensor(spectrum, dtype=torch.float64)
    pairs = two_pass(matrix(values), k, which, num_vectors=min(k + 2, len(values))).pairs
    assert pairs.converged
    torch.testing.assert_close(
        pairs.eigenvalues, values.sort().values[wanted(values.sort().values, k, which)],
        rtol=0, atol=1e-11,
    )  # fmt: skip


def test_copies_and_a_cluster_are_found_one_after_the_other() -> None:
    spectrum = torch.cat((torch.linspace(0, 0.5, 100), torch.full((3,), 0.79))).double()
    pairs = two_pass(matrix(spectrum), 3, "LA", tol=1e-6).pairs
    assert pairs.converged
    assert pairs.eigenvalues.tolist() == pytest.approx([float(spectrum[-1])] * 3)
    spectrum = torch.cat((torch.linspace(0, 1, 150), 1.2 + torch.linspace(0, 1e-3, 5))).double()
    pairs = two_pass(matrix(spectrum), 5, "LA", tol=1e-6).pairs
    assert pairs.converged
    torch.testing.assert_close(pairs.eigenvalues, spectrum[-5:], rtol=0, atol=1e-9)


def test_zeros_of_a_semidefinite_matrix_are_its_smallest() -> None:
    spectrum = torch.cat((torch.zeros(40), torch.logspace(-2, 0, 40))).double()
    pairs = two_pass(matrix(spectrum), 4, "SA", tol=1e-3, semidefinite=True).pairs
    assert pairs.converged
    assert float(pairs.eigenvalues.abs().max()) < 1e-3


def test_small_gaps_take_a_fraction_of_what_restarts_in_as_few_rows_take() -> None:
    a = laplacian(100)
    restarted = run(a, 3, "LA", tol=1e-4, num_vectors=5, max_products=20_000)
    passes = two_pass(a, 3, "LA", tol=1e-4)
    assert restarted.pairs.converged
    assert passes.pairs.converged
    assert passes.count < restarted.count / 3
    kept = run(a, 3, "LA", tol=1e-4, num_vectors=90)
    assert passes.count < 2 * kept.count  # of a basis that keeps every vector
    stages = Counter(each.stage for each in passes.reported)
    assert stages["second_pass"] < stages["first_pass"]


def test_a_budget_that_ends_is_kept_and_said() -> None:
    for most in (12, 40, 100, 150):
        found = two_pass(laplacian(120), 4, "LA", max_products=most)
        assert found.count <= most
        assert not found.pairs.converged
    assert [each.num_products for each in found.reported] == list(range(1, found.count + 1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_state_that_is_written_after_any_step_goes_on_bit_for_bit(dtype: torch.dtype) -> None:
    operator = DenseOperator(matrix(OUTLIERS).to(dtype))
    algorithm = Eigsh(
        spec=EigshSpec(k=4, which="BE", tol=1e-3, seed=Seed(3)),
        max_products=400,
        num_vectors=6,
        method="two_pass",
    )
    reported, found, last = run_written(algorithm, operator, interrupted=False)
    others, again, final = run_written(algorithm, operator, interrupted=True)
    assert {"first_pass", "second_pass", "completeness"} <= {each.stage for each in reported}
    assert is_same(reported, others)
    assert is_same(found.result, again.result)
    assert is_same(list(found.vectors), list(again.vectors))
    assert is_same(written(last).values, written(final).values)


def test_it_holds_no_more_rows_than_the_plan_says() -> None:
    spec = EigshSpec(k=5, which="LA", method="two_pass", tol=1e-6)
    facts = Facts(num_parameters=len(OUTLIERS), kind="hessian")
    cost = OPERATION.cost(spec, facts)
    assert cost.least_vectors == cost.wished_vectors == 5 + 2 + beside_basis(spec)
    operator = DenseOperator(matrix(OUTLIERS))
    algorithm = Eigsh.configure(
        spec, operator, Budget(max_products=300, num_vectors=cost.least_vectors, inputs={"v0": ()})
    )
    state = algorithm.begin(operator)
    while algorithm.step(operator, state) is not None:
        held = written(state).shards.values()
        assert sum(map(len, held)) <= len(state.basis.rows) == 5 + 3


def test_auto_keeps_a_basis_where_there_is_room_for_it_and_makes_two_passes_where_not() -> None:
    operator = DenseOperator(matrix(OUTLIERS))
    for options, rows, method in (
        ({}, 14, "lanczos"),
        ({}, 13, "two_pass"),
        ({"method": "two_pass"}, 40, "two_pass"),
        ({"num_lanczos_vectors": 9}, 9, "lanczos"),  # they were asked for
        ({"max_products": 12}, 8, "lanczos"),  # which have no need of more
    ):
        spec = EigshSpec(k=6, **options)
        budget = Budget(max_products=300, num_vectors=rows + beside_basis(spec), inputs={"v0": ()})
        assert Eigsh.configure(spec, operator, budget).method == method


def test_blocks_are_refused_by_two_passes() -> None:
    facts = Facts(num_parameters=100, kind="hessian")
    with pytest.raises(SpecError, match="one by one") as caught:
        checked(OPERATION, {"method": "two_pass", "block_size": 2}, facts)
    assert (caught.value.reason, caught.value.field) == ("BLOCK_SIZE_INVALID", "block_size")
    with pytest.raises(SpecError, match="method") as caught:
        checked(OPERATION, {"method": "power"}, facts)
    assert caught.value.reason == "METHOD_UNSUPPORTED"


def test_vectors_to_begin_with_that_are_eigenvectors_end_the_search() -> None:
    a = matrix(OUTLIERS)
    every = torch.linalg.eigh(a).eigenvectors.T
    given = two_pass(a, 3, "LA", tol=1e-6, starts=list(every[-3:]))
    assert given.pairs.converged
    assert "first_pass" not in {each.stage for each in given.reported}
    # Those of another end are no harm.
    assert two_pass(a, 3, "LA", tol=1e-6, starts=list(every[:3])).pairs.converged


def test_of_coarse_products_intervals_are_those_of_the_exact_operator() -> None:
    spectrum = torch.cat((torch.linspace(-1, 1, 150), torch.tensor([3.0, 5.0, 11.0]))).double()
    a = matrix(spectrum)

    def coarse(v: Tensor) -> Tensor:
        w = a @ v
        noise = random(len(v), seed=int(float(w.abs().sum()) * 1e6) % 2**31)
        return w + 1e-4 * w.norm() * noise / noise.norm()

    found = run(
        coarse, 3, "LA", n=len(a), exact=lambda v: a @ v, max_products=300, tol=1e-2,
        num_vectors=5, method="two_pass",
    ).pairs  # fmt: skip
    assert found.outcome in ("CONVERGED", "NOISE_LIMIT")
    distance = (spectrum[:, None] - found.eigenvalues).abs().amin(0)
    assert (distance <= found.error_bounds).all()


def test_a_ghost_and_its_eigenvalue_are_one_and_the_start_is_told_by_its_weights() -> None:
    spectrum = torch.cat((torch.linspace(-1, 1, 60), torch.tensor([30.0]))).double()
    start = random(len(spectrum))
    start /= start.norm()
    v, before, beta = start.clone(), torch.zeros_like(start), 0.0
    alphas, betas, rows = [], [], []
    for _ in range(40):  # the outermost value comes back out of rounding
        rows.append(v)
        w = spectrum * v - beta * before
        alphas.append(float(w @ v))
        w = w - alphas[-1] * v
        beta = float(w.norm())
        betas.append(beta)
        before, v = v, w / beta
    found = seen(alphas, betas, 1e-10, 1e-8)
    assert int((found.values > 29).sum()) == 1
    vector = torch.stack(rows).T @ found.weights[:, -1]
    vector = vector / vector.norm()
    assert abs(float(vector[-1])) == pytest.approx(1, abs=1e-9)
    assert float(found.residuals[-1]) < 1e-9


@pytest.mark.parametrize("seed", [1, 4])
def test_a_few_random_spectra_are_claimed_as_they_are(seed: int) -> None:
    spectrum, k = prescribed(seed)
    for which in WHICHES:
        two_pass(matrix(spectrum, seed), k, which, tol=1e-3, max_products=300 + k)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("part", range(4))
def test_random_operators_never_give_a_false_claim_in_two_passes(part: int) -> None:
    outcomes = []
    for seed in range(part * 50, part * 50 + 50):
        spectrum, k = prescribed(seed)
        which = WHICHES[seed % 4]
        a = matrix(spectrum, seed).to([torch.float64, torch.float32][seed // 4 % 2])
        tol = [1e-2, 1e-4][seed // 8 % 2]
        outcomes.append(
            two_pass(a, k, which, tol=tol, max_products=min(600 + k, 10 * len(a))).pairs.outcome
        )
    assert outcomes.count("CONVERGED") > 0.6 * len(outcomes)
    assert "NOISE_LIMIT" not in outcomes
