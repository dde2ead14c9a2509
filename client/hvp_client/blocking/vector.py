"""The blocking side of `hvp_client.awaited.vector`: made of it by `make sdk`."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any, final

import numpy as np
from numpy.typing import NDArray

from hvp_client.awaited.vector import AsyncVector
from hvp_client.blocking.protocols import Fetched
from hvp_client.blocking.twins import Blocking, twin_of

if TYPE_CHECKING:
    from torch import Tensor


@final
class Vector(Blocking, Fetched, twin=AsyncVector):
    """A vector that lives on the server's ranks, n elements under a name.

    It belongs to parameter space, or to the outputs of a model on a batch. Element order is the
    canonical flat index: parameters as in the model's `named_parameters()`, a tied tensor once,
    row-major; or outputs row-major in `output_shape`. Arithmetic happens on the ranks; an
    `AsyncVector`'s is awaited: `w = await (u + v)`. numpy takes a `Vector` for an array, whose
    elements `np.asarray(v)` fetches; `v["lm_head.weight"]` fetches those of one parameter.

    A vector that this client made is freed on the server some time after its last reference is
    gone, or at once by `delete()` or at the end of a `with` block, and at the latest when the
    client is closed or its process has ended, in whatever way. `keep()` lets it stay. One that was
    looked up by name belongs to whoever made it, an eigenvector to its job.

    Law: what the properties tell does not change while the handle lives.
    """

    _twin: AsyncVector
    __array_ufunc__ = None

    @property
    def name(self) -> str:
        """`projects/{project}/vectors/{id}`."""
        return self._twin.name

    @property
    def checkpoint(self) -> str:
        """Name of the checkpoint whose parameters, or outputs, the vector has."""
        return self._twin.checkpoint

    @property
    def batch(self) -> str | None:
        """Name of the batch whose outputs the vector has; None in parameter space."""
        return self._twin.batch

    @property
    def parameters(self) -> tuple[str, ...]:
        """Patterns that select the parameters that the vector has; empty where it has all."""
        return self._twin.parameters

    @property
    def output_shape(self) -> tuple[int, ...] | None:
        """Shape of outputs, `(sequences, positions, vocabulary)`, or of the activation.

        It is None in parameter space.
        """
        return self._twin.output_shape

    @property
    def module(self) -> str | None:
        """Name of the submodule whose activation the vector has; None for any other vector."""
        return self._twin.module

    @property
    def of_input(self) -> bool:
        """Whether it has what the submodule is given, and not what it gives."""
        return self._twin.of_input

    @property
    def shape(self) -> tuple[int]:
        """`(n,)`, the number of elements."""
        return self._twin.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of the elements: float32 or float64."""
        return self._twin.dtype

    @property
    def durable(self) -> bool:
        """Whether the server can make the vector again when its ranks are started anew."""
        return self._twin.durable

    @property
    def create_time(self) -> datetime:
        """When the vector was made, UTC."""
        return self._twin.create_time

    def dot(self, other: Vector) -> float:
        """The inner product u·v, accumulated in float64 on the ranks.

        Args:
            other: A vector of the same space and dtype.

        Returns:
            The inner product; only this number travels.

        Raises:
            InvalidArgumentError: `VECTOR_SPACE_MISMATCH`; `VECTOR_EXPECTED`: `other` is no vector.
            FailedPreconditionError: `INPUT_MISSING`: the ranks that held a vector are gone.
        """
        return self._portal.run(self._twin.dot(twin_of(other)))

    def inner_products(self, others: Sequence[Vector]) -> NDArray[np.float64]:
        """The inner products of this vector with several others, in one call.

        Args:
            others: k vectors of the same space and dtype.

        Returns:
            k numbers, float64; only these travel. Errors as for `dot`.
        """
        return self._portal.run(self._twin.inner_products(twin_of(others)))

    def norm(self) -> float:
        """The norm ‖v‖₂, accumulated in float64 on the ranks; errors as for `dot`."""
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

    def named(self) -> dict[str, NDArray[Any]]:
        """Fetch the elements by parameter, as in the model's `named_parameters()`.

        Returns:
            An array of each parameter's shape, by its name and in the order of the vector; all are
            views of one array, and a tied tensor is there once.

        Raises:
            InvalidArgumentError: `VECTOR_SPACE_MISMATCH`: the vector has outputs, not parameters.
            FailedPreconditionError: `INPUT_MISSING`: the ranks that held it are gone.
        """
        return self._portal.run(self._twin.named())

    def __getitem__(self, parameter: str) -> NDArray[Any]:
        """Fetch the elements of one parameter; only they travel.

        Args:
            parameter: The parameter's name, as in the model's `named_parameters()`.

        Returns:
            An array of the parameter's shape.

        Raises:
            KeyError: No parameter has that name; the message lists the nearest ones.
            InvalidArgumentError: `VECTOR_SPACE_MISMATCH`: the vector has outputs, not parameters.
            FailedPreconditionError: `INPUT_MISSING`: the ranks that held it are gone.
        """
        return self._portal.run(self._twin.__getitem__(parameter))

    __iter__ = None

    def axpy(self, scale: float, other: Vector) -> Vector:
        """Add a multiple of another vector: v + scale·other in one step on the ranks.

        Args:
            scale: A finite number.
            other: A vector of the same space and dtype.

        Returns:
            A new vector.

        Raises:
            InvalidArgumentError: `VECTOR_SPACE_MISMATCH`, `VECTOR_EXPECTED` or `NON_FINITE`.
        """
        result: Vector = self._wait(self._twin.axpy(scale, twin_of(other)))
        return result

    def along(
        self, vectors: Sequence[Vector], factors: Sequence[float], rest: float = 0.0
    ) -> Vector:
        """Multiply by a matrix that is diagonal in orthonormal vectors: rest·v + Σ fᵢ (uᵢ·v) uᵢ.

        Args:
            vectors: Vectors uᵢ of the same space and dtype, such as eigenvectors.
            factors: A finite number fᵢ for each.
            rest: A finite number.

        Returns:
            A new vector. Two calls, in which the inner products travel and no elements.

        Raises:
            InvalidArgumentError: `VECTOR_SPACE_MISMATCH`, `VECTOR_EXPECTED` or `NON_FINITE`.
            FailedPreconditionError: `INPUT_MISSING`: the ranks that held a vector are gone.
        """
        result: Vector = self._wait(self._twin.along(twin_of(vectors), factors, rest))
        return result

    def keep(self) -> None:
        """Keep the vector on the server until somebody deletes it: for another process, or later.

        A vector that the server could not make again is written to its disk, so that a kept vector
        is there after a restart too.

        Raises:
            NotFoundError: The vector is gone already.
            ResourceExhaustedError: `DISK_FULL`.
            UnimplementedError: The server is of a version where every vector stays.
        """
        self._portal.run(self._twin.keep())

    def delete(self) -> None:
        """Free the vector on the server now.

        Raises:
            NotFoundError: The vector is gone already.
        """
        self._portal.run(self._twin.delete())

    def __add__(self, other: Vector) -> Vector:
        result: Vector = self._wait(self._twin.__add__(twin_of(other)))
        return result

    def __sub__(self, other: Vector) -> Vector:
        result: Vector = self._wait(self._twin.__sub__(twin_of(other)))
        return result

    def __mul__(self, scale: float) -> Vector:
        result: Vector = self._wait(self._twin.__mul__(scale))
        return result

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Vector:
        result: Vector = self._wait(self._twin.__truediv__(divisor))
        return result

    def __neg__(self) -> Vector:
        result: Vector = self._wait(self._twin.__neg__())
        return result

    def __enter__(self) -> Vector:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.delete()

    def __repr__(self) -> str:
        size = f"n={self.shape[0]:,}" if self.batch is None else f"outputs {self.output_shape}"
        return f"<{type(self).__name__} {size} {self.dtype} {self.name}>"
