"""Symmetric matrices of prescribed spectrum, and Lanczos runs on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from hvp_core.eigenpairs import Eigenpairs, Plan, Progress, Which
from hvp_core.lanczos import eigsh
from torch import Tensor


def matrix(spectrum: Tensor, seed: int = 0) -> Tensor:
    """A float64 matrix with these eigenvalues and random eigenvectors."""
    generator = torch.Generator().manual_seed(seed)
    n = len(spectrum)
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return q @ torch.diag(spectrum) @ q.T


def random(n: int, dtype: torch.dtype = torch.float64, seed: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, generator=generator, dtype=torch.float64).to(dtype)


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        pairs: What it found.
        reported: After each product.
        count: Of products, from outside.
    """

    pairs: Eigenpairs
    reported: list[Progress]
    count: int


def run(
    a: Tensor | Callable[[Tensor], Tensor],
    k: int,
    which: Which,
    *,
    n: int = 0,
    dtype: torch.dtype = torch.float64,
    tol: float = 0.0,
    max_products: int = 2000,
    num_vectors: int = 40,
    semidefinite: bool = False,
    seed: int = 7,
    exact: Callable[[Tensor], Tensor] | None = None,
) -> Run:
    """Find eigenpairs of a matrix, or of a function on vectors of length n."""
    count = 0
    if isinstance(a, Tensor):
        n, dtype = len(a), a.dtype

    def matvec(v: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return a @ v if isinstance(a, Tensor) else a(v)

    steps = eigsh(
        matvec,
        random(n, dtype, seed),
        n,
        Plan(
            k=k,
            which=which,
            tol=tol,
            max_products=max_products,
            num_vectors=min(num_vectors, n),
            semidefinite=semidefinite,
        ),
        dots=lambda rows, v: rows.double() @ v.double(),
        random=lambda i: random(n, dtype, 1000 * seed + i),
        verifier=None if exact is None else lambda: exact,
    )
    reported = []
    while True:
        try:
            reported.append(next(steps))
        except StopIteration as stop:
            return Run(stop.value, reported, count)
