"""Symmetric matrices of prescribed spectrum, and Lanczos runs on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from hvp_core.krylov.lanczos import Eigsh
from hvp_core.runs.algorithm import Advance, drive
from hvp_operations.certificates import Completeness, Outcome
from hvp_operations.checking import Seed
from hvp_operations.eigsh import EigshResult, EigshSpec, Which
from torch import Tensor

from tests.core.dense import DenseOperator, DenseSpace


def matrix(spectrum: Tensor, seed: int = 0) -> Tensor:
    """A float64 matrix with these eigenvalues and random eigenvectors."""
    generator = torch.Generator().manual_seed(seed)
    n = len(spectrum)
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return q @ torch.diag(spectrum) @ q.T


def random(n: int, dtype: torch.dtype = torch.float64, seed: int = 7) -> Tensor:
    return DenseSpace(n, dtype).random(seed, "gaussian")


class Pairs:
    """What a run has found, as tensors.

    Attributes:
        eigenvectors: (k, n) rows.
        result: The rest, as it is declared.
    """

    def __init__(self, result: EigshResult, eigenvectors: Tensor):
        self.result, self.eigenvectors = result, eigenvectors
        self.outcome: Outcome = result.outcome
        self.completeness: Completeness = result.completeness
        self.num_products, self.symmetry_defect = result.num_products, result.symmetry_defect
        self.eigenvalues, self.residuals, self.error_bounds, self.ritz_values, self.ritz_weights = (
            torch.tensor(each, dtype=torch.float64)
            for each in (
                result.eigenvalues,
                result.residuals,
                result.error_bounds,
                result.ritz_values,
                result.ritz_weights,
            )
        )

    @property
    def converged(self) -> bool:
        """Every pair meets the tolerance and none was missed."""
        return self.outcome == "CONVERGED"


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        pairs: What it found.
        reported: After each product.
        count: Of products with the operator, from outside.
    """

    pairs: Pairs
    reported: list[Advance]
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
    exact: Callable[[Tensor], Tensor] | str | None = "itself",
    block_size: int = 1,
    starts: Sequence[Tensor] = (),
    method: Literal["lanczos", "two_pass"] = "lanczos",
) -> Run:
    """Find eigenpairs of a matrix, or of a function on vectors of length n."""
    space = DenseSpace(len(a), a.dtype) if isinstance(a, Tensor) else DenseSpace(n, dtype)
    operator = DenseOperator(a, space, semidefinite=semidefinite, exact=exact)
    algorithm = Eigsh(
        spec=EigshSpec(k=k, which=which, tol=tol, seed=Seed(seed), block_size=block_size),
        max_products=max_products,
        num_vectors=min(num_vectors, space.n),
        starts=starts,
        method=method,
    )
    reported: list[Advance] = []
    found = drive(algorithm, operator, reported.append)
    pairs = Pairs(found.result, torch.stack(list(found.vectors)))
    return Run(pairs, reported, operator.count)
