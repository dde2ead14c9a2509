"""A linear operator, known by its products."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from hvp_core.vectors.vector_space import VectorSpace


class LinearOperator(ABC):
    """A linear operator from one space to another, known by its products alone.

    Laws, each to `noise` relative to the operator's norm: A(au + bv) = aAu + bAv; where
    `symmetric`, u·Av = v·Au; where `semidefinite`, v·Av ≥ 0.

    Attributes:
        domain: The space of its arguments.
        codomain: The space of its products.
        symmetric: Whether it is known to be symmetric.
        semidefinite: Whether it is known to be symmetric without a negative eigenvalue.
        noise: Relative error of one product where that is more than the rounding of the vectors'
            dtype; else 0.
        most_together: How many vectors it should be given at once, for the memory that it takes for
            each; None where any number will do.
    """

    domain: VectorSpace
    codomain: VectorSpace
    symmetric: bool = False
    semidefinite: bool = False
    noise: float = 0.0
    most_together: int | None = None

    @abstractmethod
    def apply(self, vectors: Sequence[Tensor], *, borrow: bool = False) -> list[Tensor]:
        """The products with K vectors at once, which share what does not depend on them.

        Args:
            vectors: K of the domain, (local,) each; read, never written to.
            borrow: The products are good until the next call only, and are not written to: the
                operator may keep them where it computes them. Otherwise they are the caller's own.

        Returns:
            K vectors of the codomain.
        """

    def exact(self) -> LinearOperator | None:
        """The same operator, as exact as the vectors' dtype can hold its products.

        It is asked for before each product that needs it, so what is made the first time is kept.

        Returns:
            An operator; None where there is no memory for it. By default this one is exact.
        """
        return self
