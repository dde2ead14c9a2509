"""A matrix of Kronecker products near a curvature matrix, and the inverse of it with λI.

Of a matrix of parameters W (m, n) its block is (W/T) L ⊗ R, with the factors of `factor_sums.py`,
of any other parameter s I. With L = U diag(l) Uᵀ and R = V diag(r) Vᵀ the inverse with λI is exact:

    X ↦ U ((Uᵀ X V) / ((W/T) l rᵀ + λ)) Vᵀ

which is symmetric and positive definite as it is computed, however U and V are rounded. The scale s
is the mean of the diagonal of the parameter's block, W ‖p̄‖² / numel, with p̄ the gradient of the
drawn labels: the gradients of single targets are uncorrelated there, so that the square of their
sum is the sum of their squares, on average.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple, final

import torch
from torch import Tensor

from hvp_core.blame import raised_again
from hvp_core.curvature.factor_sums import Place, Share, Tally, Totals
from hvp_core.errors import CurvatureError
from hvp_core.linop.preconditioner import Preconditioner
from hvp_core.precision import exact_products
from hvp_core.vectors.space import ParameterSpace

#: Kinds of terms of which both factors are known. A tensor that is used as a matrix and by rows
#: has a sum of two products, which is none.
_KNOWN = ({"mm"}, {"rows"})


class Basis(NamedTuple):
    """A factor by its eigenvalues (size,) and eigenvectors (size, size); None: unit vectors."""

    values: Tensor
    vectors: Tensor | None

    @staticmethod
    def of(factor: Tensor) -> Basis:
        """Decompose a factor, which is overwritten by its eigenvectors."""
        if factor.dim() == 1:
            return Basis(factor.clamp(min=0), None)
        values, vectors = torch.linalg.eigh(factor.double())
        factor.copy_(vectors)
        return Basis(values.clamp_(min=0).to(factor.dtype), factor)


class Block(NamedTuple):
    """The matrix of one parameter, with its scale in the left eigenvalues."""

    left: Basis
    right: Basis

    def solve(self, x: Tensor, damping: float) -> Tensor:
        """The inverse with λI, times the vector x (m, n)."""
        (left, u), (right, v) = self.left, self.right
        y = x if u is None else u.T @ x
        y = y if v is None else y @ v
        y = y / torch.outer(left, right).add_(damping)
        y = y if u is None else u @ y
        return y if v is None else y @ v.T


@final
class KroneckerFactors:
    """The matrix, of which each rank holds the blocks of some parameters.

    All ranks make it together.

    Args:
        space: Space of the vectors.
        totals: The factors; overwritten.
        gradient: The gradient that they were made with, this rank's shard.
        num_targets: W, the number of targets of the whole batch.
        labels: Whose labels the gradient has, in words.

    Raises:
        CurvatureError: NON_FINITE: factors overflow.
    """

    def __init__(
        self,
        space: ParameterSpace,
        totals: Totals,
        gradient: Tensor,
        num_targets: float,
        labels: str,
    ):
        self._space, self._num_targets = space, num_targets
        shares = [
            share._replace(places=tuple(p for p in share.places if _is_known(totals, p)))
            for share in totals.shares
        ]
        self._shares: list[Share] = shares
        self._blocks: dict[str, Block] = {}
        with space.collective.same_fate(raised_again):
            for share, chunk in zip(shares, totals.chunks, strict=True):
                for place in share.places:
                    if place.owner == space.collective.rank:
                        tally = totals.tallies[place.name]
                        self._blocks[place.name] = self._block(place, chunk, tally)
        places = [place for share in shares for place in share.places]
        known = {place.name for place in places}
        squares = space.dots_by_part(gradient, gradient).tolist()
        #: The scale of each parameter without factors, by its number.
        self._scales = {
            number: num_targets * square / each.numel
            for number, (each, square) in enumerate(
                zip(space.layout.parameters, squares, strict=True)
            )
            if each.name not in known
        }
        dense = sum(place.left.is_dense and place.right.is_dense for place in places)
        self._told = (
            f"Kronecker factors of {len(known)} matrices, {len(known) - dense} of them with a "
            f"diagonal factor; a number for each of {len(self._scales)} other parameters; labels "
            f"{labels}"
        )

    def _block(self, place: Place, chunk: Tensor, tally: Tally) -> Block:
        left, right = place.views(chunk)
        if not (left.isfinite().all() and right.isfinite().all()):
            raise CurvatureError(
                "NON_FINITE",
                f"the Kronecker factors of {place.name} are not finite although the gradient is; "
                "use float64, or another preconditioner",
                {"parameter": place.name},
            )
        found = Block(Basis.of(left), Basis.of(right))
        found.left.values.mul_(self._num_targets / float(tally.num_positions))
        return found

    def __str__(self) -> str:
        return self._told

    @exact_products()
    def solve(self, vector: Tensor, damping: float) -> Tensor:
        """The inverse of the matrix with λI, times a vector.

        Cost: a gather and a sum over the ranks of each segment, 2 m n (m + n) multiplications for
        a matrix (m, n), on the rank that has its factors. Memory: a segment twice, and the result.

        Args:
            vector: This rank's shard; read only.
            damping: λ > 0.
        """
        space, found = self._space, torch.zeros_like(vector)
        for number, here in space.stretches:
            if number in self._scales:
                torch.div(vector[here], self._scales[number] + damping, out=found[here])
        for segment, places, _ in self._shares:
            if not places:
                continue
            here = slice(segment.shard_offset, segment.shard_offset + segment.chunk)
            flat = space.collective.gather(vector[here])
            solved = torch.zeros_like(flat)
            xs, ys = segment.views(flat), segment.views(solved)
            for place in places:
                if place.name in self._blocks:
                    name = place.name
                    ys[name].copy_(self._blocks[name].solve(xs[name], damping))
            space.collective.scatter_sum(solved, found[here])
        return found


def _is_known(totals: Totals, place: Place) -> bool:
    """Whether the factors of a matrix are all that its derivative was made of."""
    tally = totals.tallies.get(place.name)
    return tally is not None and tally.kinds in _KNOWN and float(tally.num_positions) > 0


@final
class KroneckerPreconditioner(Preconditioner):
    """F + λI with a matrix F of Kronecker products.

    Args:
        compute: Computes the matrix; all ranks call it together.
        damping: λ > 0.
    """

    def __init__(self, compute: Callable[[], KroneckerFactors], damping: float):
        self._compute, self._damping = compute, damping

    @cached_property
    def _factors(self) -> KroneckerFactors:
        return self._compute()

    def prepare(self) -> None:
        """See Preconditioner."""
        _ = self._factors

    def __call__(self, vector: Tensor) -> Tensor:
        """See Preconditioner."""
        return self._factors.solve(vector, self._damping)

    def __str__(self) -> str:
        return str(self._factors)
