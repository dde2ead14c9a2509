"""Operators made of operators: multiples, sums, shifts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import final

import torch
from torch import Tensor

from hvp_core.linop.linear_operator import LinearOperator


def square(operator: LinearOperator) -> None:
    """Check that an operator gives vectors of the space that it takes them from.

    Raises:
        ValueError: The operator's products are of another space than its arguments.
    """
    if operator.domain != operator.codomain:
        raise ValueError("the operator's products are of another space than its arguments")


@final
class Scaled(LinearOperator):
    """A multiple sA of an operator.

    Args:
        operator: A.
        factor: s.
    """

    def __init__(self, operator: LinearOperator, factor: float):
        self.domain, self.codomain = operator.domain, operator.codomain
        self.symmetric, self.noise = operator.symmetric, operator.noise
        self.semidefinite = operator.semidefinite and factor >= 0
        self.most_together = operator.most_together
        self._operator, self._factor = operator, factor

    def apply(self, vectors: Sequence[Tensor], *, borrow: bool = False) -> list[Tensor]:
        """See LinearOperator."""
        products = self._operator.apply(vectors, borrow=True)
        return [torch.mul(product, self._factor) for product in products]

    def exact(self) -> LinearOperator | None:
        """The same multiple of the exact operator."""
        return self._exact

    @cached_property
    def _exact(self) -> LinearOperator | None:
        exact = self._operator.exact()
        return exact and Scaled(exact, self._factor)


@final
class Sum(LinearOperator):
    """The sum of operators between the same spaces.

    Its noise is that of all terms together, relative to the terms' norms: where they cancel, the
    sum is known less well than that.

    Args:
        terms: One operator or more.

    Raises:
        ValueError: The terms are of different spaces, or there is none.
    """

    def __init__(self, *terms: LinearOperator):
        if not terms:
            raise ValueError("a sum of no operators has no space")
        first = terms[0]
        if any((each.domain, each.codomain) != (first.domain, first.codomain) for each in terms):
            raise ValueError("the terms of a sum are operators between the same spaces")
        self.domain, self.codomain = first.domain, first.codomain
        self.symmetric = all(each.symmetric for each in terms)
        self.semidefinite = all(each.semidefinite for each in terms)
        self.noise = sum(each.noise for each in terms)
        bounds = [each.most_together for each in terms if each.most_together is not None]
        self.most_together = min(bounds, default=None)
        self._terms = terms

    def apply(self, vectors: Sequence[Tensor], *, borrow: bool = False) -> list[Tensor]:
        """See LinearOperator."""
        totals = self._terms[0].apply(vectors)
        for term in self._terms[1:]:
            # Terms may share the memory that they lend: each is added before the next is asked.
            for total, product in zip(totals, term.apply(vectors, borrow=True), strict=True):
                total.add_(product)
        return totals

    def exact(self) -> LinearOperator | None:
        """The sum of the exact operators; None where a term has no exact operator."""
        return self._exact

    @cached_property
    def _exact(self) -> LinearOperator | None:
        exact = [each.exact() for each in self._terms]
        known = [each for each in exact if each is not None]
        return Sum(*known) if len(known) == len(exact) else None


@final
class Shifted(LinearOperator):
    """A shifted operator A + σI.

    Its noise is that of A, relative to A's norm: where the shift cancels much of A, the result is
    known less well than that.

    Args:
        operator: A.
        shift: σ.

    Raises:
        ValueError: A gives vectors of another space than it takes.
    """

    def __init__(self, operator: LinearOperator, shift: float):
        square(operator)
        self.domain = self.codomain = operator.domain
        self.symmetric, self.noise = operator.symmetric, operator.noise
        self.semidefinite = operator.semidefinite and shift >= 0
        self.most_together = operator.most_together
        self._operator, self._shift = operator, shift

    def apply(self, vectors: Sequence[Tensor], *, borrow: bool = False) -> list[Tensor]:
        """See LinearOperator."""
        products = self._operator.apply(vectors, borrow=True)
        return [
            torch.add(product, vector, alpha=self._shift)
            for product, vector in zip(products, vectors, strict=True)
        ]

    def exact(self) -> LinearOperator | None:
        """The exact operator with the same shift."""
        return self._exact

    @cached_property
    def _exact(self) -> LinearOperator | None:
        exact = self._operator.exact()
        return exact and Shifted(exact, self._shift)
