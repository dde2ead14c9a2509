"""Operators on some of the coordinates: P A P, with P that makes zero of all others."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor

from hvp_core.linop.compositions import square
from hvp_core.linop.linear_operator import LinearOperator
from hvp_core.sharding.layout import Run
from hvp_core.vectors.vector_space import Distribution, VectorSpace

#: Canonical indices [start, stop).
Stretch = tuple[int, int]


def _are_apart(stretches: Sequence[Stretch]) -> bool:
    """Whether each stretch ends before the next one begins."""
    ends = [end for stretch in stretches for end in stretch]
    return ends == sorted(ends)


@final
class Selection:
    """Some of the coordinates of a space.

    Args:
        space: The whole space.
        runs: Stretches of the canonical order that this process' part of a vector covers.
        stretches: The selected coordinates, as canonical indices in ascending order, the same on
            every process.

    Raises:
        ValueError: The stretches overlap or leave the space, or there is none.
    """

    def __init__(self, space: VectorSpace, runs: Sequence[Run], stretches: Sequence[Stretch]):
        if not stretches:
            raise ValueError("no coordinate is selected")
        if not _are_apart([(0, 0), *stretches, (space.dimension, space.dimension)]):
            raise ValueError(
                f"the stretches {list(stretches)} are not disjoint, ascending parts of 0 to "
                f"{space.dimension}"
            )
        self.stretches = tuple(stretches)
        self.dimension = sum(stop - start for start, stop in stretches)
        #: Boolean (local,): true where this process holds a selected coordinate.
        self.mask = space.zeros().bool()
        for run in runs:
            offset = run.shard_offset - run.flat_start
            for start, stop in stretches:
                first, last = max(start, run.flat_start), min(stop, run.flat_stop)
                if first < last:
                    self.mask[offset + first : offset + last] = True

    def only(self, vector: Tensor) -> Tensor:
        """A new vector (local,): this one, with zeros for all coordinates that are not selected.

        Infinities and NaN of other coordinates become zeros too.
        """
        return torch.where(self.mask, vector, 0)


@final
class SelectedSpace(VectorSpace):
    """Vectors of a space that are zero outside a selection.

    Args:
        whole: The whole space.
        selection: The selected coordinates of that space.
    """

    def __init__(self, whole: VectorSpace, selection: Selection):
        self.dtype = whole.dtype
        self._whole, self._selection = whole, selection

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, SelectedSpace)
            and self._whole == other._whole
            and self._selection is other._selection
        )

    def __hash__(self) -> int:
        return hash((self._whole, id(self._selection)))

    @property
    def dimension(self) -> int:
        """Number of selected coordinates."""
        return self._selection.dimension

    def zeros(self) -> Tensor:
        """See VectorSpace."""
        return self._whole.zeros()

    def dots(self, rows: Tensor, vector: Tensor) -> Tensor:
        """See VectorSpace."""
        return self._whole.dots(rows, vector)

    def random(self, seed: int, distribution: Distribution) -> Tensor:
        """The selected coordinates of the whole space's vector; on the sphere, of norm 1."""
        is_sphere = distribution == "sphere"
        vector = self._selection.only(
            self._whole.random(seed, "gaussian" if is_sphere else distribution)
        )
        if is_sphere:
            vector /= float(self.dots(vector.unsqueeze(0), vector)[0]) ** 0.5
        return vector

    def coordinate(self, index: int) -> Tensor:
        """See VectorSpace; the index counts the selected coordinates alone."""
        for start, stop in self._selection.stretches:
            if index < stop - start:
                return self._whole.coordinate(start + index)
            index -= stop - start
        raise IndexError("there are fewer selected coordinates")

    def parts(self) -> Mapping[str, int]:
        """The whole space's, with the coordinates that are not selected."""
        return self._whole.parts()

    def dots_by_part(self, left: Tensor, right: Tensor) -> Tensor:
        """See VectorSpace."""
        return self._whole.dots_by_part(left, right)

    def only(self, vector: Tensor, parts: Collection[int]) -> Tensor:
        """See VectorSpace."""
        return self._whole.only(vector, parts)

    def agree(self, found: Any) -> Any:
        """See VectorSpace."""
        return self._whole.agree(found)


@final
class Restricted(LinearOperator):
    """P A P on the selected coordinates: the submatrix of A, in vectors of A's length.

    Its noise is that of A, relative to A's norm, which may be larger than its own.

    Args:
        operator: A.
        selection: The selected coordinates.

    Raises:
        ValueError: A gives vectors of another space than it takes.
    """

    def __init__(self, operator: LinearOperator, selection: Selection):
        square(operator)
        self.domain = self.codomain = SelectedSpace(operator.domain, selection)
        self.symmetric, self.semidefinite = operator.symmetric, operator.semidefinite
        self.noise, self.most_together = operator.noise, operator.most_together
        self._operator, self._selection = operator, selection

    def apply(self, vectors: Sequence[Tensor], *, borrow: bool = False) -> list[Tensor]:
        """See LinearOperator; what a vector has outside the selection counts as zero."""
        selected = [self._selection.only(vector) for vector in vectors]
        products = self._operator.apply(selected, borrow=True)
        return [self._selection.only(product) for product in products]

    def exact(self) -> LinearOperator | None:
        """The exact operator, restricted alike."""
        return self._exact

    @cached_property
    def _exact(self) -> LinearOperator | None:
        exact = self._operator.exact()
        return exact and Restricted(exact, self._selection)
