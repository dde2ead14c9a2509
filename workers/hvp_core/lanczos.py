"""Extremal eigenpairs of a symmetric operator from its products: thick-restart Lanczos.

Wu and Simon, "Thick-restart Lanczos method for large symmetric eigenvalue problems", SIAM J. Matrix
Anal. Appl. 22 (2000), with full reorthogonalisation, twice ("twice is enough": Parlett, "The
Symmetric Eigenvalue Problem", section 6.9). The projected matrix T, its coefficients and all inner
products are float64; only the basis is in the operator's dtype. Nothing here knows of models or
ranks: the operator is a function, and a vector is whatever part of it this process holds.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

Which = Literal["LA", "SA", "LM", "BE"]
Stage = Literal["iterating", "verifying"]
Spectrum = tuple[Tensor, Tensor]  # eigenvalues (m,), eigenvectors (m, m) of T, float64

_ROTATED = 1 << 16  # columns of the basis rotated at once: a few MiB of working memory
#: eps to this power is what rounding leaves of a vector that should vanish, relative to ‖T‖: 1e-6
#: in float32, 5e-14 in float64. A smaller β means that the Krylov space is exhausted.
_ROUNDING_POWER = 0.85
#: A residual is trusted to this many of them.
_TRUSTED = 10


@final
@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to look for and what it may cost.

    Attributes:
        k: Number of eigenpairs, 1 <= k < n, or k = n.
        which: LA, SA, LM or BE, as in SciPy.
        tol: Stop when each residual estimate is at most tol · max |θ|; 0 means rounding.
        max_products: Upper bound on products, the k of the verification included; at least 2k.
        num_vectors: Rows of the basis, k < num_vectors <= n (k = num_vectors only where k = n).
    """

    k: int
    which: Which
    tol: float
    max_products: int
    num_vectors: int


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
class Eigenpairs:
    """The result, ascending."""

    eigenvalues: Tensor  # (k,) float64
    eigenvectors: Tensor  # (k, local) rows, orthonormal
    residuals: Tensor  # (k,) float64, ‖Ay − θy‖ from fresh products
    num_products: int
    converged: bool
    symmetry_defect: float  # largest |u·Av − v·Au| / ‖Av‖ met between basis vectors
    ritz_values: Tensor  # (m,) float64 of the first basis, before any restart
    ritz_weights: Tensor  # (m,) squared overlaps with the starting vector; they sum to one


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


def eigsh(
    matvec: Callable[[Tensor], Tensor],
    start: Tensor,
    dimension: int,
    plan: Plan,
    *,
    dots: Callable[[Tensor, Tensor], Tensor],
    random: Callable[[int], Tensor],
    agree: Callable[[Spectrum], Spectrum] = lambda spectrum: spectrum,
) -> Generator[Progress, None, Eigenpairs]:
    """Run Lanczos as a generator: it yields after every product and returns the eigenpairs.

    One starting vector sees one copy of a repeated eigenvalue. When the Krylov space is exhausted
    (β = 0), the run goes on from a random vector orthogonal to it and fills its basis before it may
    stop, so that copies are found with their true multiplicity and never as ghosts; a loose
    tolerance may end the run before the space is exhausted, with one copy of each.

    Args:
        matvec: v -> Av, on what this process holds of a vector, (local,).
        start: Starting vector (local,), not zero.
        dimension: n, the length of a whole vector.
        plan: What to find.
        dots: (rows (m, local), vector (local,)) -> inner products (m,) float64 of whole vectors.
        random: seed -> a random vector (local,).
        agree: One answer from those of all processes: two machines may solve the same small
            eigenproblem with other signs, and each would rotate its part of the basis its own way.

    Yields:
        Progress after every product.

    Returns:
        The pairs; `converged` tells whether every true residual meets the tolerance, or rounding.

    Cost: at most plan.max_products products, and 4 m n multiplications for orthogonality in each;
    (num_vectors + 1) vectors of memory.
    """
    krylov = _Krylov(matvec, start, dimension, plan, dots, random, agree)
    yield from krylov.iterate()
    return (yield from krylov.verify())


@final
class _Krylov:
    """The basis and its projected matrix: A Vᵀ = Vᵀ T + β v_{m+1} eᵀ, with the v as rows of V."""

    def __init__(
        self,
        matvec: Callable[[Tensor], Tensor],
        start: Tensor,
        dimension: int,
        plan: Plan,
        dots: Callable[[Tensor, Tensor], Tensor],
        random: Callable[[int], Tensor],
        agree: Callable[[Spectrum], Spectrum],
    ):
        self.matvec, self.dots, self.random, self.agree = matvec, dots, random, agree
        self.dimension, self.plan = dimension, plan
        m = plan.num_vectors
        self.basis = start.new_empty(m + 1, start.numel())  # (m + 1, local) orthonormal rows
        self.T = torch.zeros(m + 1, m + 1, dtype=torch.float64)
        self.eps = torch.finfo(start.dtype).eps
        self.rounding = self.eps**_ROUNDING_POWER
        norm = float(dots(start.unsqueeze(0), start)[0]) ** 0.5
        torch.div(start, norm, out=self.basis[0])
        self.size = 0  # rows of the basis whose products are known
        self.num_products = 0
        self.num_restarts = 0
        self.num_fresh_starts = 0
        self.symmetry_defect = 0.0
        self.first_ritz: tuple[Tensor, Tensor] | None = None
        self._solve()

    def _solve(self) -> None:
        """Ritz values and T's eigenvectors for the current size."""
        values, vectors = torch.linalg.eigh(self.T[: self.size, : self.size])
        self.values, self.vectors = self.agree((values, vectors))

    @property
    def beta(self) -> float:
        """Coupling of the last basis vector to the next one."""
        return float(self.T[self.size, self.size - 1])

    @property
    def estimates(self) -> Tensor:
        """Residual norms of all Ritz pairs, in exact arithmetic."""
        last: Tensor = self.vectors[self.size - 1]
        return last.abs().mul_(self.beta)

    @property
    def scale(self) -> float:
        """Max |θ|: the operator's norm as far as it is known."""
        return float(self.values.abs().max())

    def tolerance(self, rounding: float) -> float:
        """The largest residual that counts as converged."""
        return max(self.plan.tol, rounding) * self.scale

    def progress(self, stage: Stage) -> Progress:
        index = wanted(self.values, self.plan.k, self.plan.which)
        return Progress(
            stage=stage,
            num_products=self.num_products,
            num_restarts=self.num_restarts,
            ritz_values=tuple(self.values[index].tolist()),
            residual_estimates=tuple(self.estimates[index].tolist()),
        )

    def iterate(self) -> Generator[Progress, None, None]:
        """Extend and restart until the wanted pairs have converged or the budget is spent."""
        m, k = self.plan.num_vectors, self.plan.k
        budget = self.plan.max_products - k
        exhausted = False
        while True:
            exhausted |= self._extend()
            full = self.size == m
            whole = self.size == self.dimension
            yield self.progress("iterating")
            if whole or self.num_products >= budget:
                break
            # A basis that can hold the whole space is filled: then no copy is missed.
            if self.size >= k and m < self.dimension and (full or not exhausted):
                index = wanted(self.values, k, self.plan.which)
                if bool((self.estimates[index] <= self.tolerance(4 * self.eps)).all()):
                    break
            if full:
                self._restart()
                exhausted = False
        self._keep_first_ritz()

    def _extend(self) -> bool:
        """One product and one new basis vector; true when the Krylov space was exhausted."""
        j = self.size
        w = self.matvec(self.basis[j])
        self.num_products += 1
        known = self.basis[: j + 1]
        first = self.dots(known, w)
        norm = float(self.dots(w.unsqueeze(0), w)[0]) ** 0.5
        self._subtract(w, known, first)
        second = self.dots(known, w)
        self._subtract(w, known, second)
        self.T[j, j] = first[j] + second[j]
        if norm > 0 and j > 0:
            defect = float((first[:j] - self.T[:j, j]).abs().max()) / norm
            self.symmetry_defect = max(self.symmetry_defect, defect)
        self.size = j + 1
        beta = float(self.dots(w.unsqueeze(0), w)[0]) ** 0.5
        size = max(float(self.T[: j + 1, : j + 1].abs().sum(0).max()), beta)  # at least ‖T‖
        exhausted = beta <= self.rounding * size or self.size == self.dimension
        if exhausted:
            beta = 0.0
            if self.size < self.dimension:
                self._fresh_start()
        else:
            torch.div(w, beta, out=self.basis[j + 1])
        self.T[j, j + 1] = self.T[j + 1, j] = beta
        self._solve()
        return exhausted

    def _subtract(self, w: Tensor, rows: Tensor, coefficients: Tensor) -> None:
        w.addmv_(rows.T, coefficients.to(w), alpha=-1)

    def _fresh_start(self) -> None:
        """The next basis vector: random, orthogonal to all so far."""
        known = self.basis[: self.size]
        while True:
            self.num_fresh_starts += 1
            w = self.random(self.num_fresh_starts)
            for _ in range(3):
                w /= float(self.dots(w.unsqueeze(0), w)[0]) ** 0.5
                self._subtract(w, known, self.dots(known, w))
            norm = float(self.dots(w.unsqueeze(0), w)[0]) ** 0.5
            if norm > 0.5:  # it kept its length through the last pass: orthogonal to rounding
                torch.div(w, norm, out=self.basis[self.size])
                return

    def _keep_first_ritz(self) -> None:
        if self.first_ritz is None:
            self.first_ritz = (self.values.clone(), self.vectors[0].square())

    def _restart(self) -> None:
        """Compress the basis to the wanted Ritz vectors and as many more as half the rest."""
        self._keep_first_ritz()
        m, k = self.plan.num_vectors, self.plan.k
        keep = min(k + (m - k) // 2, m - 1)
        index = wanted(self.values, keep, self.plan.which)
        coupling = self.beta * self.vectors[m - 1, index]
        self._rotate(self.vectors[:, index])
        self.basis[keep] = self.basis[m]
        self.T.zero_()
        self.T[range(keep), range(keep)] = self.values[index]
        self.T[keep, :keep] = self.T[:keep, keep] = coupling
        self.size = keep
        self.num_restarts += 1

    def _rotate(self, vectors: Tensor) -> None:
        """basis[:r] = vectorsᵀ @ basis, in place. vectors: (size, r) float64."""
        rotation = vectors.T.to(self.basis)
        rows = self.basis[: vectors.shape[0]]
        for start in range(0, rows.shape[1], _ROTATED):
            part = rows[:, start : start + _ROTATED]
            part[: rotation.shape[0]] = rotation @ part

    def verify(self) -> Generator[Progress, None, Eigenpairs]:
        """Rayleigh-Ritz vectors and their true residuals, one fresh product each."""
        index = wanted(self.values, self.plan.k, self.plan.which)
        estimates = self.progress("verifying")
        values = self.values[index]
        self._rotate(self.vectors[:, index])
        vectors = self.basis[: len(index)]
        residuals = torch.zeros(len(index), dtype=torch.float64)
        for i, value in enumerate(values.tolist()):
            w = self.matvec(vectors[i])
            self.num_products += 1
            w.add_(vectors[i], alpha=-value)
            residuals[i] = float(self.dots(w.unsqueeze(0), w)[0]) ** 0.5
            yield Progress(
                stage="verifying",
                num_products=self.num_products,
                num_restarts=self.num_restarts,
                ritz_values=estimates.ritz_values,
                residual_estimates=estimates.residual_estimates,
            )
        assert self.first_ritz is not None
        return Eigenpairs(
            eigenvalues=values,
            eigenvectors=vectors,
            residuals=residuals,
            num_products=self.num_products,
            converged=bool((residuals <= self.tolerance(_TRUSTED * self.rounding)).all()),
            symmetry_defect=self.symmetry_defect,
            ritz_values=self.first_ritz[0],
            ritz_weights=self.first_ritz[1],
        )
