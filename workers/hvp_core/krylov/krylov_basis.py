"""An orthonormal basis that grows by products, and the operator projected to it.

Every process holds its part of each basis vector, and the whole of the small projected matrix.
Vectors are made orthogonal to all before them, twice ("twice is enough": Parlett, "The Symmetric
Eigenvalue Problem", section 6.9). The coefficients are float64, the vectors have the operator's
dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from hvp_core.errors import CurvatureError
from hvp_core.precision import exact_products
from hvp_core.runs.algorithm import derived_seed
from hvp_core.runs.snapshot import vectors_of_the_space
from hvp_core.vectors.vector_space import VectorSpace

_ROTATED = 1 << 16  # columns of the basis rotated at once: a few MiB of working memory
#: eps to this power is what rounding leaves of a vector that should vanish, relative to ‖T‖: 1e-6
#: in float32, 5e-14 in float64. A smaller β means that the Krylov space is exhausted.
_ROUNDING_POWER = 0.85
_PASSES = 3  # of a random vector against the basis
_MOST_STARTS = 20  # random vectors looked at before one keeps its length


def rounding(eps: float) -> float:
    """The norm that errors of eps leave of a vector that should vanish, relative to ‖A‖."""
    return float(eps**_ROUNDING_POWER)


def finite_dots(space: VectorSpace, rows: Tensor, vector: Tensor) -> Tensor:
    """Inner products (m,) float64 of the vectors in `rows` (m, local) with `vector` (local,).

    Raises:
        CurvatureError: NON_FINITE: an inner product is infinite or NaN.
    """
    return finite(space.dots(rows, vector))


def finite(numbers: Tensor) -> Tensor:
    """Numbers that are made of products, if none is infinite or NaN.

    Raises:
        CurvatureError: NON_FINITE.
    """
    if not bool(numbers.isfinite().all()):
        raise CurvatureError(
            "NON_FINITE",
            "an inner product is not finite: a product with the operator overflows or is NaN; use "
            "float64 or full precision",
        )
    return numbers


def finite_norm(space: VectorSpace, vector: Tensor) -> float:
    """Euclidean norm of a whole vector.

    Raises:
        CurvatureError: NON_FINITE.
    """
    return math.sqrt(float(finite_dots(space, vector.unsqueeze(0), vector)[0]))


def orthogonalise(
    space: VectorSpace, known: Tensor, w: Tensor, *, out: Tensor
) -> tuple[Tensor, Tensor]:
    """Take a vector's parts along orthonormal vectors out of it, twice.

    Args:
        space: Space of the vectors.
        known: The orthonormal vectors, (m, local).
        w: The vector, (local,); read only.
        out: Takes the rest of the vector, (local,).

    Returns:
        The coefficients (m,) float64 of the first pass, and of the second.

    Raises:
        CurvatureError: NON_FINITE.
    """
    first = finite_dots(space, known, w)
    torch.addmv(w, known.T, first.to(w), alpha=-1, out=out)
    second = finite_dots(space, known, out)
    out.addmv_(known.T, second.to(w), alpha=-1)
    return first, second


def random_unit(space: VectorSpace, known: Tensor, seed: int, number: int) -> tuple[Tensor, int]:
    """A random unit vector outside orthonormal ones.

    Args:
        space: Space of the vectors.
        known: The orthonormal vectors, (m, local).
        seed: Seed from which the seeds of all random vectors are derived.
        number: Number of the first random vector to look at.

    Returns:
        The vector (local,), orthogonal to them to rounding, and the number that it has.

    Raises:
        CurvatureError: NON_FINITE: an inner product is not finite, or no random vector has a part
            outside them.
    """
    for drawn in range(number, number + _MOST_STARTS):
        w = space.random(derived_seed(seed, drawn), "gaussian")
        for _ in range(_PASSES):
            w = w / finite_norm(space, w)
            w.addmv_(known.T, finite_dots(space, known, w).to(w), alpha=-1)
        norm = finite_norm(space, w)
        if norm > 0.5:  # it kept its length through the last pass: orthogonal to rounding
            return w / norm, drawn
    raise CurvatureError(
        "NON_FINITE",
        f"none of {_MOST_STARTS} random vectors has a part outside {len(known)} basis vectors of a "
        f"space of {space.dimension} dimensions: inner products are wrong; use float64",
    )


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
    """Rows V of a basis with A Vᵀ = Vᵀ T + v_next cᵀ + Σ vᵢ gᵢᵀ.

    Law: `rows[:size]` are orthonormal, `rows[size]` (v_next) is orthogonal to them, and T is the
    operator projected to them. The row `T[size, :size]` is c; `leaks` are the gᵢ, of directions
    vᵢ, unit vectors orthogonal to the rows they leak from, that were given up for a fresh start.

    Attributes:
        rows: The vectors, (capacity + 1, local); those from `num_rows` on hold nothing yet.
        T: The projected operator, (capacity + 1, capacity + 1) float64 on the CPU.
        leaks: The gᵢ, (c, size) float64.
        dimension: n, the length of a whole vector.
        seed: Seed from which the seeds of all random vectors are derived.
        eps: Relative error of a product: the rounding of the dtype, or more.
        size: Number of rows with a known product.
        origin: Number of such rows before the present run of the recurrence began.
        num_starts: Number of random vectors that were drawn after the first one.
        symmetry_defect: Largest |u·Av − v·Au| / ‖Av‖ met between rows.
    """

    rows: Tensor = field(metadata=vectors_of_the_space("num_rows"))
    T: Tensor
    leaks: Tensor
    dimension: int
    seed: int
    eps: float
    size: int = 0
    origin: int = 0
    num_starts: int = 0
    symmetry_defect: float = 0.0

    @classmethod
    def begin(cls, space: VectorSpace, capacity: int, seed: int, noise: float = 0.0) -> KrylovBasis:
        """A basis of which only the first vector is known: a random one, Gaussian.

        Memory: capacity + 2 vectors.

        Args:
            space: Space of the vectors.
            capacity: Rows whose products can be known at a time; one more is allocated.
            seed: Seed of the first vector, and of fresh starts.
            noise: Relative error of a product, where that is more than the rounding of the dtype.
        """
        start = space.random(derived_seed(seed, 0), "gaussian")
        basis = cls(
            rows=start.new_empty(capacity + 1, start.numel()),
            T=torch.zeros(capacity + 1, capacity + 1, dtype=torch.float64),
            leaks=torch.zeros(0, 0, dtype=torch.float64),
            dimension=space.dimension,
            seed=seed,
            eps=max(torch.finfo(start.dtype).eps, noise),
        )
        torch.div(start, finite_norm(space, start), out=basis.rows[0])
        return basis

    @property
    def capacity(self) -> int:
        """The most rows whose products can be known at a time."""
        return len(self.T) - 1

    @property
    def num_rows(self) -> int:
        """Number of rows that hold a vector: those with a known product, and the next vector."""
        return self.size + 1

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
    def coupling(self) -> Tensor:
        """The coefficients c (size,) of the rows' products along the next vector."""
        row: Tensor = self.T[self.size, : self.size]
        return row

    def residuals(self, vectors: Tensor) -> Tensor:
        """Residual norms, or a little more, of these combinations (size, r) of the rows."""
        own = (self.coupling @ vectors).abs()
        return own + (self.leaks @ vectors).abs().sum(0)

    @property
    def newest(self) -> Tensor:
        """The row (local,) whose product comes next."""
        return self.rows[self.size]

    def extend(self, space: VectorSpace, w: Tensor) -> tuple[float, float]:
        """Take in one more product. Cost: 4 m n multiplications, with m rows known.

        Args:
            space: Space of the vectors.
            w: The product with `newest`, (local,); read, not written to: it may be `newest` itself.

        Returns:
            α and β of the recurrence. β is zero where only rounding is left of the product; the
            next row then is not chosen yet (see `start_afresh`).

        Raises:
            CurvatureError: NON_FINITE.
        """
        j = self.size
        known, following = self.rows[: j + 1], self.rows[j + 1]
        norm = finite_norm(space, w)
        first, second = orthogonalise(space, known, w, out=following)
        found = first + second
        self.T[j, j] = found[j]
        if len(self.leaks):  # the rows before the origin have parts along this one
            self.T[: self.origin, j] = self.T[j, : self.origin] = found[: self.origin]
        predicted = self.T[:j, j] - first[:j]
        if norm > 0 and j > 0:
            self.symmetry_defect = max(self.symmetry_defect, float(predicted.abs().max()) / norm)
        self.size = j + 1
        beta = finite_norm(space, following)
        known_norm = float(self.T[: j + 1, : j + 1].abs().sum(0).max())
        size = max(known_norm, beta)  # at least ‖T‖
        if beta <= self.rounding * size or self.whole:
            beta = 0.0
        else:
            following.div_(beta)
        self.T[j, j + 1] = self.T[j + 1, j] = beta
        self.leaks = torch.cat((self.leaks, self.leaks.new_zeros(len(self.leaks), 1)), 1)
        return float(found[j]), beta

    def start_afresh(self, space: VectorSpace) -> None:
        """Give up the next vector and take a random one, orthogonal to all rows, in its place.

        Args:
            space: Space of the vectors.

        Raises:
            CurvatureError: NON_FINITE: an inner product is not finite, or no random vector has a
                part outside the rows.
        """
        coupling = self.coupling.clone()
        if float(coupling.norm()) > 0:
            self.leaks = torch.cat((self.leaks, coupling[None]))
        self.T[self.size, :] = self.T[:, self.size] = 0
        self.origin = self.size
        self.rows[self.size], self.num_starts = random_unit(
            space, self.rows[: self.size], self.seed, self.num_starts + 1
        )

    def compress(self, values: Tensor, vectors: Tensor) -> None:
        """Keep only these Ritz vectors and the next vector.

        Args:
            values: Ritz values (r,), r <= capacity.
            vectors: Coefficients (size, r) of the Ritz vectors in the rows.
        """
        r = len(values)
        coupling = self.coupling @ vectors
        leaks = self.leaks @ vectors
        self.leaks = leaks[leaks.norm(dim=1) > self.eps * float(values.abs().max())]
        self.rotate(vectors)
        self.rows[r] = self.rows[self.size]
        self.T.zero_()
        self.T[range(r), range(r)] = values
        self.T[r, :r] = self.T[:r, r] = coupling
        self.size = self.origin = r

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
        self.size = origin + 1

    def rotate(self, vectors: Tensor) -> None:
        """Set rows[:r] to vectorsᵀ @ rows, in place.

        Args:
            vectors: Coefficients (size, r) float64 of the new rows in the old ones.
        """
        rotate(self.rows[: vectors.shape[0]], vectors)
