"""The blocking handle of a vector: its awaitable twin and the wait."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any, final

import numpy as np
from numpy.typing import NDArray

from hvp_client._arrays import Fetched
from hvp_client._async_vector import AsyncVector
from hvp_client._handles import VectorFields, require_handle
from hvp_client._portal import Portal

if TYPE_CHECKING:
    from torch import Tensor


@final
class Vector(VectorFields, Fetched):
    """A vector of parameter space that lives on the server's ranks, n elements under a name.

    Element order is the canonical flat index: parameters as in the model's `named_parameters()`, a
    tied tensor once, row-major. Arithmetic happens on the ranks and gives new vectors. A vector
    that this client made is freed on the server some time after its last reference is gone, or at
    once by `delete()` or at the end of a `with` block, and at the latest when the client is closed
    or its process has ended, in whatever way. `keep()` lets it stay. One that was looked up by name
    belongs to whoever made it, an eigenvector to its job. `np.asarray(v)` fetches the elements.
    """

    def __init__(self, portal: Portal, twin: AsyncVector):
        super().__init__(twin._message)
        self._portal = portal
        self._twin = twin

    def dot(self, other: Vector) -> float:
        """u·v, accumulated in float64 on the ranks.

        Args:
            other: A vector of the same checkpoint and dtype.

        Returns:
            The inner product; only this number travels.

        Raises:
            InvalidArgumentError: `VECTOR_SPACE_MISMATCH`; `VECTOR_EXPECTED`: it is no vector.
            FailedPreconditionError: `INPUT_MISSING`: the ranks that held it are gone.
        """
        return self._portal.run(self._twin.dot(require_handle(other, Vector, "other")._twin))

    def norm(self) -> float:
        """‖v‖₂, accumulated in float64 on the ranks."""
        return self._portal.run(self._twin.norm())

    def numpy(self) -> NDArray[Any]:
        """Fetch the elements.

        Returns:
            A fresh array (n,) of the vector's dtype. Every chunk's checksum has been verified.

        Raises:
            FailedPreconditionError: `INPUT_MISSING`: the ranks that held it are gone.
        """
        return self._portal.run(self._twin.numpy())

    def torch(self) -> Tensor:
        """Fetch the elements as a torch tensor.

        Returns:
            A tensor (n,) of the vector's dtype on the CPU.

        Raises:
            ImportError: torch is not installed.
            FailedPreconditionError: `INPUT_MISSING`: the ranks that held it are gone.
        """
        return self._portal.run(self._twin.torch())

    def axpy(self, scale: float, other: Vector) -> Vector:
        """Add a multiple of another: v + scale·other in one step.

        Args:
            scale: A finite number.
            other: A vector of the same checkpoint and dtype.

        Returns:
            A new vector.

        Raises:
            InvalidArgumentError: `VECTOR_SPACE_MISMATCH`, `VECTOR_EXPECTED` or `NON_FINITE`.
        """
        return self._wrap(
            self._portal.run(self._twin.axpy(scale, require_handle(other, Vector, "other")._twin))
        )

    def keep(self) -> None:
        """Let it stay on the server until somebody deletes it: for another process, or tomorrow.

        What the server could not make again is written to its disk, so that a kept vector is there
        after a restart too.

        Raises:
            NotFoundError: It is gone already.
            ResourceExhaustedError: `DISK_FULL`.
            UnimplementedError: The server is of a version where every vector stays.
        """
        self._portal.run(self._twin.keep())

    def delete(self) -> None:
        """Free it on the server now.

        Raises:
            NotFoundError: It is gone already.
        """
        self._portal.run(self._twin.delete())

    def __add__(self, other: Vector) -> Vector:
        if not isinstance(other, Vector):
            return NotImplemented
        return self._wrap(self._portal.run(self._twin + other._twin))

    def __sub__(self, other: Vector) -> Vector:
        if not isinstance(other, Vector):
            return NotImplemented
        return self._wrap(self._portal.run(self._twin - other._twin))

    def __mul__(self, scale: float) -> Vector:
        if not isinstance(scale, (int, float, np.number)):
            return NotImplemented
        return self._wrap(self._portal.run(self._twin * float(scale)))

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Vector:
        if not isinstance(divisor, (int, float, np.number)):
            return NotImplemented
        return self._wrap(self._portal.run(self._twin / float(divisor)))

    def __neg__(self) -> Vector:
        return self._wrap(self._portal.run(-self._twin))

    def __enter__(self) -> Vector:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.delete()

    def _wrap(self, twin: AsyncVector) -> Vector:
        return Vector(self._portal, twin)
