"""A linear operator, known by its products."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from hvp_core.linop.preconditioner import Preconditioner
from hvp_core.vectors.vector_space import VectorSpace


class LinearOperator(ABC):
    """A linear operator from one space to another, known by its products alone.

    Laws, each to `noise` relative to the operator's norm, or to `size` where that is larger:
    A(au + bv) = aAu + bAv; u·Av = v·Aᵀu, and where `symmetric`, u·Av = v·Au; where `semidefinite`,
    v·Av ≥ 0.

    Attributes:
        domain: The space of its arguments.
        codomain: The space of its products.
        symmetric: Whether the operator is known to be symmetric.
        semidefinite: Whether it is known to be symmetric without a negative eigenvalue.
        noise: Relative error of one product where that is more than the rounding of the vectors'
            dtype; else 0.
        most_together: The most vectors that the operator should be given at once, for the memory
            that each of them takes; None where any number will do.
    """

    domain: VectorSpace
    codomain: VectorSpace
    symmetric: bool = False
    semidefinite: bool = False
    noise: float = 0.0
    most_together: int | None = None

    @property
    def size(self) -> float:
        """What the rounding of products goes by, where that may be more than the operator's norm.

        Where terms cancel, their errors do not. The number is what the terms together have been
        seen to make of a vector of norm one, in all products so far: the same on every process, and
        nearer to the sum of their norms with every product. By default it is 0, for the norm.
        """
        return 0.0

    @abstractmethod
    def apply(self, vectors: Sequence[Tensor], *, borrow: bool = False) -> list[Tensor]:
        """The products with K vectors at once, which share the work that does not depend on them.

        Args:
            vectors: K vectors of the domain, (local,) each; read, never written to.
            borrow: The products are good until the next call only, and the caller does not write to
                them: the operator may lend the memory that it computes them in. Otherwise they are
                the caller's own.

        Returns:
            K vectors of the codomain, (local,) each.
        """

    def apply_transposed(self, vectors: Sequence[Tensor], *, borrow: bool = False) -> list[Tensor]:
        """The products of the transpose with K vectors at once.

        Args:
            vectors: K vectors of the codomain, (local,) each; read, never written to.
            borrow: As for `apply`.

        Returns:
            K vectors of the domain, (local,) each. By default those of `apply`.

        Raises:
            TypeError: The operator is not symmetric, and has no products with its transpose.
        """
        if not self.symmetric:
            raise TypeError(f"{type(self).__name__} has no products with its transpose")
        return self.apply(vectors, borrow=borrow)

    def forms(self, vectors: Sequence[Tensor]) -> list[float] | None:
        """v·Av for K vectors at once, by a rule that takes less work than their products.

        An operator has such a rule only where it is semidefinite, and a form is computed as a sum
        of squares or variances: its rounding goes with its own size.

        Args:
            vectors: K vectors of the domain, (local,) each; read, never written to.

        Returns:
            K numbers, the same on every process; None where there is no such rule, at every call,
            and the numbers have to be taken of products. By default there is none.
        """
        return None

    def factored(self, damping: float, seed: int) -> Preconditioner | None:
        """The inverse of F + λI, with a matrix F near this one that its own structure gives.

        Nothing is computed before the preconditioner is prepared.

        Args:
            damping: λ, above 0.
            seed: Seed of what is drawn to make F.

        Returns:
            The preconditioner; None where no such structure is known, as by default.
        """
        return None

    def exact(self) -> LinearOperator | None:
        """The same operator, as exact as the vectors' dtype can hold its products.

        This method is called before each product that needs the exact operator, so an operator that
        is made at the first call is kept.

        Returns:
            The exact operator; None where there is no memory for it. By default it is this one.
        """
        return self
