"""Lanczos against dense matrices of prescribed spectrum, and against SciPy."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import scipy.sparse.linalg
import torch
from hvp_core.krylov.lanczos_state import wanted
from hvp_operations.eigsh import Which
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.core.spectra import matrix, random, run

SPECTRUM = torch.cat(
    (torch.tensor([-9.0, -4.0, -2.5]), torch.linspace(-1, 1, 100), torch.tensor([3.0, 5.0, 11.0]))
).double()


@pytest.mark.parametrize(
    ("which", "k"),
    # SciPy's BE starts at two.
    [(w, k) for w in ("LA", "SA", "LM", "BE") for k in (1, 2, 5, 6) if (w, k) != ("BE", 1)],
)
def test_it_finds_what_scipy_finds(which: Which, k: int) -> None:
    a = matrix(SPECTRUM)
    pairs = run(a, k, which).pairs
    expected = np.sort(scipy.sparse.linalg.eigsh(a.numpy(), k=k, which=which)[0])
    np.testing.assert_allclose(pairs.eigenvalues.numpy(), expected, rtol=0, atol=1e-11)
    assert pairs.converged


def test_the_pairs_are_orthonormal_and_their_residuals_are_the_true_ones() -> None:
    a = matrix(SPECTRUM)
    pairs = run(a, 6, "BE", tol=1e-3).pairs
    y = pairs.eigenvectors
    torch.testing.assert_close(y @ y.T, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-13)
    true = (y @ a - pairs.eigenvalues[:, None] * y).norm(dim=1)
    torch.testing.assert_close(pairs.residuals, true, rtol=1e-6, atol=1e-13)
    assert float(pairs.residuals.max()) <= 1e-3 * 11


def test_without_a_restart_basis_and_coefficients_are_those_of_dense_lanczos() -> None:
    a = matrix(SPECTRUM)
    steps = 12
    start = random(len(a))
    hessenberg = scipy.linalg.hessenberg(_start_first(a, start).numpy())
    diagonal = torch.from_numpy(np.diag(hessenberg)[:steps].copy())
    off = torch.from_numpy(np.abs(np.diag(hessenberg, -1)[: steps - 1]))
    t = torch.diag(diagonal) + torch.diag(off, 1) + torch.diag(off, -1)
    expected, vectors = torch.linalg.eigh(t)
    pairs = run(a, 1, "LA", tol=1e-300, num_vectors=steps, max_products=steps + 1).pairs
    torch.testing.assert_close(pairs.ritz_values, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(pairs.ritz_weights, vectors[0].square(), rtol=0, atol=1e-12)


def _start_first(a: Tensor, start: Tensor) -> Tensor:
    """The same matrix in a basis whose first vector is the starting one."""
    n = len(a)
    q, r = torch.linalg.qr(torch.cat((start[:, None], torch.eye(n)[:, : n - 1].double()), 1))
    q = q * torch.sign(torch.diag(r))
    return q.T @ a @ q


def test_ritz_weights_are_a_quadrature_exact_for_low_moments() -> None:
    a = matrix(SPECTRUM)
    pairs = run(a, 1, "LA", tol=1e-300, num_vectors=10, max_products=11).pairs
    v = random(len(a))
    v /= v.norm()
    moment = v
    for degree in range(20):
        quadrature = float((pairs.ritz_weights * pairs.ritz_values**degree).sum())
        assert quadrature == pytest.approx(float(v @ moment), rel=1e-9, abs=1e-9)
        moment = a @ moment
    assert float(pairs.ritz_weights.sum()) == pytest.approx(1, abs=1e-14)


@pytest.mark.parametrize("copies", [1, 2, 7])
def test_a_two_valued_spectrum_shows_each_value_as_often_as_it_is_there(copies: int) -> None:
    n = 30
    spectrum = torch.full((n,), 1.0, dtype=torch.float64)
    spectrum[:copies] = 5.0
    pairs = run(matrix(spectrum), 5, "LA").pairs
    expected = [5.0] * min(copies, 5) + [1.0] * (5 - min(copies, 5))
    torch.testing.assert_close(
        pairs.eigenvalues, torch.tensor(sorted(expected)).double(), rtol=0, atol=1e-12
    )
    assert float(pairs.residuals.max()) < 1e-12


def test_a_dominant_value_does_not_come_back_as_a_ghost() -> None:
    spectrum = torch.cat((torch.tensor([1e6]), torch.linspace(0, 1, 150))).double()
    pairs = run(matrix(spectrum), 3, "LA", num_vectors=60).pairs
    assert float(pairs.eigenvalues[-1]) == pytest.approx(1e6, rel=1e-12)
    assert float(pairs.eigenvalues[-2]) < 1.001
    assert int((pairs.ritz_values > 2).sum()) == 1


def test_the_zero_matrix_has_zero_eigenvalues() -> None:
    pairs = run(torch.zeros(12, 12, dtype=torch.float64), 3, "LM").pairs
    assert pairs.eigenvalues.tolist() == [0, 0, 0]
    assert float(pairs.residuals.max()) == 0


@pytest.mark.parametrize("n", [2, 3, 5])
def test_tiny_matrices_are_solved_exactly(n: int) -> None:
    a = matrix(torch.arange(n).double())
    found = run(a, n - 1, "SA")
    pairs, count = found.pairs, found.count
    torch.testing.assert_close(pairs.eigenvalues, torch.arange(n - 1).double(), rtol=0, atol=1e-13)
    assert count == n + (n - 1)


@pytest.mark.parametrize("which", ["LA", "SA", "LM", "BE"])
@pytest.mark.parametrize(
    "spectrum", [[3.0], [-2.0], [0.0], [1.0, 1.0], [0.0] * 12, [1.0] * 25 + [5.0] * 5]
)
def test_all_eigenvalues_can_be_asked_for(spectrum: list[float], which: Which) -> None:
    n = len(spectrum)
    found = run(matrix(torch.tensor(spectrum).double()), n, which)
    np.testing.assert_allclose(found.pairs.eigenvalues.numpy(), spectrum, rtol=0, atol=1e-13)
    assert found.pairs.converged
    assert found.pairs.completeness.failure_probability == 0
    assert found.count == 2 * n  # a product for each row of the basis, and one to verify each pair


def test_every_product_is_counted_and_reported() -> None:
    found = run(matrix(SPECTRUM), 4, "BE")
    pairs, reported, count = found.pairs, found.reported, found.count
    assert pairs.num_products == count == len(reported)
    assert [each.num_products for each in reported] == list(range(1, count + 1))
    assert [each.stage for each in reported[-4:]] == ["verifying"] * 4


def test_the_budget_is_kept_and_an_unfinished_run_says_so() -> None:
    found = run(matrix(SPECTRUM), 4, "SA", max_products=14)
    pairs, count = found.pairs, found.count
    assert count == 14
    assert not pairs.converged
    assert float(pairs.residuals.max()) > 1e-6


def test_restarts_reach_what_a_short_basis_could_not() -> None:
    a = matrix(torch.cat((torch.linspace(0, 1, 300), torch.tensor([1.05, 1.1]))).double())
    found = run(a, 2, "LA", num_vectors=12, max_products=1000)
    pairs, reported = found.pairs, found.reported
    assert reported[-1].detail.num_restarts > 2
    assert pairs.converged
    torch.testing.assert_close(
        pairs.eigenvalues, torch.tensor([1.05, 1.1]).double(), rtol=0, atol=1e-10
    )


def test_estimates_are_the_true_residuals_before_rounding() -> None:
    a = matrix(SPECTRUM)
    found = run(a, 2, "BE", tol=1e-300, num_vectors=30, max_products=14)
    np.testing.assert_allclose(
        found.reported[-1].detail.residual_estimates,
        found.pairs.residuals.numpy(),
        rtol=1e-6,
        atol=1e-10,
    )


def test_after_a_fresh_start_estimates_are_not_below_the_true_residuals() -> None:
    a = matrix(SPECTRUM)
    found = run(a, 2, "BE", tol=1e-2, num_vectors=30)
    estimates = np.array(found.reported[-1].detail.residual_estimates)
    true = found.pairs.residuals.numpy()
    assert (true <= estimates * (1 + 1e-6)).all()
    assert (estimates <= 2 * true).all()


def test_float32_finds_the_values_to_its_rounding() -> None:
    a = matrix(SPECTRUM)
    pairs = run(a.float(), 6, "BE").pairs
    expected = torch.cat((SPECTRUM[:3], SPECTRUM[-3:]))
    torch.testing.assert_close(pairs.eigenvalues, expected, rtol=0, atol=2e-5)


def test_an_operator_that_is_not_symmetric_shows_in_the_defect() -> None:
    a = matrix(SPECTRUM)
    skew = torch.zeros_like(a)
    skew[0, 1], skew[1, 0] = 0.5, -0.5
    assert run(a, 2, "LA").pairs.symmetry_defect < 1e-13
    assert run(a + skew, 2, "LA", max_products=30).pairs.symmetry_defect > 1e-4


@settings(max_examples=30, deadline=None)
@given(
    # Hundredths: squares of numbers below 1e-154 are zero, and so would be every norm.
    values=st.lists(st.integers(-10000, 10000).map(lambda i: i / 100), min_size=3, max_size=30),
    k=st.integers(1, 8),
    which=st.sampled_from(["LA", "SA", "LM", "BE"]),
)
def test_any_spectrum_gives_pairs_of_that_spectrum(
    values: list[float], k: int, which: Which
) -> None:
    spectrum = torch.tensor(sorted(values), dtype=torch.float64)
    k = min(k, len(values) - 1)
    pairs = run(matrix(spectrum), k, which).pairs
    expected = spectrum[wanted(spectrum, k, which)]
    scale = max(1e-300, float(spectrum.abs().max()))
    if which == "LM":  # a tie in magnitude may go either way
        assert torch.allclose(
            pairs.eigenvalues.abs().sort().values,
            expected.abs().sort().values,
            rtol=0,
            atol=1e-10 * scale,
        )
    else:
        torch.testing.assert_close(pairs.eigenvalues, expected, rtol=0, atol=1e-10 * scale)
