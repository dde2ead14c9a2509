"""An orthonormal basis that grows by products, and the operator projected to it.

Every process holds its part of each basis vector; what is small (the projected matrix) each has
whole. Vectors are made orthogonal to all before them, twice ("twice is enough": Parlett, "The
Symmetric Eigenvalue Problem", section 6.9). The coefficients are float64, the vectors have the
operator's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import final

import torch
from torch import Tensor

from hvp_core.errors import CurvatureError
from hvp_core.precision import exact_products

_ROTATED = 1 << 16  # columns of the basis rotated at once: a few MiB of working memory
#: eps to this power is what rounding leaves of a vector that should vanish, relative to ‖T‖: 1e-6
#: in float32, 5e-14 in float64. A smaller β means that the Krylov space is exhausted.
_ROUNDING_POWER = 0.85
_PASSES = 3  # of a random vector against the basis
_MOST_STARTS = 20  # random vectors looked at before one keeps its length

Dots = Callable[[Tensor, Tensor], Tensor]


def rounding(eps: float) -> float:
    """What errors of eps leave of a vector that should vanish, relative to the operator's norm."""
    return float(eps**_ROUNDING_POWER)


@final
class KrylovBasis:
    """Rows V of a basis with A Vᵀ = Vᵀ T + v_next cᵀ + Σ vᵢ gᵢᵀ.

    Law: `rows[:size]` are orthonormal, `rows[size]` (v_next) is orthogonal to them, and T is the
    operator projected to them. The row `T[size, :size]` is c; `leaks` are the gᵢ, of directions
    vᵢ, unit vectors orthogonal to the rows they leak from, that were given up for a fresh start.

    Args:
        start: Vector (local,), not zero.
        capacity: Rows whose products can be known at a time; one more is allocated.
        dimension: n, the length of a whole vector.
        dots: (rows (m, local), vector (local,)) -> inner products (m,) float64 of whole vectors.
        random: seed -> a random vector (local,).
        noise: Relative error of a product, where that is more than the rounding of the dtype.
    """

    def __init__(
        self,
        start: Tensor,
        capacity: int,
        dimension: int,
        dots: Dots,
        random: Callable[[int], Tensor],
        noise: float = 0.0,
    ):
        self.rows = start.new_empty(capacity + 1, start.numel())
        self.T = torch.zeros(capacity + 1, capacity + 1, dtype=torch.float64)
        self.leaks = torch.zeros(0, 0, dtype=torch.float64)  # (c, size)
        self.size = 0  # rows whose products are known
        self.origin = 0  # rows known before the present run of the recurrence began
        self.capacity, self.dimension = capacity, dimension
        self.eps = max(torch.finfo(start.dtype).eps, noise)
        self.rounding = rounding(self.eps)
        self.symmetry_defect = 0.0
        self._dots, self._random = dots, random
        self._num_starts = 0
        torch.div(start, self.norm(start), out=self.rows[0])

    def dots(self, rows: Tensor, vector: Tensor) -> Tensor:
        """Inner products (m,) float64.

        Raises:
            CurvatureError: NON_FINITE.
        """
        found = self._dots(rows, vector)
        if not bool(found.isfinite().all()):
            raise CurvatureError(
                "NON_FINITE",
                "an inner product of the Krylov basis is not finite: a product with the operator "
                "overflows or is NaN; use float64 or full precision",
            )
        return found

    def norm(self, vector: Tensor) -> float:
        """Euclidean norm of a whole vector."""
        return math.sqrt(float(self.dots(vector.unsqueeze(0), vector)[0]))

    @property
    def full(self) -> bool:
        """No room for another product."""
        return self.size == self.capacity

    @property
    def whole(self) -> bool:
        """The rows span everything."""
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

    def extend(self, matvec: Callable[[Tensor], Tensor]) -> tuple[float, float]:
        """One product more.

        What `matvec` returns is read, not written to: it may be its argument, or be kept.

        Returns:
            α and β of the recurrence; β is zero where rounding is all that is left, and the next
            row then is not yet chosen (see `start_afresh`).
        """
        j = self.size
        w = matvec(self.rows[j])
        known, following = self.rows[: j + 1], self.rows[j + 1]
        first = self.dots(known, w)
        norm = self.norm(w)
        torch.addmv(w, known.T, first.to(w), alpha=-1, out=following)
        second = self.dots(known, following)
        following.addmv_(known.T, second.to(w), alpha=-1)
        found = first + second
        self.T[j, j] = found[j]
        if len(self.leaks):  # the rows before the origin have parts along this one
            self.T[: self.origin, j] = self.T[j, : self.origin] = found[: self.origin]
        predicted = self.T[:j, j] - first[:j]
        if norm > 0 and j > 0:
            self.symmetry_defect = max(self.symmetry_defect, float(predicted.abs().max()) / norm)
        self.size = j + 1
        beta = self.norm(following)
        known_norm = float(self.T[: j + 1, : j + 1].abs().sum(0).max())
        size = max(known_norm, beta)  # at least ‖T‖
        if beta <= self.rounding * size or self.whole:
            beta = 0.0
        else:
            following.div_(beta)
        self.T[j, j + 1] = self.T[j + 1, j] = beta
        self.leaks = torch.cat((self.leaks, self.leaks.new_zeros(len(self.leaks), 1)), 1)
        return float(found[j]), beta

    def start_afresh(self) -> None:
        """Give up the next vector and take a random one, orthogonal to all rows, in its place.

        Raises:
            CurvatureError: NON_FINITE.
        """
        coupling = self.coupling.clone()
        if float(coupling.norm()) > 0:
            self.leaks = torch.cat((self.leaks, coupling[None]))
        self.T[self.size, :] = self.T[:, self.size] = 0
        self.origin = self.size
        known = self.rows[: self.size]
        for _ in range(_MOST_STARTS):
            self._num_starts += 1
            w = self._random(self._num_starts)
            for _ in range(_PASSES):
                w = w / self.norm(w)
                w.addmv_(known.T, self.dots(known, w).to(w), alpha=-1)
            norm = self.norm(w)
            if norm > 0.5:  # it kept its length through the last pass: orthogonal to rounding
                torch.div(w, norm, out=self.rows[self.size])
                return
        raise CurvatureError(
            "NON_FINITE",
            f"none of {_MOST_STARTS} random vectors has a part outside {self.size} basis vectors "
            f"of a space of {self.dimension} dimensions: inner products are wrong; use float64",
        )

    def compress(self, values: Tensor, vectors: Tensor) -> None:
        """Keep these Ritz vectors only, and the next vector.

        Args:
            values: Ritz values (r,), r <= capacity.
            vectors: Their coefficients (size, r).
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
        """Forget the present run's vectors but the latest two: its coefficients go on."""
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

    @exact_products()
    def rotate(self, vectors: Tensor) -> None:
        """rows[:r] = vectorsᵀ @ rows, in place. vectors: (size, r) float64."""
        rotation = vectors.T.to(self.rows)
        rows = self.rows[: vectors.shape[0]]
        for start in range(0, rows.shape[1], _ROTATED):
            part = rows[:, start : start + _ROTATED]
            part[: rotation.shape[0]] = rotation @ part
