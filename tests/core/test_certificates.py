"""What a run claims is true: of repeated eigenvalues, of clusters, with noise."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import pytest
import torch
from hvp_core.errors import CurvatureError
from hvp_core.krylov.lanczos import Eigsh
from hvp_core.krylov.lanczos_state import wanted
from hvp_operations.eigsh import EigshSpec, Which
from torch import Tensor

from tests.core.spectra import matrix, random, run

WHICHES: tuple[Which, ...] = ("LA", "SA", "LM", "BE")


def claims_are_true(
    a: Tensor,
    k: int,
    which: Which,
    tol: float,
    seed: int,
    block_size: int = 1,
    starts: Sequence[Tensor] = (),
) -> str:
    """Run, and compare everything that the result claims with the dense matrix; the outcome."""
    n = len(a)
    found = run(
        a, k, which, tol=tol, max_products=min(10 * n, 300 + k), num_vectors=max(2 * k + 16, 40),
        seed=seed, block_size=block_size, starts=starts,
    )  # fmt: skip
    pairs = found.pairs
    true = torch.linalg.eigvalsh(a.double())
    scale = float(true.abs().max())
    distance = (true[:, None] - pairs.eigenvalues).abs().amin(0)
    assert (distance <= pairs.error_bounds).all()
    if pairs.outcome == "CONVERGED":
        expected, values = true[wanted(true, k, which)], pairs.eigenvalues
        if which == "LM":  # a tie in magnitude may go either way
            expected, values = expected.abs().sort().values, values.abs().sort().values
        assert float((values - expected).abs().max()) <= pairs.completeness.margin
        if tol:  # with none a run that ends in rounding tells only from far more than that
            assert pairs.completeness.margin <= 2.01 * tol * scale
    assert found.count <= min(10 * n, 300 + k)
    return pairs.outcome


def prescribed(seed: int) -> tuple[Tensor, int]:
    """A spectrum with multiplicities 1 to 12 and clusters at its ends, on any scale; and a k."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand(1, generator=generator))

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    def ends() -> Iterator[float]:
        for end in (1, -1):
            for _ in range(integer(0, 3)):
                value = end * (1 + uniform(0, 2) if uniform(0, 1) < 0.7 else uniform(0.9, 1))
                step = [0, 0, 0, 1e-3, 1e-6][integer(0, 4)]
                yield from (value + step * copy for copy in range(integer(1, 12)))

    n = integer(20, 100)
    spectrum = 2 * torch.rand(n, generator=generator, dtype=torch.float64) - 1
    special = list(ends())[:n]
    spectrum[: len(special)] = torch.tensor(special, dtype=torch.float64)
    if uniform(0, 1) < 0.2:
        spectrum = spectrum.clamp(min=0)  # a large null space
    return spectrum * 10 ** uniform(-3, 3), integer(1, min(12, n - 2))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("part", range(8))
def test_random_operators_never_give_a_wrong_k_or_a_false_claim(part: int) -> None:
    outcomes = []
    for seed in range(part * 25, part * 25 + 25):
        spectrum, k = prescribed(seed)
        a = matrix(spectrum, seed)
        for which in WHICHES:
            for dtype in (torch.float64, torch.float32):
                for tol in (0.0, 1e-2):
                    outcomes.append(claims_are_true(a.to(dtype), k, which, tol, seed))
    # A check that says CONVERGED of nothing would pass everything above.
    assert outcomes.count("CONVERGED") > 0.7 * len(outcomes)
    assert "NOISE_LIMIT" not in outcomes


@pytest.mark.parametrize("which", WHICHES)
@pytest.mark.parametrize("tol", [0.0, 1e-2])
def test_a_few_of_the_random_operators(which: Which, tol: float) -> None:
    for seed in (0, 3, 7):
        spectrum, k = prescribed(seed)
        claims_are_true(matrix(spectrum, seed), k, which, tol, seed)


@pytest.mark.parametrize("tol", [0.0, 1e-2])
@pytest.mark.parametrize("k", [1, 3, 4, 5])
def test_a_repeated_largest_eigenvalue_comes_as_often_as_it_is_there(k: int, tol: float) -> None:
    spectrum = torch.cat((torch.linspace(0, 0.5, 200), torch.full((4,), 0.79))).double()
    pairs = run(matrix(spectrum), k, "LA", tol=tol).pairs
    assert pairs.outcome == "CONVERGED"
    assert int((pairs.eigenvalues > 0.78).sum()) == min(k, 4)


def test_a_large_null_space_is_k_zeros_and_never_the_next_values() -> None:
    spectrum = torch.cat((torch.zeros(60), torch.logspace(-2, 0, 60))).double()
    for semidefinite in (True, False):
        pairs = run(
            matrix(spectrum), 4, "SA", tol=1e-3, semidefinite=semidefinite, max_products=3000
        ).pairs
        assert pairs.outcome == "CONVERGED"
        assert float(pairs.eigenvalues.abs().max()) < 1e-3


def test_of_an_operator_without_negative_eigenvalues_zeros_need_no_search() -> None:
    a = matrix(torch.cat((torch.zeros(60), torch.logspace(-2, 0, 60))).double())
    known = run(a, 1, "SA", tol=1e-3, semidefinite=True).pairs
    unknown = run(a, 1, "SA", tol=1e-3).pairs
    assert known.num_products < unknown.num_products


def test_ends_far_from_the_rest_are_shown_complete_in_a_few_products() -> None:
    spectrum = torch.cat(
        (torch.tensor([-9.0, -4.0, -2.5]), torch.linspace(-1, 1, 1000), torch.tensor([3.0, 5, 11]))
    )
    pairs = run(matrix(spectrum.double()), 6, "BE", tol=1e-6).pairs
    assert pairs.outcome == "CONVERGED"
    assert pairs.completeness.shown
    assert pairs.completeness.num_products <= 12
    assert pairs.completeness.failure_probability == 1e-3


def test_a_budget_that_ends_before_completeness_is_said() -> None:
    spectrum = torch.cat((torch.linspace(-1, 1, 300), torch.tensor([3.0, 5, 11]))).double()
    full = run(matrix(spectrum), 3, "LA", tol=1e-3)
    searched = [each.stage for each in full.reported].index("completeness")
    pairs = run(matrix(spectrum), 3, "LA", tol=1e-3, max_products=searched + 2 + 3).pairs
    assert pairs.outcome == "MULTIPLICITY_UNCERTAIN"
    assert not pairs.completeness.shown
    assert float(pairs.residuals.max()) <= 1e-3 * 11


def test_a_whole_space_leaves_nothing_to_chance() -> None:
    pairs = run(matrix(torch.arange(9).double()), 3, "SA").pairs
    assert pairs.outcome == "CONVERGED"
    assert pairs.completeness.failure_probability == 0
    assert pairs.completeness.num_products == 0


class Rounded:
    """A matrix whose products are rounded to a few digits, as those of 16-bit operands are."""

    def __init__(self, a: Tensor, digits: float):
        self.a, self.digits = a, digits

    def __call__(self, v: Tensor) -> Tensor:
        w = self.a @ v
        noise = random(len(v), seed=int(float(w.abs().sum()) * 1e6) % 2**31)
        return w + self.digits * w.norm() * noise / noise.norm()


def test_noise_is_an_outcome_and_intervals_are_those_of_the_exact_operator() -> None:
    spectrum = torch.cat((torch.linspace(-1, 1, 200), torch.tensor([3.0, 5, 11]))).double()
    a = matrix(spectrum)
    noisy = run(
        Rounded(a, 1e-2), 3, "LA", n=len(a), exact=lambda v: a @ v, max_products=300, tol=1e-5
    ).pairs
    assert noisy.outcome == "NOISE_LIMIT"
    distance = (spectrum[:, None] - noisy.eigenvalues).abs().amin(0)
    assert (distance <= noisy.error_bounds).all()
    assert noisy.completeness.margin >= float(noisy.residuals.max())
    enough = run(Rounded(a, 1e-5), 3, "LA", n=len(a), exact=lambda v: a @ v, tol=1e-3).pairs
    assert enough.outcome == "CONVERGED"


def test_pairs_come_in_the_order_of_the_values_that_verified_them() -> None:
    spectrum = torch.cat((torch.linspace(-1, 1, 100), torch.tensor([3.0, 5, 7, 9]))).double()
    other = spectrum.clone()
    other[-4:] = torch.tensor([8.0, 4.0, 6.0, 2.0])
    a, b = matrix(spectrum), matrix(other)  # of the same eigenvectors
    pairs = run(a, 4, "LA", tol=1e-9, exact=lambda v: b @ v).pairs
    assert pairs.eigenvalues.tolist() == pytest.approx([2, 4, 6, 8])
    y = pairs.eigenvectors
    residuals = (y @ b - pairs.eigenvalues[:, None] * y).norm(dim=1)
    torch.testing.assert_close(pairs.residuals, residuals, rtol=1e-4, atol=1e-13)
    assert float(residuals.max()) < 1e-7


def test_without_exact_products_nothing_is_claimed() -> None:
    a = matrix(torch.cat((torch.linspace(-1, 1, 100), torch.tensor([3.0, 5]))).double())
    assert run(a, 2, "LA").pairs.outcome == "CONVERGED"
    pairs = run(a, 2, "LA", tol=1e-6, max_products=300, exact=None).pairs
    assert pairs.outcome == "UNVERIFIED"
    assert len(pairs.error_bounds) == 0
    assert not pairs.completeness.shown
    assert pairs.completeness.margin == math.inf


@pytest.mark.parametrize("tol", [-1e-9, 1.0, 10.0, math.nan, math.inf])
def test_a_tolerance_that_any_vector_meets_is_refused(tol: float) -> None:
    with pytest.raises(ValueError, match="0 <= tol < 1"):
        Eigsh(spec=EigshSpec(k=1, which="LA", tol=tol), max_products=10, num_vectors=5)


def test_what_a_product_returns_is_not_written_to() -> None:
    n = 40
    kept = random(n, seed=1)
    before = kept.clone()
    assert run(lambda v: v, 2, "LA", n=n).pairs.eigenvalues.tolist() == pytest.approx([1, 1])
    assert run(lambda v: v[:], 2, "LA", n=n).pairs.eigenvalues.tolist() == pytest.approx([1, 1])
    results: dict[int, Tensor] = {}
    a = matrix(torch.arange(n).double())

    def cached(v: Tensor) -> Tensor:
        key = hash(v.numpy().tobytes())
        if key not in results:
            results[key] = a @ v
            results[-key - 1] = results[key].clone()
        return results[key]

    run(cached, 3, "LA", n=n)
    assert all(torch.equal(w, results[-key - 1]) for key, w in results.items() if key >= 0)
    assert torch.equal(kept, before)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("at", [1, 4, 9])
def test_an_inner_product_that_is_not_finite_ends_the_run(bad: float, at: int) -> None:
    a = matrix(torch.arange(30).double())
    count = 0

    def matvec(v: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return (a @ v) * (bad if count == at else 1)

    with pytest.raises(CurvatureError, match="NON_FINITE"):
        run(matvec, 2, "LA", n=30, max_products=60, num_vectors=6)


def test_a_basis_is_rotated_exactly_whatever_the_host_has_set() -> None:
    a = matrix(torch.cat((torch.linspace(-1, 1, 200), torch.tensor([3.0, 5]))).double()).float()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        pairs = run(a, 2, "LA", num_vectors=12, tol=1e-5).pairs
        assert torch.get_float32_matmul_precision() == "medium"  # and it is the host's again
    finally:
        torch.set_float32_matmul_precision(before)
    y = pairs.eigenvectors.double()
    assert float((y @ y.T - torch.eye(2)).abs().max()) < 1e-6
