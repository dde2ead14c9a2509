"""The protocols of numpy's arrays and SciPy's operators, for blocking handles."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache, wraps
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from hvp_client._algebra import is_number


class Fetched(ABC):
    """A handle that numpy takes for an array; each conversion fetches the elements.

    Law: np.asarray(v) == v.numpy().
    """

    @abstractmethod
    def numpy(self) -> NDArray[Any]:
        """Fetch the elements."""

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError("the elements are on the server; what is fetched of them is a copy")
        return np.asarray(self.numpy(), dtype)


class SymmetricLinearOperator(ABC):
    """A symmetric operator; an instance is a `scipy.sparse.linalg.LinearOperator` if that exists.

    SciPy takes a third of a second to import, and it may be absent, so that a class statement
    cannot name it as a base. The first operator that is made imports it and becomes an instance of
    a subclass of both. It is a real subclass from the start, not one at the first use, so that
    `isinstance` and every method of SciPy's are the same whoever asks and whenever.

    Law: A == Aᵀ == Aᴴ.
    """

    def __new__(cls, *_: Any) -> Self:
        """Make an instance of the class that is also SciPy's."""
        made: Self = super().__new__(_joined(cls))
        return made

    if TYPE_CHECKING:
        # SciPy's, where there is SciPy, and then an operator of SciPy's.
        def __pow__(self, power: int) -> Any: ...
        def dot(self, other: Any) -> Any:
            """Multiply by a number, an operator, an array or a vector."""

    @property
    def T(self) -> Self:  # noqa: N802 (numpy's name)
        """The transpose: this operator itself."""
        return self

    @property
    def H(self) -> Self:  # noqa: N802 (SciPy's name)
        """The adjoint: this operator itself."""
        return self

    @abstractmethod
    def matvec(self, v: Any) -> Any:
        """Apply it to one vector."""

    @abstractmethod
    def matmat(self, V: Any) -> Any:
        """Apply it to several vectors."""

    @abstractmethod
    def __matmul__(self, other: Any) -> Any: ...

    def rmatvec(self, v: Any) -> Any:
        """Aᴴv, which is Av."""
        return self.matvec(v)

    def rmatmat(self, V: Any) -> Any:
        """AᴴV, which is AV."""
        return self.matmat(V)

    # SciPy's `adjoint()` and `transpose()` ask these.
    def _adjoint(self) -> Self:
        return self

    def _transpose(self) -> Self:
        return self


_ARITHMETIC = ("__add__", "__sub__", "__mul__", "__rmul__", "__truediv__")


def _else(ours: Callable[[Any, Any], Any], scipys: Callable[[Any, Any], Any]) -> Any:
    """A method of arithmetic that leaves to SciPy what is not ours."""

    @wraps(ours)
    def method(self: Any, other: Any) -> Any:
        found = ours(self, other)
        return scipys(self, other) if found is NotImplemented else found

    return method


@cache
def _joined(cls: type[Any]) -> type[Any]:
    """A subclass of this class and SciPy's; this class itself where there is no SciPy."""
    try:
        from scipy.sparse.linalg import LinearOperator
    except ImportError:
        return cls

    class Joined(cls, LinearOperator):  # type: ignore[misc] # a base known at run time alone
        # What is no sum or multiple on the server is for SciPy, as are products of operators; ours
        # are arrays, and vectors on the ranks.
        def dot(self, x: Any) -> Any:
            if is_number(x):
                return self * x
            known = isinstance(x, LinearOperator) or np.isscalar(x)
            return LinearOperator.dot(self, x) if known else super().__matmul__(x)

        def __matmul__(self, other: Any) -> Any:
            known = isinstance(other, LinearOperator)
            return LinearOperator.dot(self, other) if known else super().__matmul__(other)

    for name in _ARITHMETIC:
        setattr(Joined, name, _else(getattr(cls, name), getattr(LinearOperator, name)))
    for name in ("__module__", "__name__", "__qualname__", "__doc__"):
        setattr(Joined, name, getattr(cls, name))
    return Joined
