"""Vectors of parameter space, by name: they live on the server's ranks."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, final

from hvp_protos.v1 import vector_pb2
from numpy.typing import NDArray

from hvp_client._bulk import read_elements
from hvp_client._exceptions import InvalidArgumentError
from hvp_client._handles import VectorFields, require_handle
from hvp_client._session import Session, new_request_id
from hvp_client._specs import check_seed

if TYPE_CHECKING:
    from torch import Tensor

Distribution = Literal["rademacher", "gaussian", "sphere"]


@final
class AsyncVector(VectorFields):
    """A vector on the server; the awaitable twin of Vector, which describes the methods.

    Arithmetic gives coroutines: `w = await (u + v)`.
    """

    def __init__(self, session: Session, message: vector_pb2.Vector, *, temporary: bool):
        super().__init__(message)
        self._session = session
        self._finalizer = weakref.finalize(self, session.released.append, message.name)
        # The server outlives this process, and close() sends what was released until then.
        self._finalizer.atexit = False
        if not temporary:
            self._finalizer.detach()

    async def dot(self, other: AsyncVector) -> float:
        """As Vector.dot."""
        right = require_handle(other, AsyncVector, "other").name
        answer = await self._session.wire.unary(
            "VectorService/ReduceVectors",
            vector_pb2.ReduceVectorsRequest(
                inner_products=[vector_pb2.ReduceVectorsRequest.Pair(left=self.name, right=right)]
            ),
            vector_pb2.ReduceVectorsResponse,
            timeout_s=self._session.wire.timeout.compute_s,
        )
        return answer.inner_products[0]

    async def norm(self) -> float:
        """As Vector.norm."""
        return math.sqrt(await self.dot(self))

    async def numpy(self) -> NDArray[Any]:
        """As Vector.numpy."""
        return await read_elements(self._session, self.name, self._message.num_elements, self.dtype)

    async def torch(self) -> Tensor:
        """As Vector.torch."""
        from torch import from_numpy

        return from_numpy(await self.numpy())

    async def axpy(self, scale: float, other: AsyncVector) -> AsyncVector:
        """As Vector.axpy."""
        return await combine(self._session, [(1.0, self), (scale, other)])

    async def keep(self) -> None:
        """As Vector.keep."""
        await self._session.keep_vector(self.name)
        self._finalizer.detach()

    async def delete(self) -> None:
        """As Vector.delete."""
        self._finalizer.detach()
        await self._session.delete_vector(self.name)

    async def __add__(self, other: AsyncVector) -> AsyncVector:
        return await combine(self._session, [(1.0, self), (1.0, other)])

    async def __sub__(self, other: AsyncVector) -> AsyncVector:
        return await combine(self._session, [(1.0, self), (-1.0, other)])

    async def __mul__(self, scale: float) -> AsyncVector:
        return await combine(self._session, [(scale, self)])

    __rmul__ = __mul__

    async def __truediv__(self, divisor: float) -> AsyncVector:
        return await combine(self._session, [(1.0 / divisor, self)])

    async def __neg__(self) -> AsyncVector:
        return await combine(self._session, [(-1.0, self)])

    async def __aenter__(self) -> AsyncVector:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.delete()


def source_seeded(seed: int, distribution: str) -> vector_pb2.VectorSource:
    """Check seed and distribution and make the source of them."""
    try:
        value = vector_pb2.SeededSource.Distribution.Value(
            f"DISTRIBUTION_{str(distribution).upper()}"
        )
    except ValueError:
        value = vector_pb2.SeededSource.DISTRIBUTION_UNSPECIFIED
    if value == vector_pb2.SeededSource.DISTRIBUTION_UNSPECIFIED:
        raise InvalidArgumentError(
            f"no distribution {distribution!r}; there are rademacher, gaussian and sphere",
            reason="DISTRIBUTION_UNSPECIFIED",
            field="distribution",
        )
    return vector_pb2.VectorSource(
        seeded=vector_pb2.SeededSource(seed=check_seed(seed), distribution=value)
    )


async def create_vector(
    session: Session, checkpoint: str, dtype: str, source: vector_pb2.VectorSource
) -> AsyncVector:
    """Make a vector on the server from something other than bytes.

    Args:
        session: Whose server.
        checkpoint: Name of the checkpoint whose space it is in.
        dtype: `float32` or `float64`.
        source: What it is made of.

    Returns:
        Its handle, which frees it when it is no longer referred to; at the latest it goes with the
        client.

    Raises:
        HvpError: As CreateVector says.
    """

    async def call(owner: str) -> vector_pb2.CreateVectorResponse:
        return await session.wire.unary(
            "VectorService/CreateVector",
            vector_pb2.CreateVectorRequest(
                parent=session.parent,
                request_id=new_request_id(),
                checkpoint=checkpoint,
                dtype=dtype,
                source=source,
                session=owner,
            ),
            vector_pb2.CreateVectorResponse,
            timeout_s=session.wire.timeout.compute_s,
        )

    answer = await session.make(call)
    return AsyncVector(session, answer.vector, temporary=True)


async def combine(session: Session, terms: Sequence[tuple[float, AsyncVector]]) -> AsyncVector:
    """Sum of coefficient times vector, made on the ranks.

    Args:
        session: Whose server.
        terms: One or more.

    Returns:
        A new vector.

    Raises:
        InvalidArgumentError: `NON_FINITE`: a coefficient; `VECTOR_SPACE_MISMATCH`.
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
    return await create_vector(session, first.checkpoint, first.dtype.name, source)
