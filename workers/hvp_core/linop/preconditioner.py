"""The interface of a preconditioner: a matrix near an operator that is cheap to invert."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor


class Preconditioner(ABC):
    """A positive definite matrix that is known by its inverse.

    Law: the inverse is linear, symmetric and positive definite, to rounding.
    """

    @abstractmethod
    def prepare(self) -> None:
        """Compute what the inverse needs, and refuse what makes no positive definite matrix.

        All processes call it together, once, before the first call of the inverse.

        Raises:
            CurvatureError: VECTORS_NOT_ORTHONORMAL, PRECONDITIONER_NOT_POSITIVE or NON_FINITE.
        """

    @abstractmethod
    def __call__(self, vector: Tensor) -> Tensor:
        """The product (local,) of the inverse and a vector (local,), which is only read."""

    @abstractmethod
    def __str__(self) -> str:
        """What it is, in a few words."""
