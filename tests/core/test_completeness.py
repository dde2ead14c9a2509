"""What a fresh random start can have overlooked: the bound against dense matrices."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hvp_core.krylov.completeness import Claim, Deflated, Recurrence, hold
from torch import Tensor

from tests.core.spectra import matrix, random


def recurrence(a: Tensor, start: Tensor, steps: int) -> tuple[Recurrence, list[Tensor]]:
    """Lanczos by the book, and its vectors."""
    n = len(a)
    found = Recurrence(n, 0.0)
    vectors = [start / start.norm()]
    for _ in range(steps):
        w = a @ vectors[-1]
        alpha = float(vectors[-1] @ w)
        basis = torch.stack(vectors)
        for _ in range(2):
            w = w - basis.T @ (basis @ w)
        found.append(alpha, float(w.norm()))
        vectors.append(w / w.norm())
    return found, vectors


def test_christoffels_function_is_the_sum_of_the_squared_orthonormal_polynomials() -> None:
    a = matrix(torch.linspace(-1, 2, 40, dtype=torch.float64))
    found, _ = recurrence(a, random(40), 6)
    # p(A) start is a Krylov vector: each polynomial is fixed by its values on the eigenvalues.
    values, u = torch.linalg.eigh(a)
    start = random(40) / random(40).norm()
    weights = (u.T @ start).square().numpy()
    t = 2.3
    total = 0.0
    polynomials: list[tuple[np.ndarray, float]] = []
    for degree in range(7):
        p = np.polynomial.Polynomial.fromroots([0.3] * degree) if degree else None
        at = np.ones(40) if p is None else p(values.numpy())
        here = 1.0 if p is None else float(p(t))
        for other, beyond in polynomials:
            overlap = float((weights * other * at).sum())
            at, here = at - overlap * other, here - overlap * beyond
        norm = math.sqrt(float((weights * at * at).sum()))
        polynomials.append((at / norm, here / norm))
        total += (here / norm) ** 2
    assert found.reaches(t, total * (1 - 1e-9))
    assert not found.reaches(t, total * (1 + 1e-9))


@pytest.mark.parametrize("steps", [3, 8, 15])
def test_the_weight_of_every_eigenvector_beyond_the_ritz_values_is_below_christoffels_bound(
    steps: int,
) -> None:
    spectrum = torch.cat((torch.linspace(-1, 1, 50), torch.tensor([1.5]))).double()
    a = matrix(spectrum)
    outlier = torch.linalg.eigh(a)[1][:, -1]
    for seed in range(20):
        # The outlier hardly shows in the start: otherwise a Ritz value finds it at once.
        start = random(51, seed=seed)
        start = start - outlier * (outlier @ start) * (1 - 10.0 ** (-0.6 * steps))
        found, vectors = recurrence(a, start, steps)
        weight = float(outlier @ vectors[0]) ** 2
        if not found.has_beyond(1.5):
            assert not found.reaches(1.5, 1 / weight * (1 + 1e-6))


def test_a_start_overlooks_an_eigenvalue_no_more_often_than_the_bound_says() -> None:
    n, failure, steps = 60, 0.2, 7
    a = torch.diag(torch.cat((torch.linspace(-1, 1, n - 1), torch.tensor([1.2]))).double())
    misses = sum(
        recurrence(a, random(n, seed=seed), steps)[0].bound(failure) < 1.2 for seed in range(400)
    )
    # Binomial: 400 tries of at most 0.2 are above 112 with probability 1e-5.
    assert misses <= 112


def test_the_bound_comes_down_to_the_largest_eigenvalue() -> None:
    spectrum = torch.linspace(-1, 1, 80, dtype=torch.float64)
    a = matrix(spectrum)
    bounds = [recurrence(a, random(80), steps)[0].bound(1e-3) for steps in (4, 20, 40, 70)]
    assert bounds == sorted(bounds, reverse=True)
    assert 1 <= bounds[-1] < 1.0001


@pytest.mark.parametrize("sign", [1, -1])
def test_counts_of_a_deflated_operator_hold_for_the_operator_itself(sign: int) -> None:
    generator = torch.Generator().manual_seed(3)
    for _ in range(50):
        n, r = 30, 6
        a = torch.randn(n, n, generator=generator, dtype=torch.float64)
        a = sign * (a + a.T) / 2
        noisy = torch.linalg.eigh(a)[1][:, -r:] + 0.05 * torch.randn(
            n, r, generator=generator, dtype=torch.float64
        )
        q, _ = torch.linalg.qr(noisy)
        p = torch.eye(n, dtype=torch.float64) - q @ q.T
        u, s, v = torch.linalg.svd(p @ a @ q, full_matrices=False)
        del u
        deflated = Deflated(q.T @ a @ q, s[:, None] * v)
        left = float(torch.linalg.eigvalsh(p @ a @ p)[-1])
        for t in torch.linspace(left + 0.05, left + 6, 40).tolist():
            true = int((torch.linalg.eigvalsh(a) > t).sum())
            assert true <= deflated.most_beyond(t, left)


def test_a_claim_holds_only_beyond_the_bound() -> None:
    nothing = Deflated(torch.zeros(0, 0).double(), torch.zeros(0, 0).double())
    assert hold([Claim(2.0, 0)], nothing, 1.0)
    assert not hold([Claim(2.0, 0)], nothing, 2.0)
    assert not hold([Claim(2.0, 0), Claim(0.5, 3)], nothing, 1.0)
    one = Deflated(torch.tensor([[3.0]]).double(), torch.zeros(0, 1).double())
    assert not hold([Claim(2.0, 0)], one, 1.0)
    assert hold([Claim(2.0, 1)], one, 1.0)
