"""Two orthonormal bases that grow by products with A and with Aᵀ, and A projected to them.

Golub and Kahan, "Calculating the singular values and pseudo-inverse of a matrix", SIAM J. Numer.
Anal. 2 (1965), with both bases kept orthogonal (as `krylov_basis` does for one), and compressed to
Ritz vectors as in Baglama and Reichel, "Augmented implicitly restarted Lanczos bidiagonalization
methods", SIAM J. Sci. Comput. 27 (2005). The coefficients are float64; the singular values of the
projected matrix are those of A to rounding of ‖A‖, which those of AᵀA would not be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, final

import torch
from torch import Tensor

from hvp_core.krylov.krylov_basis import rotate
from hvp_core.krylov.orthogonality import (
    finite_norm,
    orthogonalise,
    part_outside,
    random_outside,
    rounding,
)
from hvp_core.linop.linear_operator import LinearOperator
from hvp_core.runs.algorithm import derived_seed
from hvp_core.runs.snapshot import vectors_of_the_space
from hvp_core.vectors.vector_space import VectorSpace


class Coefficients(NamedTuple):
    """The two coefficients of a step: zero where only rounding is left of a product."""

    alpha: float
    beta: float


@final
@dataclass
class BidiagonalBasis:
    """Rows V and U of two bases with A V = U B and Aᵀ U = V Bᵀ + v_next cᵀ + Σ wᵢ gᵢᵀ.

    Law: `right[:size]` (V) and `left[:size]` (U) are orthonormal, `right[size]` (v_next) is
    orthogonal to V, and B = Uᵀ A V. The wᵢ are unit vectors orthogonal to V that were given up for
    a fresh start. A is no wider than it is tall.

    Attributes:
        right: Vectors of A's domain, (capacity + 1, local); those from `num_right` on hold nothing.
        left: Vectors of A's codomain, (capacity, local).
        B: The projected operator, (capacity, capacity) float64 on the CPU.
        coupling: c, (size,) float64.
        leaks: The gᵢ, (number, size) float64.
        dimension: The length of a whole vector of the domain.
        seed: Seed from which the seeds of all random vectors are derived.
        eps: Relative error of a product: the rounding of the dtype, or more.
        size: Number of vectors of either basis whose products are known.
        num_starts: Number of random vectors that were drawn after the first one.
        adjoint_defect: Largest |u·Av − v·Aᵀu| met, relative to ‖Av‖ or ‖Aᵀu‖.
        is_given: Whether some vectors were given (`settle`), whose products are known to a residual
            only: the law then holds to that, and inner products with theirs show no rounding.
    """

    right: Tensor = field(metadata=vectors_of_the_space("num_right"))
    left: Tensor = field(metadata=vectors_of_the_space("size"))
    B: Tensor
    coupling: Tensor
    leaks: Tensor
    dimension: int
    seed: int
    eps: float
    size: int = 0
    num_starts: int = 0
    adjoint_defect: float = 0.0
    is_given: bool = False

    @classmethod
    def begin(
        cls, domain: VectorSpace, codomain: VectorSpace, capacity: int, seed: int, noise: float
    ) -> BidiagonalBasis:
        """Bases of which only the first right vector is known: a random one, Gaussian.

        Memory: capacity + 1 vectors of the domain and capacity of the codomain.

        Args:
            domain: Space of the right vectors; the smaller of the two.
            codomain: Space of the left vectors.
            capacity: The most vectors of either basis whose products can be known.
            seed: Seed of the first vector, and of fresh starts.
            noise: Relative error of a product, where that is more than the rounding of the dtype.
        """
        start, other = domain.random(derived_seed(seed, 0), "gaussian"), codomain.zeros()
        basis = cls(
            right=start.new_empty(capacity + 1, start.numel()),
            left=other.new_empty(capacity, other.numel()),
            B=torch.zeros(capacity, capacity, dtype=torch.float64),
            coupling=torch.zeros(0, dtype=torch.float64),
            leaks=torch.zeros(0, 0, dtype=torch.float64),
            dimension=domain.dimension,
            seed=seed,
            eps=max(torch.finfo(start.dtype).eps, noise),
        )
        torch.div(start, finite_norm(domain, start), out=basis.right[0])
        return basis

    def settle(
        self,
        domain: VectorSpace,
        values: Sequence[float],
        left: Sequence[Tensor],
        right: Sequence[Tensor],
        start: Tensor | None,
    ) -> None:
        """Take known singular triplets for the first vectors, without a product.

        Args:
            domain: Space of the right vectors.
            values: Their values, fewer than the domain has dimensions.
            left: Left singular vectors, orthonormal, (local,) each.
            right: Right ones, likewise.
            start: The next right vector, in the place of a random one, (local,), read only.

        Raises:
            CurvatureError: NON_FINITE.
        """
        r = len(values)
        for index in range(r):
            self.left[index], self.right[index] = left[index], right[index]
        self.B[range(r), range(r)] = torch.tensor(values, dtype=torch.float64)
        self.size, self.is_given = r, r > 0
        self.coupling = torch.zeros(r, dtype=torch.float64)
        self.leaks = torch.zeros(0, r, dtype=torch.float64)
        part = None if start is None else part_outside(domain, self.right[:r], start)
        self.right[r] = self._random(domain, self.right[:r]) if part is None else part

    @property
    def num_right(self) -> int:
        """Number of right rows that hold a vector: those with a product, and the next one."""
        return self.size + 1

    @property
    def rounding(self) -> float:
        """The norm that rounding leaves of a vector that should vanish, relative to ‖A‖."""
        return rounding(self.eps)

    @property
    def full(self) -> bool:
        """Whether there is no room for another step."""
        return self.size == len(self.B)

    @property
    def whole(self) -> bool:
        """Whether the right vectors span their whole space."""
        return self.size == self.dimension

    def triplets(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ritz values (size,), descending, and their coefficients (size, size) in U and in V."""
        left, values, right = torch.linalg.svd(self.B[: self.size, : self.size])
        return values, left, right.T

    def residuals(self, left: Tensor) -> Tensor:
        """Norms ‖Aᵀu − σv‖, or a little more, of Ritz triplets by their coefficients (size, r)."""
        return (self.coupling @ left).abs() + (self.leaks @ left).abs().sum(0)

    def extend(self, operator: LinearOperator) -> Coefficients:
        """Make a step: a product with A and one with Aᵀ. Cost: 8 m n multiplications besides.

        A coefficient is zero where only rounding is left of the product. For α = 0 the new left
        vector is a random one; for β = 0 the next right vector is not chosen yet (see
        `start_afresh`).

        Args:
            operator: A.

        Raises:
            CurvatureError: NON_FINITE.
        """
        alpha = self._to_left(operator)
        beta = self._to_right(operator, alpha)
        self.leaks = torch.cat((self.leaks, self.leaks.new_zeros(len(self.leaks), 1)), 1)
        self.coupling = torch.zeros(self.size, dtype=torch.float64)
        self.coupling[-1] = beta
        return Coefficients(alpha, beta)

    def _to_left(self, operator: LinearOperator) -> float:
        """The product with the newest right vector, and the left vector that is new in it."""
        space, j = operator.codomain, self.size
        (w,) = operator.apply([self.right[j]], borrow=True)
        norm = finite_norm(space, w)
        first, second = orthogonalise(space, self.left[:j], w, out=self.left[j])
        self.B[:j, j] = first + second
        # Where a vector leaks, its part along a fresh start was not known before.
        if not len(self.leaks):
            self._note((first - self.coupling).abs(), norm)
        alpha = finite_norm(space, self.left[j])
        if alpha <= self.rounding * max(self._norm(), alpha):
            alpha = 0.0
            self.left[j] = self._random(space, self.left[:j])
        else:
            self.left[j].div_(alpha)
        self.B[j, j] = alpha
        self.size = j + 1
        return alpha

    def _to_right(self, operator: LinearOperator, alpha: float) -> float:
        """The product of Aᵀ with the newest left vector, and the next right vector."""
        space, size = operator.domain, self.size
        (w,) = operator.apply_transposed([self.left[size - 1]], borrow=True)
        norm = finite_norm(space, w)
        first, _ = orthogonalise(space, self.right[:size], w, out=self.right[size])
        self._note((first - self.B[size - 1, :size]).abs(), norm)
        beta = finite_norm(space, self.right[size])
        if self.whole or beta <= self.rounding * max(self._norm(), beta):
            return 0.0
        self.right[size].div_(beta)
        return beta

    def _norm(self) -> float:
        """‖A‖ as far as the projection shows it, or less."""
        known = self.B[: self.size, : self.size]
        norms = (self.coupling.norm(), known.norm(dim=0).amax() if self.size else torch.zeros(()))
        return float(max(norms))

    def _note(self, defects: Tensor, norm: float) -> None:
        """Note how far inner products with a product differ from what they should be."""
        # Of a product that is rounding alone, every part is.
        if not self.is_given and len(defects) and norm > self.rounding * self._norm():
            self.adjoint_defect = max(self.adjoint_defect, float(defects.max()) / norm)

    def _random(self, space: VectorSpace, known: Tensor) -> Tensor:
        self.num_starts += 1
        vector, drawn = random_outside(
            space,
            known,
            lambda index: space.random(derived_seed(self.seed, index), "gaussian"),
            self.num_starts,
        )
        self.num_starts = drawn
        return vector

    def start_afresh(self, domain: VectorSpace) -> None:
        """Give up the next right vector for a random one, orthogonal to all right vectors.

        Args:
            domain: Space of the right vectors.

        Raises:
            CurvatureError: NON_FINITE.
        """
        if float(self.coupling.norm()) > 0:
            self.leaks = torch.cat((self.leaks, self.coupling[None]))
        self.coupling = torch.zeros_like(self.coupling)
        self.right[self.size] = self._random(domain, self.right[: self.size])

    def compress(self, values: Tensor, left: Tensor, right: Tensor) -> None:
        """Keep only these Ritz vectors and the next right vector.

        Args:
            values: Ritz values (r,), r < capacity.
            left: Coefficients (size, r) of the left Ritz vectors.
            right: Coefficients (size, r) of the right ones.
        """
        r = len(values)
        leaks = self.leaks @ left
        scale = self.eps * self._norm()
        self.leaks = leaks[leaks.norm(dim=1) > scale]
        self.coupling = self.coupling @ left
        self.rotate(left, right)
        self.right[r] = self.right[self.size]
        self.B.zero_()
        self.B[range(r), range(r)] = values
        self.size = r

    def rotate(self, left: Tensor, right: Tensor) -> None:
        """Make the first rows of either basis these combinations (size, r) of its rows."""
        rotate(self.left[: self.size], left)
        rotate(self.right[: self.size], right)
