"""Vectors, by name: they live on the server's ranks."""

from __future__ import annotations

import difflib
import math
import weakref
from collections.abc import Coroutine, Mapping, Sequence
from datetime import datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, final

import numpy as np
from hvp_operations.wording import shown
from hvp_protos.v1 import vector_pb2
from numpy.typing import NDArray

from hvp_client._bulk import read_elements, write_elements
from hvp_client._checkpoints import ParameterTensor, parameter_tensors
from hvp_client._exceptions import HvpError, InvalidArgumentError
from hvp_client._handles import require_handle
from hvp_client._selections import chosen
from hvp_client._session import Session
from hvp_client._spaces import VectorSpace
from hvp_client._specs import check_seed
from hvp_client._times import from_timestamp

if TYPE_CHECKING:
    from torch import Tensor

Distribution = Literal["rademacher", "gaussian", "sphere"]


@final
class AsyncVector:
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

    # numpy on the left, as in np.float64(2) * v, leaves the result to this class.
    __array_ufunc__ = None

    def __init__(self, session: Session, message: vector_pb2.Vector, *, temporary: bool):
        self._session = session
        self._message = message
        self._finalizer = weakref.finalize(self, session.released.append, message.name)
        # The server outlives this process, and close() sends what was released until then.
        self._finalizer.atexit = False
        if not temporary:
            self._finalizer.detach()

    @property
    def name(self) -> str:
        """`projects/{project}/vectors/{id}`."""
        return self._message.name

    @property
    def checkpoint(self) -> str:
        """Name of the checkpoint whose parameters, or outputs, the vector has."""
        return self._message.checkpoint

    @property
    def batch(self) -> str | None:
        """Name of the batch whose outputs the vector has; None in parameter space."""
        return self._message.data_batch or None

    @property
    def parameters(self) -> tuple[str, ...]:
        """Patterns that select the parameters that the vector has; empty where it has all."""
        return tuple(self._message.parameters)

    @property
    def output_shape(self) -> tuple[int, ...] | None:
        """Shape of outputs, `(sequences, positions, vocabulary)`, or of the activation.

        It is None in parameter space.
        """
        return tuple(self._message.shape) if self._message.data_batch else None

    @property
    def module(self) -> str | None:
        """Name of the submodule whose activation the vector has; None for any other vector."""
        return self._message.module or None

    @property
    def of_input(self) -> bool:
        """Whether it has what the submodule is given, and not what it gives."""
        return self._message.of_input

    @property
    def shape(self) -> tuple[int]:
        """`(n,)`, the number of elements."""
        return (self._message.num_elements,)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of the elements: float32 or float64."""
        return np.dtype(self._message.dtype)

    @property
    def durable(self) -> bool:
        """Whether the server can make the vector again when its ranks are started anew."""
        return self._message.durable

    @property
    def create_time(self) -> datetime:
        """When the vector was made, UTC."""
        return from_timestamp(self._message.create_time)

    async def dot(self, other: AsyncVector) -> float:
        """The inner product u·v, accumulated in float64 on the ranks.

        Args:
            other: A vector of the same space and dtype.

        Returns:
            The inner product; only this number travels.

        Raises:
            InvalidArgumentError: `VECTOR_SPACE_MISMATCH`; `VECTOR_EXPECTED`: `other` is no vector.
            FailedPreconditionError: `INPUT_MISSING`: the ranks that held a vector are gone.
        """
        return float((await self.inner_products([other]))[0])

    async def inner_products(self, others: Sequence[AsyncVector]) -> NDArray[np.float64]:
        """The inner products of this vector with several others, in one call.

        Args:
            others: k vectors of the same space and dtype.

        Returns:
            k numbers, float64; only these travel. Errors as for `dot`.
        """
        names = [require_handle(each, AsyncVector, "other").name for each in others]
        pair = vector_pb2.ReduceVectorsRequest.Pair
        answer = await self._session.wire.unary(
            "VectorService/ReduceVectors",
            vector_pb2.ReduceVectorsRequest(
                inner_products=[pair(left=self.name, right=name) for name in names]
            ),
            vector_pb2.ReduceVectorsResponse,
            timeout_s=self._session.wire.timeout.compute_s,
        )
        return np.array(answer.inner_products)

    async def norm(self) -> float:
        """The norm ‖v‖₂, accumulated in float64 on the ranks; errors as for `dot`."""
        return math.sqrt(await self.dot(self))

    async def numpy(self) -> NDArray[Any]:
        """Fetch the elements.

        Returns:
            A fresh array (n,) of the vector's dtype. Every chunk's checksum has been verified.

        Raises:
            FailedPreconditionError: `INPUT_MISSING`: the ranks that held it are gone.
        """
        return await read_elements(self._session, self.name, self.shape[0], self.dtype)

    async def torch(self) -> Tensor:
        """Fetch the elements as a torch tensor.

        Returns:
            A tensor (n,) of the vector's dtype on the CPU.

        Raises:
            ImportError: torch is not installed.
            FailedPreconditionError: `INPUT_MISSING`: the ranks that held it are gone.
        """
        from torch import from_numpy

        return from_numpy(await self.numpy())

    async def named(self) -> dict[str, NDArray[Any]]:
        """Fetch the elements by parameter, as in the model's `named_parameters()`.

        Returns:
            An array of each parameter's shape, by its name and in the order of the vector; all are
            views of one array, and a tied tensor is there once.

        Raises:
            InvalidArgumentError: `VECTOR_SPACE_MISMATCH`: the vector has outputs, not parameters.
            FailedPreconditionError: `INPUT_MISSING`: the ranks that held it are gone.
        """
        tensors = await self._tensors()
        elements = await self.numpy()
        return {
            name: elements[each.offset : each.offset + each.num_elements].reshape(each.shape)
            for name, each in tensors.items()
        }

    async def __getitem__(self, parameter: str) -> NDArray[Any]:
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
        tensors = await self._tensors()
        if parameter not in tensors:
            near = difflib.get_close_matches(str(parameter), tensors, n=3, cutoff=0.0)
            raise KeyError(
                f"No parameter is called {shown(parameter)}; the nearest are {', '.join(near)}."
            )
        tensor = tensors[parameter]
        elements = await read_elements(
            self._session, self.name, tensor.num_elements, self.dtype, start=tensor.offset
        )
        return elements.reshape(tensor.shape)

    # Parameters are items; without this, Python would look for those named 0, 1, 2.
    __iter__ = None

    async def axpy(self, scale: float, other: AsyncVector) -> AsyncVector:
        """Add a multiple of another vector: v + scale·other in one step on the ranks.

        Args:
            scale: A finite number.
            other: A vector of the same space and dtype.

        Returns:
            A new vector.

        Raises:
            InvalidArgumentError: `VECTOR_SPACE_MISMATCH`, `VECTOR_EXPECTED` or `NON_FINITE`.
        """
        return await combine(self._session, [(1.0, self), (scale, other)])

    async def along(
        self, vectors: Sequence[AsyncVector], factors: Sequence[float], rest: float = 0.0
    ) -> AsyncVector:
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
        handles = [require_handle(each, AsyncVector, "vectors") for each in vectors]
        answer = await self._session.wire.unary(
            "VectorService/ReduceVectors",
            vector_pb2.ReduceVectorsRequest(
                inner_products=[
                    vector_pb2.ReduceVectorsRequest.Pair(left=each.name, right=self.name)
                    for each in handles
                ]
            ),
            vector_pb2.ReduceVectorsResponse,
            timeout_s=self._session.wire.timeout.compute_s,
        )
        terms = [
            (float(factor) * dot, each)
            for factor, dot, each in zip(factors, answer.inner_products, handles, strict=True)
        ]
        return await combine(self._session, [(float(rest), self), *terms])

    async def keep(self) -> None:
        """Keep the vector on the server until somebody deletes it: for another process, or later.

        A vector that the server could not make again is written to its disk, so that a kept vector
        is there after a restart too.

        Raises:
            NotFoundError: The vector is gone already.
            ResourceExhaustedError: `DISK_FULL`.
            UnimplementedError: The server is of a version where every vector stays.
        """
        await self._session.keep_vector(self.name)
        self._finalizer.detach()

    async def delete(self) -> None:
        """Free the vector on the server now.

        Raises:
            NotFoundError: The vector is gone already.
        """
        self._finalizer.detach()
        await self._session.delete_vector(self.name)

    def __add__(self, other: AsyncVector) -> Coroutine[Any, Any, AsyncVector]:
        if not isinstance(other, AsyncVector):
            return NotImplemented
        return combine(self._session, [(1.0, self), (1.0, other)])

    def __sub__(self, other: AsyncVector) -> Coroutine[Any, Any, AsyncVector]:
        if not isinstance(other, AsyncVector):
            return NotImplemented
        return combine(self._session, [(1.0, self), (-1.0, other)])

    def __mul__(self, scale: float) -> Coroutine[Any, Any, AsyncVector]:
        if not isinstance(scale, (int, float, np.number)):
            return NotImplemented
        return combine(self._session, [(float(scale), self)])

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Coroutine[Any, Any, AsyncVector]:
        if not isinstance(divisor, (int, float, np.number)):
            return NotImplemented
        return combine(self._session, [(1.0 / float(divisor), self)])

    def __neg__(self) -> Coroutine[Any, Any, AsyncVector]:
        return combine(self._session, [(-1.0, self)])

    async def __aenter__(self) -> AsyncVector:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.delete()

    async def _tensors(self) -> Mapping[str, ParameterTensor]:
        """Where each parameter lies in the vector, by its name."""
        if self.batch is not None:
            raise InvalidArgumentError(
                f"{self.name} is not of parameter space and has no parts by the parameters' names",
                reason="VECTOR_SPACE_MISMATCH",
                field="v",
            )
        tensors = await parameter_tensors(self._session, self.checkpoint)
        if not self.parameters:
            return tensors
        return {each.name: each for each in chosen(self.parameters, [*tensors.values()])}

    def __repr__(self) -> str:
        size = f"n={self.shape[0]:,}" if self.batch is None else f"outputs {self.output_shape}"
        return f"<{type(self).__name__} {size} {self.dtype} {self.name}>"


def source_seeded(seed: int, distribution: str) -> vector_pb2.VectorSource:
    """Check a seed and a distribution, and make the source of a vector of them."""
    try:
        value = vector_pb2.SeededSource.Distribution.Value(
            f"DISTRIBUTION_{str(distribution).upper()}"
        )
    except ValueError:
        value = vector_pb2.SeededSource.DISTRIBUTION_UNSPECIFIED
    if value == vector_pb2.SeededSource.DISTRIBUTION_UNSPECIFIED:
        raise InvalidArgumentError(
            f"no distribution {shown(distribution)}; there are rademacher, gaussian and sphere",
            reason="DISTRIBUTION_UNSPECIFIED",
            field="distribution",
        )
    return vector_pb2.VectorSource(
        seeded=vector_pb2.SeededSource(seed=check_seed(seed), distribution=value)
    )


async def create_vector(
    session: Session, space: VectorSpace, source: vector_pb2.VectorSource
) -> AsyncVector:
    """Make a vector on the server from something other than bytes.

    Args:
        session: The client's session.
        space: The space that the vector belongs to.
        source: The source that the ranks make it of.

    Returns:
        The vector's handle. The vector is freed when the handle is no longer referred to, and at
        the latest with the client.

    Raises:
        HvpError: As CreateVector says.
    """

    async def call(owner: str) -> vector_pb2.CreateVectorResponse:
        request = space.request(session, owner)
        request.source.CopyFrom(source)
        return await session.wire.unary(
            "VectorService/CreateVector",
            request,
            vector_pb2.CreateVectorResponse,
            timeout_s=session.wire.timeout.compute_s,
        )

    answer = await session.make(call)
    return AsyncVector(session, answer.vector, temporary=True)


async def write_vector(session: Session, space: VectorSpace, elements: NDArray[Any]) -> AsyncVector:
    """Bring elements to the ranks.

    Args:
        session: The client's session.
        space: The space that the vector belongs to.
        elements: All (n,) elements, of the space's dtype.

    Returns:
        The vector's handle, which frees it as one of `create_vector` does.

    Raises:
        HvpError: As WriteVector says.
    """

    async def call(owner: str) -> vector_pb2.Vector:
        return await write_elements(session, space.request(session, owner), elements)

    return AsyncVector(session, await session.make(call), temporary=True)


async def discard(vector: AsyncVector) -> None:
    """Delete a vector; a failure to do so is passed over."""
    try:
        await vector.delete()
    except HvpError:
        # The result, or the error on its way, matters more than a vector that may leak.
        return


async def combine(session: Session, terms: Sequence[tuple[float, AsyncVector]]) -> AsyncVector:
    """A linear combination of vectors, made on the ranks.

    Args:
        session: The client's session.
        terms: One or more pairs of coefficient and vector.

    Returns:
        A new vector.

    Raises:
        InvalidArgumentError: `NON_FINITE`: a coefficient is not finite. `VECTOR_SPACE_MISMATCH`.
            `VECTOR_EXPECTED`: a term is no vector.
    """
    combination = vector_pb2.LinearCombinationSource()
    for coefficient, vector in terms:
        if not math.isfinite(coefficient):
            raise InvalidArgumentError(
                f"a coefficient is {coefficient}", reason="NON_FINITE", field="coefficient"
            )
        name = require_handle(vector, AsyncVector, "other").name
        combination.terms.add(coefficient=coefficient, vector=name)
    first = terms[0][1]
    source = vector_pb2.VectorSource(combination=combination)
    space = VectorSpace(
        checkpoint=first.checkpoint,
        dtype=first.dtype.name,
        shape=first.output_shape or first.shape,
        data_batch=first.batch or "",
        parameters=first.parameters,
        module=first.module or "",
        of_input=first.of_input,
    )
    return await create_vector(session, space, source)
