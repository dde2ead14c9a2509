"""Operators made of operators: multiples, sums, shifts, transposes, preconditioned ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import final

import torch
from torch import Tensor

from hvp_core.linop.linear_operator import LinearOperator
from hvp_core.vectors.vector_space import VectorSpace


def square(operator: LinearOperator) -> None:
    """Check that an operator gives vectors of the space that it takes them from.

    Raises:
        ValueError: The operator's products are of another space than its arguments.
    """
    if operator.domain != operator.codomain:
        raise ValueError("the operator's products are of another space than its arguments")


def _norm(space: VectorSpace, vector: Tensor) -> float:
    """The norm of a vector; 0 where it is no finite number, which others see to."""
    squared = float(space.dots(vector.unsqueeze(0), vector)[0])
    return math.sqrt(squared) if math.isfinite(squared) else 0.0


def growth(space: VectorSpace, vector: Tensor, product: Tensor) -> float:
    """‖Av‖ / ‖v‖; 0 of a zero vector."""
    length = _norm(space, vector)
    return _norm(space, product) / length if length else 0.0


@final
class Identity(LinearOperator):
    """The identity I.

    Args:
        space: The space of its vectors.
    """

    symmetric = semidefinite = True

    def __init__(self, space: VectorSpace):
        self.domain = self.codomain = space

    def apply(self, vectors: Sequence[Tensor], *, borrow: bool = False) -> list[Tensor]:
        """See LinearOperator."""
        return list(vectors) if borrow else [vector.clone() for vector in vectors]

    def forms(self, vectors: Sequence[Tensor]) -> list[float] | None:
        """See LinearOperator."""
        return [float(self.domain.dots(each.unsqueeze(0), each)[0]) for each in vectors]


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

    @property
    def size(self) -> float:
        """See LinearOperator."""
        return abs(self._factor) * self._operator.size

    def apply(self, vectors: Sequence[Tensor], *, borrow: bool = False) -> list[Tensor]:
        """See LinearOperator."""
        products = self._operator.apply(vectors, borrow=True)
        return [torch.mul(product, self._factor) for product in products]

    def forms(self, vectors: Sequence[Tensor]) -> list[float] | None:
        """See LinearOperator."""
        forms = self._operator.forms(vectors) if self.semidefinite else None
        return None if forms is None else [self._factor * form for form in forms]

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

    Its noise is that of all terms together. Where terms may cancel, it is relative to the sum of
    the terms' norms, which `size` measures.

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
        self._size = 0.0

    @property
    def size(self) -> float:
        """See LinearOperator: what all terms together have been seen to make of a vector."""
        return self._size

    def apply(self, vectors: Sequence[Tensor], *, borrow: bool = False) -> list[Tensor]:
        """See LinearOperator."""
        totals = self._terms[0].apply(vectors)
        sizes = [self._lengths(totals)]
        for term in self._terms[1:]:
            # Terms may share the memory that they lend: each is added before the next is asked.
            products = term.apply(vectors, borrow=True)
            sizes.append(self._lengths(products))
            for total, product in zip(totals, products, strict=True):
                total.add_(product)
        self._measure(vectors, sizes)
        return totals

    def _lengths(self, products: Sequence[Tensor]) -> list[float]:
        """The norms of a term's products, where terms may cancel; else nothing."""
        if self.semidefinite or len(self._terms) == 1:
            return []
        return [_norm(self.codomain, product) for product in products]

    def _measure(self, vectors: Sequence[Tensor], sizes: Sequence[Sequence[float]]) -> None:
        self._size = max(self._size, sum(term.size for term in self._terms))
        if self.semidefinite or len(self._terms) == 1:
            return
        for vector, *lengths in zip(vectors, *sizes, strict=True):
            if length := _norm(self.domain, vector):
                self._size = max(self._size, sum(lengths) / length)

    def forms(self, vectors: Sequence[Tensor]) -> list[float] | None:
        """See LinearOperator: where every term has such a rule."""
        totals = [0.0 for _ in vectors]
        for term in self._terms:
            forms = term.forms(vectors) if self.semidefinite else None
            if forms is None:
                return None
            totals = [total + form for total, form in zip(totals, forms, strict=True)]
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

    Its noise is that of A. Where the shift may cancel some of A, it is relative to ‖A‖ + |σ|, which
    `size` measures.

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
        self._seen = 0.0  # of ‖Av‖ / ‖v‖

    @property
    def size(self) -> float:
        """See LinearOperator."""
        own = max(self._seen, self._operator.size)
        return own + abs(self._shift) if own else 0.0

    def apply(self, vectors: Sequence[Tensor], *, borrow: bool = False) -> list[Tensor]:
        """See LinearOperator."""
        products = self._operator.apply(vectors, borrow=True)
        if not self.semidefinite:
            for vector, product in zip(vectors, products, strict=True):
                self._seen = max(self._seen, growth(self.domain, vector, product))
        return [
            torch.add(product, vector, alpha=self._shift)
            for product, vector in zip(products, vectors, strict=True)
        ]

    def forms(self, vectors: Sequence[Tensor]) -> list[float] | None:
        """See LinearOperator."""
        forms = self._operator.forms(vectors) if self.semidefinite else None
        if forms is None:
            return None
        squares = [float(self.domain.dots(each.unsqueeze(0), each)[0]) for each in vectors]
        return [form + self._shift * each for form, each in zip(forms, squares, strict=True)]

    def exact(self) -> LinearOperator | None:
        """The exact operator with the same shift."""
        return self._exact

    @cached_property
    def _exact(self) -> LinearOperator | None:
        exact = self._operator.exact()
        return exact and Shifted(exact, self._shift)


@final
class Preconditioned(LinearOperator):
    """D^-1/2 A D^-1/2 with a positive diagonal D.

    Its noise is that of A: the error of an element of a product goes with the elements that it is
    summed of, and both are scaled alike.

    Args:
        operator: A.
        root: The diagonal of D^-1/2, this process' part (local,), positive.

    Raises:
        ValueError: A gives vectors of another space than it takes.
    """

    def __init__(self, operator: LinearOperator, root: Tensor):
        square(operator)
        self.domain = self.codomain = operator.domain
        self.symmetric, self.semidefinite = operator.symmetric, operator.semidefinite
        self.noise, self.most_together = operator.noise, operator.most_together
        self._operator, self._root = operator, root
        self._seen = self._seen_of_operator = 0.0  # of ‖Pv‖ / ‖v‖, and of A

    @property
    def size(self) -> float:
        """See LinearOperator: as much larger than this norm as A's is than A's norm."""
        size = self._operator.size
        return self._seen * size / self._seen_of_operator if self._seen_of_operator else 0.0

    def apply(self, vectors: Sequence[Tensor], *, borrow: bool = False) -> list[Tensor]:
        """See LinearOperator."""
        scaled = [self._root * each for each in vectors]
        found = self._operator.apply(scaled, borrow=True)
        products = [self._root * product for product in found]
        if self._operator.size:
            for v, w, aw, product in zip(vectors, scaled, found, products, strict=True):
                self._seen_of_operator = max(self._seen_of_operator, growth(self.domain, w, aw))
                self._seen = max(self._seen, growth(self.domain, v, product))
        return products

    def forms(self, vectors: Sequence[Tensor]) -> list[float] | None:
        """See LinearOperator."""
        return self._operator.forms([self._root * each for each in vectors])

    def exact(self) -> LinearOperator | None:
        """The exact operator, preconditioned alike."""
        return self._exact

    @cached_property
    def _exact(self) -> LinearOperator | None:
        exact = self._operator.exact()
        return exact and Preconditioned(exact, self._root)


@final
class Transposed(LinearOperator):
    """The transpose Aᵀ of an operator that has products with it.

    Args:
        operator: A.
    """

    def __init__(self, operator: LinearOperator):
        self.domain, self.codomain = operator.codomain, operator.domain
        self.symmetric, self.noise = operator.symmetric, operator.noise
        self.semidefinite = operator.semidefinite
        self.most_together = operator.most_together
        self._operator = operator

    def apply(self, vectors: Sequence[Tensor], *, borrow: bool = False) -> list[Tensor]:
        """See LinearOperator."""
        return self._operator.apply_transposed(vectors, borrow=borrow)

    def apply_transposed(self, vectors: Sequence[Tensor], *, borrow: bool = False) -> list[Tensor]:
        """See LinearOperator."""
        return self._operator.apply(vectors, borrow=borrow)

    def exact(self) -> LinearOperator | None:
        """The transpose of the exact operator."""
        return self._exact

    @cached_property
    def _exact(self) -> LinearOperator | None:
        exact = self._operator.exact()
        return exact and Transposed(exact)
