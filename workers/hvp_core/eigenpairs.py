"""What a search for extremal eigenpairs is asked for, tells on its way, and finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

Which = Literal["LA", "SA", "LM", "BE"]
Stage = Literal["iterating", "completeness", "verifying"]
Outcome = Literal[
    "CONVERGED", "MAX_PRODUCTS", "MULTIPLICITY_UNCERTAIN", "NOISE_LIMIT", "UNVERIFIED"
]


@final
@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to look for and what it may cost.

    Attributes:
        k: Number of eigenpairs, 1 <= k < n, or k = n.
        which: LA, SA, LM or BE, as in SciPy.
        tol: Stop when each residual estimate is at most tol · max |θ|, 0 <= tol < 1; 0 means
            rounding.
        max_products: Upper bound on products, the k of the verification included; at least 2k.
        num_vectors: Rows of the basis, k < num_vectors <= n (k = num_vectors only where k = n).
        semidefinite: The operator is known to have no negative eigenvalue.
        noise: Relative error of one product of the search, where that is more than the rounding of
            the vectors' dtype: the search does not try to see below it.

    Raises:
        ValueError: tol is 1 or more: every vector of the space would do.
    """

    k: int
    which: Which
    tol: float
    max_products: int
    num_vectors: int
    semidefinite: bool = False
    noise: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.tol < 1:
            raise ValueError(f"tol is {self.tol}; 0 <= tol < 1 is possible")


@final
@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where the run stands after a product."""

    stage: Stage
    num_products: int
    num_restarts: int
    ritz_values: tuple[float, ...]  # the wanted ones, ascending
    residual_estimates: tuple[float, ...]  # |β s| for each


@final
@dataclass(frozen=True, kw_only=True)
class Completeness:
    """What is known of eigenvalues that the pairs do not show.

    Attributes:
        shown: With the i-th wanted eigenvalue at most `margin` further out than the i-th of the
            pairs, counted from its end: none was missed.
        margin: In units of the eigenvalues: the tolerance, and the search's own noise.
        failure_probability: That `shown` is wrong, by bad luck of the random starts; 0 where the
            basis spans the whole space.
        num_products: Spent on it.
    """

    shown: bool
    margin: float
    failure_probability: float
    num_products: int


@final
@dataclass(frozen=True, kw_only=True)
class Eigenpairs:
    """The result, ascending."""

    eigenvalues: Tensor  # (k,) float64, Rayleigh quotients of the verifying products
    eigenvectors: Tensor  # (k, local) rows, orthonormal
    residuals: Tensor  # (k,) float64, ‖Ay − θy‖ / ‖y‖ from the verifying products
    #: (k,) float64: [θ − bound, θ + bound] holds an eigenvalue of A; (0,) where nothing is claimed.
    error_bounds: Tensor
    num_products: int
    outcome: Outcome
    completeness: Completeness
    symmetry_defect: float  # largest |u·Av − v·Au| / ‖Av‖ met between basis vectors
    ritz_values: Tensor  # (m,) float64 of the first basis, before any restart
    ritz_weights: Tensor  # (m,) squared overlaps with the starting vector; they sum to one

    @property
    def converged(self) -> bool:
        """Every pair meets the tolerance and none was missed."""
        return self.outcome == "CONVERGED"


def wanted(values: Tensor, k: int, which: Which) -> Tensor:
    """Indices of the k wanted among ascending values, ascending."""
    m = len(values)
    k = min(k, m)
    if which == "LA":
        return torch.arange(m - k, m)
    if which == "SA":
        return torch.arange(k)
    if which == "LM":
        return values.abs().argsort(descending=True)[:k].sort().values
    low = k // 2
    return torch.cat((torch.arange(low), torch.arange(m - (k - low), m)))
