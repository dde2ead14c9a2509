"""Diagonals with each random vector left out of a basis in turn (XDiag).

Q_i is the basis of the products AΩ without the i-th, P_i = Q_iQ_iᵀ. The estimates
diag(P_iA) + ω_i ∘ (I − P_i)Aω_i, with random signs ω_i of which Q_i knows nothing, are each without
bias, and so is their mean (Epperly, Tropp and Webber, "XTrace: making the most of every sample in
stochastic trace estimation", SIAM J. Matrix Anal. Appl. 45 (2024)). With AΩ = QR, Z = AQ, and s_i
the unit vector that is orthogonal to all columns of R but the i-th, P_i = Q(I − s_i s_iᵀ)Qᵀ and
(I − P_i)Aω_i = u_i ρ_i with u_i = Qs_i and ρ_i = s_i·r_i, so that the i-th estimate is

    Σ_j q_j ∘ z_j − u_i ∘ (a_i − ρ_i ω_i),    a_i = Zs_i.

The standard error is the one of `sketches`: the geometric mean of the estimates' spread and of the
jackknife's, element by element. The mean of the estimates without the i-th vector, which the
jackknife takes, is known from the same vectors: with c = s_i·s_j and γ = 1/(1 − c²), the space
without vectors i and j lacks u_i and (u_j − c u_i) √γ, and the j-th estimate without vector i is

    Σ q ∘ z − u_i ∘ a_i + γ (u_j − c u_i) ∘ (ρ_j ω_j − a_j + c a_i).

Its sum over j is four products with k × k matrices, but where γ is so large that the terms cancel.

More random signs z give diag(PA) + z ∘ (I − P)Az at one product each. They know nothing of Ω, so
that the errors of the two means are uncorrelated; each sample of either has one vote.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

import torch
from hvp_operations.students_t import student_t
from torch import Tensor

from hvp_core.krylov.orthogonality import finite_norm, orthogonalise
from hvp_core.runs.snapshot import vectors_of_the_space
from hvp_core.stochastic.sketches import Range
from hvp_core.stochastic.vector_moments import VectorEstimate, VectorMoments
from hvp_core.vectors.vector_space import VectorSpace

#: Elements of a vector that are estimated at once: with 64 vectors, some 60 MiB of working memory.
_PIECE = 1 << 14
#: Where 1 − c² is smaller, the jackknife's terms are taken pair by pair.
_NEAR = 1e-6


@final
@dataclass
class XDiagSketch:
    """A basis of a range, its products, and the random signs that it is made with.

    Attributes:
        range: Q and R.
        products: Rows Z, (capacity, local); the first `num_probes` of them.
        signs: Rows ω, (capacity, local) int8; as many.
        num_projected: Number of basis vectors whose products are known.
    """

    range: Range
    products: Tensor = field(metadata=vectors_of_the_space("num_projected"))
    signs: Tensor = field(metadata=vectors_of_the_space("num_probes"))
    num_projected: int = 0

    @classmethod
    def begin(cls, space: VectorSpace, capacity: int) -> XDiagSketch:
        """An empty sketch with room for `capacity` vectors."""
        basis = Range.begin(space, capacity)
        return cls(
            basis, torch.empty_like(basis.rows), torch.empty_like(basis.rows, dtype=torch.int8)
        )

    @property
    def num_probes(self) -> int:
        """Number of random vectors that the estimates are made of."""
        return self.range.num_rows

    @property
    def is_whole(self) -> bool:
        """Whether the basis spans the range."""
        return self.range.is_whole

    def extend(self, space: VectorSpace, vector: Tensor, product: Tensor) -> None:
        """Take in one more vector of random signs and its product, (local,) each.

        Raises:
            CurvatureError: NON_FINITE.
        """
        new = self.num_probes
        self.range.extend(space, product)
        if self.num_probes > new:
            self.signs[new] = vector

    def project(self, space: VectorSpace, product: Tensor) -> None:
        """Take in the product with the next basis vector.

        Raises:
            CurvatureError: NON_FINITE.
        """
        finite_norm(space, product)
        self.products[self.num_projected] = product
        self.num_projected += 1

    def left_of(self, space: VectorSpace, product: Tensor) -> Tensor:
        """What a product has outside the span of the basis, as a new vector.

        Raises:
            CurvatureError: NON_FINITE.
        """
        rest = torch.empty_like(product)
        orthogonalise(space, self.range.rows[: self.num_probes], product, out=rest)
        return rest

    def estimate(self, space: VectorSpace, samples: VectorMoments) -> VectorEstimate:
        """The diagonal: exact where the basis spans the range, otherwise of two vectors or more.

        Args:
            space: Space of the vectors.
            samples: Samples z ∘ (I − P)Az of random signs that are none of the sketch's.
        """
        k, m = self.num_probes, samples.count if samples.count > 1 else 0
        vector = space.zeros()
        found = vector.new_zeros(2, len(vector))
        is_certain = self.is_whole or k == space.dimension
        small = None if is_certain else _Small.of(self.range.r[:k, :k], found.device)
        for start in range(0, len(vector), _PIECE):
            here = slice(start, start + _PIECE)
            q, z = self.range.rows[:k, here].double(), self.products[:k, here].double()
            captured = (q * z).sum(0)
            if small is None:
                found[0, here] = captured
                continue
            rest, variance = small.rest(q, z, self.signs[:k, here].double())
            rest, variance = k * rest, k * k * variance
            if m:
                mean, squares = samples.rows[:, here].double()
                rest, variance = rest + m * mean, variance + m / (m - 1) * squares
            found[0, here] = captured + rest / (k + m)
            found[1, here] = variance.sqrt() / (k + m)
        # Degrees of freedom by Welch and Satterthwaite, of samples of one variance.
        degrees = k - 1 + max(0, m - 1)
        return VectorEstimate(found, 0.0 if is_certain else student_t(degrees))


@final
@dataclass(frozen=True)
class _Small:
    """What the estimates need of R, (k, k) each and (k,), float64.

    Attributes:
        s: The s_i as columns.
        rho: The ρ_i.
        c: The s_i·s_j.
        gamma: The γ, but 0 for i = j and where it is too large for sums.
        near: The pairs with such a γ, and it.
    """

    s: Tensor
    rho: Tensor
    c: Tensor
    gamma: Tensor
    near: list[tuple[int, int, float]]

    @classmethod
    def of(cls, r: Tensor, device: torch.device) -> _Small:
        k = len(r)
        s = torch.linalg.solve_triangular(r.mT, torch.eye(k, dtype=r.dtype), upper=False)
        s = s / s.norm(dim=0)
        c = s.mT @ s
        # 1 − c² is the square of what s_j has beside s_i, which has no cancellation.
        beside = (s.unsqueeze(1) - s.unsqueeze(2) * c).square().sum(0).fill_diagonal_(1)
        is_near = beside < _NEAR
        gamma = torch.where(is_near, 0, 1 / beside).fill_diagonal_(0)
        near = [(i, j, 1 / float(beside[i, j])) for i, j in is_near.nonzero().tolist()]
        rho = (s * r).sum(0)
        return cls(s.to(device), rho.to(device), c.to(device), gamma.to(device), near)

    def rest(self, q: Tensor, z: Tensor, omega: Tensor) -> tuple[Tensor, Tensor]:
        """What the mean of the estimates has beside Σ q ∘ z, and the variance of that mean.

        Args:
            q: Pieces of the basis vectors, (k, m) float64.
            z: Pieces of their products.
            omega: Pieces of the random signs.
        """
        k, c, gamma = len(q), self.c, self.gamma
        u, a = self.s.mT @ q, self.s.mT @ z
        b = a - self.rho.unsqueeze(1) * omega
        left_out = u * b
        gamma_c = gamma * c
        crossed = (gamma_c * c).sum(1, keepdim=True)
        without = u * (gamma_c @ b) + a * (gamma_c @ u) - gamma @ left_out - crossed * u * a
        for i, j, inverse in self.near:
            cosine = c[i, j]
            without[i] -= inverse * (u[j] - cosine * u[i]) * (b[j] - cosine * a[i])
        without = without / (k - 1) - u * a
        spread = left_out.var(0) / k
        jackknife = without.var(0) * (k - 1) ** 2 / k
        return -left_out.mean(0), (spread * jackknife).sqrt()
