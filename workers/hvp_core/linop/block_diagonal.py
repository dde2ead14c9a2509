"""Operators without what couples blocks of their space: the sum of P A P over disjoint blocks."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cached_property
from typing import final

import torch
from hvp_operations.matrices import BLOCKS_TOGETHER
from torch import Tensor

from hvp_core.linop.compositions import growth, square
from hvp_core.linop.linear_operator import LinearOperator


@final
class BlockDiagonal(LinearOperator):
    """The sum of P A P over disjoint blocks of the space: A without the parts that couple them.

    Each product takes as many products with A as there are blocks, of which some go in one call.
    The noise is that of A, relative to what A has been seen to make of vectors on one block, which
    may be more than the operator's own norm, and is its `size`.

    Args:
        operator: A.
        blocks: Numbers of the parts of the space in each block; coordinates of no block belong to
            the operator's null space.

    Raises:
        ValueError: A gives vectors of another space than it takes; blocks overlap.
    """

    def __init__(self, operator: LinearOperator, blocks: Sequence[Collection[int]]):
        square(operator)
        numbers = [number for block in blocks for number in block]
        if len(set(numbers)) < len(numbers):
            raise ValueError("blocks have a part in common")
        self.domain = self.codomain = operator.domain
        self.symmetric, self.semidefinite = operator.symmetric, operator.semidefinite
        self.noise, self.most_together = operator.noise, operator.most_together
        self._operator, self._blocks = operator, [tuple(block) for block in blocks]
        self._seen = 0.0  # of ‖Av‖ / ‖v‖

    @property
    def size(self) -> float:
        """See LinearOperator."""
        return max(self._seen, self._operator.size)

    def apply(self, vectors: Sequence[Tensor], *, borrow: bool = False) -> list[Tensor]:
        """See LinearOperator."""
        return [self._product(vector) for vector in vectors]

    def _product(self, vector: Tensor) -> Tensor:
        space, total = self.domain, torch.zeros_like(vector)
        at_once = min(BLOCKS_TOGETHER, self.most_together or BLOCKS_TOGETHER)
        for start in range(0, len(self._blocks), at_once):
            some = self._blocks[start : start + at_once]
            parts = [space.only(vector, block) for block in some]
            products = self._operator.apply(parts, borrow=True)
            for block, part, product in zip(some, parts, products, strict=True):
                self._seen = max(self._seen, growth(space, part, product))
                total.add_(space.only(product, block))
        return total

    def exact(self) -> LinearOperator | None:
        """The exact operator, in the same blocks."""
        return self._exact

    @cached_property
    def _exact(self) -> LinearOperator | None:
        exact = self._operator.exact()
        return exact and BlockDiagonal(exact, self._blocks)
