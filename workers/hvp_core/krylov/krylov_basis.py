"""An orthonormal basis that grows by products, and the operator projected to it.

Every process holds its part of each basis vector, and the whole of the small projected matrix. The
coefficients are float64, the vectors have the operator's dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from hvp_core.krylov.orthogonality import (
    finite_norm,
    orthogonalise,
    part_outside,
    random_outside,
    rounding,
)
from hvp_core.precision import exact_products
from hvp_core.runs.algorithm import derived_seed
from hvp_core.runs.snapshot import vectors_of_the_space
from hvp_core.vectors.vector_space import VectorSpace

_ROTATED = 1 << 16  # columns of the basis rotated at once: a few MiB of working memory
_WARM_SEEDS = 1 << 32  # where the seeds of a run begin that was given its first vectors


@exact_products()
def rotate(rows: Tensor, vectors: Tensor) -> None:
    """Set rows[:r] to vectorsᵀ @ rows, in place.

    Args:
        rows: The vectors, (m, local).
        vectors: Coefficients (m, r) float64 of the new rows in the old ones.
    """
    rotation = vectors.T.to(rows)
    for start in range(0, rows.shape[1], _ROTATED):
        part = rows[:, start : start + _ROTATED]
        part[: rotation.shape[0]] = rotation @ part


@final
@dataclass
class KrylovBasis:
    """Rows V of a basis with A Vᵀ = Vᵀ T + Pᵀ C + Σ vᵢ gᵢᵀ.

    Law: the first `size` rows, V, and the `num_pending` rows behind them, P, which wait for their
    products, are orthonormal, and T is the operator projected to V. The rows of P in `T` are C;
    `leaks` are the gᵢ, of directions vᵢ, unit vectors orthogonal to the rows they leak from, that
    were given up for a fresh start. A row's product adds one row to P, unless only rounding is left
    of it. So a run that begins with a single vector is the Lanczos method, and one with several is
    the band Lanczos method (Ruhe, "Implementation aspects of band Lanczos algorithms", Math. Comp.
    33 (1979)), which gives the block Krylov space.

    Attributes:
        rows: The vectors, (capacity + width, local), for at most `width` pending ones; those from
            `num_rows` on hold nothing yet.
        T: The projected operator, (capacity + width, capacity + width) float64 on the CPU.
        leaks: The gᵢ, (c, size) float64.
        dimension: n, the length of a whole vector.
        seed: Seed from which the seeds of all random vectors are derived.
        eps: Relative error of a product: the rounding of the dtype, or more.
        capacity: The most rows whose products can be known at a time.
        size: Number of rows with a known product.
        num_pending: Number of rows behind them that wait for their products.
        origin: Number of such rows before the present run of the recurrence began.
        num_starts: Index of the latest random vector; those of a basis that began with given ones
            are others than those of one that did not, in which the given ones may have been found.
        symmetry_defect: Largest |u·Av − v·Au| / ‖Av‖ met between rows.
    """

    rows: Tensor = field(metadata=vectors_of_the_space("num_rows"))
    T: Tensor
    leaks: Tensor
    dimension: int
    seed: int
    eps: float
    capacity: int
    size: int = 0
    num_pending: int = 0
    origin: int = 0
    num_starts: int = 0
    symmetry_defect: float = 0.0

    @classmethod
    def begin(
        cls,
        space: VectorSpace,
        capacity: int,
        seed: int,
        noise: float = 0.0,
        *,
        width: int = 1,
        starts: Sequence[Tensor] = (),
        room: int = 0,
    ) -> KrylovBasis:
        """A basis before its first products: given vectors, and random ones, Gaussian.

        Memory: capacity + max(width, room) + 1 vectors.

        Args:
            space: Space of the vectors.
            capacity: Rows whose products can be known at a time.
            seed: Seed of the random vectors, and of fresh starts.
            noise: Relative error of a product, where that is more than the rounding of the dtype.
            width: The fewest vectors to begin with, where the space has so many: random ones make
                up for starts that are missing.
            starts: Vectors to begin with, (local,) each, at most `width`; see `include`.
            room: The most rows that will wait at a time, where that is more than `width`.

        Raises:
            CurvatureError: NON_FINITE.
        """
        like, most = space.zeros(), capacity + max(width, room)
        basis = cls(
            rows=like.new_empty(most, like.numel()),
            T=torch.zeros(most, most, dtype=torch.float64),
            leaks=torch.zeros(0, 0, dtype=torch.float64),
            dimension=space.dimension,
            seed=seed,
            eps=max(torch.finfo(like.dtype).eps, noise),
            capacity=capacity,
            num_starts=_WARM_SEEDS if starts else -1,
        )
        basis.include(space, starts)
        basis.widen(space, width)
        return basis

    @property
    def num_rows(self) -> int:
        """Number of rows that hold a vector: those with a known product, and those that wait."""
        return self.size + self.num_pending

    @property
    def rounding(self) -> float:
        """The norm that rounding leaves of a vector that should vanish, relative to ‖A‖."""
        return rounding(self.eps)

    @property
    def full(self) -> bool:
        """Whether there is no room for another product."""
        return self.size == self.capacity

    @property
    def whole(self) -> bool:
        """Whether the rows span the whole space."""
        return self.size == self.dimension

    @property
    def exhausted(self) -> bool:
        """Whether no row waits for its product, though the rows do not span the whole space."""
        return self.num_pending == 0 and not self.whole

    def coupling(self, vectors: Tensor) -> Tensor:
        """The coefficients (num_pending, r) of these vectors' products along the pending rows.

        Args:
            vectors: Coefficients (size, r) of the vectors in the rows.
        """
        coupling: Tensor = vectors.new_zeros(self.num_pending, vectors.shape[1])
        for index, row in enumerate(self.T[self.size : self.num_rows, : self.size]):
            coupling[index] = row @ vectors
        return coupling

    def residuals(self, vectors: Tensor) -> Tensor:
        """Residual norms, or a little more, of these combinations (size, r) of the rows."""
        own: Tensor = torch.linalg.vector_norm(self.coupling(vectors), dim=0)
        return own + (self.leaks @ vectors).abs().sum(0)

    @property
    def pending(self) -> Tensor:
        """The rows (num_pending, local) that wait for their products, the next one first."""
        rows: Tensor = self.rows[self.size : self.num_rows]
        return rows

    def extend(self, space: VectorSpace, w: Tensor) -> tuple[float, float]:
        """Take in the product of the first pending row. Cost: 4 m n multiplications, with m rows.

        Args:
            space: Space of the vectors.
            w: The product, (local,); read, not written to: it may be that row itself.

        Returns:
            α and β of the recurrence. β is zero where only rounding is left of the product; then
            fewer rows wait than before (see `start_afresh`).

        Raises:
            CurvatureError: NON_FINITE.
        """
        j, end = self.size, self.num_rows
        known, following = self.rows[:end], self.rows[end]
        norm = finite_norm(space, w)
        first, second = orthogonalise(space, known, w, out=following)
        found = first + second
        self.T[j:end, j] = self.T[j, j:end] = found[j:]
        if len(self.leaks):  # the rows before the origin have parts along this one
            self.T[: self.origin, j] = self.T[j, : self.origin] = found[: self.origin]
        predicted = self.T[:j, j] - first[:j]
        if norm > 0 and j > 0:
            self.symmetry_defect = max(self.symmetry_defect, float(predicted.abs().max()) / norm)
        self.size, self.num_pending = j + 1, self.num_pending - 1
        beta = finite_norm(space, following)
        known_norm = float(self.T[:end, : j + 1].abs().sum(0).max())
        size = max(known_norm, beta)  # at least ‖T‖
        if beta <= self.rounding * size or end >= self.dimension:
            beta = 0.0
        else:
            following.div_(beta)
            self.T[end, j] = self.T[j, end] = beta
            self.num_pending += 1
        self.leaks = torch.cat((self.leaks, self.leaks.new_zeros(len(self.leaks), 1)), 1)
        return float(found[j]), beta

    def close(self, space: VectorSpace, w: Tensor) -> None:
        """Take in the product of the first pending row; what it has outside of all rows leaks.

        Args:
            space: Space of the vectors.
            w: The product, (local,); read only.

        Raises:
            CurvatureError: NON_FINITE.
        """
        j, end = self.size, self.num_rows
        first, second = orthogonalise(space, self.rows[:end], w, out=self.rows[end])
        self.T[:end, j] = self.T[j, :end] = first + second
        self.size, self.num_pending = j + 1, self.num_pending - 1
        leaks = self.leaks.new_zeros(len(self.leaks) + 1, j + 1)
        leaks[:-1, :j], leaks[-1, j] = self.leaks, finite_norm(space, self.rows[end])
        self.leaks = leaks

    def include(self, space: VectorSpace, vectors: Sequence[Tensor]) -> None:
        """Let what these vectors have outside of the rows wait for its products too.

        Args:
            space: Space of the vectors.
            vectors: (local,) each, not zero; read only. One that depends on the others and the rows
                to rounding adds nothing.

        Raises:
            CurvatureError: NON_FINITE.
        """
        for vector in vectors:
            part = part_outside(space, self.rows[: self.num_rows], vector)
            if part is not None and self.num_rows < self.dimension:
                self._append(part)

    def widen(self, space: VectorSpace, width: int) -> None:
        """Let random vectors, orthogonal to all rows, wait for their products, up to `width` rows.

        Args:
            space: Space of the vectors.
            width: Rows that wait then, or as many as the space has.

        Raises:
            CurvatureError: NON_FINITE: an inner product is not finite, or no random vector has a
                part outside the rows.
        """
        while self.num_pending < min(width, self.dimension - self.size):
            known = self.rows[: self.num_rows]
            part, self.num_starts = random_outside(
                space,
                known,
                lambda index: space.random(derived_seed(self.seed, index), "gaussian"),
                self.num_starts + 1,
            )
            self._append(part)

    def _append(self, w: Tensor) -> None:
        """Let a vector wait for its product whose only parts along products are those of leaks."""
        end = self.num_rows
        self.rows[end] = w
        self.T[end:, :] = self.T[:, end:] = 0
        self.num_pending += 1

    def start_afresh(self, space: VectorSpace, width: int = 1) -> None:
        """Give up the pending rows, and take random vectors, orthogonal to V, in their place.

        Args:
            space: Space of the vectors.
            width: Number of random vectors.

        Raises:
            CurvatureError: NON_FINITE: an inner product is not finite, or no random vector has a
                part outside the rows.
        """
        self.give_up()
        self.widen(space, width)

    def give_up(self) -> None:
        """Give up the pending rows; what the others' products have along them leaks from now on."""
        coupling = self.T[self.size : self.num_rows, : self.size]
        self.leaks = torch.cat((self.leaks, coupling[coupling.norm(dim=1) > 0]))
        self.origin, self.num_pending = self.size, 0

    def compress(self, values: Tensor, vectors: Tensor) -> None:
        """Keep only these Ritz vectors and the pending rows.

        Args:
            values: Ritz values (r,), r <= capacity.
            vectors: Coefficients (size, r) of the Ritz vectors in the rows.
        """
        r, p = len(values), self.num_pending
        coupling = self.coupling(vectors)
        leaks = self.leaks @ vectors
        self.leaks = leaks[leaks.norm(dim=1) > self.eps * float(values.abs().max())]
        self.rotate(vectors)
        for index in range(p):
            self.rows[r + index] = self.rows[self.size + index]
        self.T.zero_()
        self.T[range(r), range(r)] = values
        self.T[r : r + p, :r] = coupling
        self.T[:r, r : r + p] = coupling.T
        self.size = self.origin = r

    def take_back(self, leaks: Tensor) -> None:
        """Forget the present run, and all rows that wait.

        Args:
            leaks: The leaks that there were before the run, (c, origin).
        """
        self.size, self.num_pending, self.leaks = self.origin, 0, leaks.clone()

    def slide(self) -> None:
        """Forget the present run's vectors but for the latest two, from which the run goes on."""
        last, origin = self.size - 1, self.origin
        before = self.T[:origin, last].clone()
        alpha, beta = float(self.T[last, last]), float(self.T[last, last + 1])
        previous = float(self.T[last - 1, last])
        self.rows[origin] = self.rows[last]
        self.rows[origin + 1] = self.rows[last + 1]
        self.T[origin:, :] = self.T[:, origin:] = 0
        self.T[:origin, origin] = self.T[origin, :origin] = before
        self.T[origin, origin] = alpha
        self.T[origin, origin + 1] = self.T[origin + 1, origin] = beta
        # What was taken out leaks as before, and the vector that is kept to the one before it.
        leaks = self.leaks[:, : origin + 1].clone()
        leaks[:, origin] = 0
        forgotten = leaks.new_zeros(1, origin + 1)
        forgotten[0, origin] = previous
        self.leaks = torch.cat((leaks[leaks.norm(dim=1) > 0], forgotten))
        self.size, self.num_pending = origin + 1, 1

    def rotate(self, vectors: Tensor) -> None:
        """Set rows[:r] to vectorsᵀ @ rows, in place.

        Args:
            vectors: Coefficients (size, r) float64 of the new rows in the old ones.
        """
        rotate(self.rows[: vectors.shape[0]], vectors)
