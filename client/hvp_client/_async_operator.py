"""The curvature of a loss as a linear operator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, final, overload

import numpy as np
from hvp_protos.v1 import job_pb2, operator_pb2, vector_pb2
from numpy.typing import NDArray

from hvp_client._arrays import like
from hvp_client._async_job import AsyncJob
from hvp_client._async_vector import AsyncVector, create_vector, source_seeded
from hvp_client._bulk import as_elements, as_real, write_elements
from hvp_client._exceptions import HvpError, InvalidArgumentError
from hvp_client._handles import OperatorFields, is_sequence_of
from hvp_client._questions import Questions
from hvp_client._session import Session, gather_bounded, new_request_id
from hvp_client._specs import job_spec

_STREAMS = 4  # vectors sent or fetched at once


async def open_operator(session: Session, spec: operator_pb2.OperatorSpec) -> AsyncOperator:
    """Check an operator on the server and fill in its defaults; see Client.operator."""
    answer = await session.wire.unary(
        "OperatorService/DescribeOperator",
        operator_pb2.DescribeOperatorRequest(operator=spec),
        operator_pb2.DescribeOperatorResponse,
        timeout_s=session.wire.timeout.compute_s,
    )
    return AsyncOperator(session, answer)


@final
class AsyncOperator(OperatorFields, Questions):
    """A symmetric operator on parameter space; the awaitable twin of Operator.

    `H @ v` gives a coroutine: `w = await (H @ v)`.
    """

    def __init__(self, session: Session, description: operator_pb2.DescribeOperatorResponse):
        super().__init__(description)
        self._session = session

    async def loss(self) -> float:
        """As Operator.loss."""
        answer = await self._session.wire.unary(
            "OperatorService/EvaluateLoss",
            operator_pb2.EvaluateLossRequest(operator=self._spec),
            operator_pb2.EvaluateLossResponse,
            timeout_s=self._session.wire.timeout.compute_s,
        )
        return answer.loss

    async def gradient(self) -> AsyncVector:
        """As Operator.gradient."""

        async def call(owner: str) -> operator_pb2.ComputeGradientResponse:
            return await self._session.wire.unary(
                "OperatorService/ComputeGradient",
                operator_pb2.ComputeGradientRequest(
                    operator=self._spec, request_id=new_request_id(), session=owner
                ),
                operator_pb2.ComputeGradientResponse,
                timeout_s=self._session.wire.timeout.compute_s,
            )

        answer = await self._session.make(call)
        return AsyncVector(self._session, answer.gradient, temporary=True)

    @overload
    async def matvec(self, v: AsyncVector) -> AsyncVector: ...
    @overload
    async def matvec(self, v: Any) -> Any: ...
    async def matvec(self, v: Any) -> Any:
        """As Operator.matvec."""
        if isinstance(v, AsyncVector):
            return (await self._apply([v]))[0]
        array = as_real(v, "v")
        if array.shape == (self.shape[0], 1):  # SciPy's solvers pass columns
            return like(v, await self._apply_columns(array))
        return like(v, (await self._apply_columns(array[..., np.newaxis]))[:, 0])

    @overload
    async def matmat(self, V: Sequence[AsyncVector]) -> list[AsyncVector]: ...
    @overload
    async def matmat(self, V: Any) -> Any: ...
    async def matmat(self, V: Any) -> Any:
        """As Operator.matmat."""
        if is_sequence_of(V, AsyncVector):
            return await self._apply(list(V))
        return like(V, await self._apply_columns(as_real(V, "V")))

    async def __matmul__(self, other: Any) -> Any:
        if isinstance(other, AsyncVector):
            return await self.matvec(other)
        if is_sequence_of(other, AsyncVector):
            return await self.matmat(other)
        return await (self.matmat(other) if as_real(other, "v").ndim == 2 else self.matvec(other))

    async def __rmatmul__(self, other: Any) -> Any:
        # H is symmetric: vᵀH is (Hv)ᵀ, and rows (k, n) give rows.
        if not is_sequence_of(other, AsyncVector) and not isinstance(other, AsyncVector):
            array = as_real(other, "v")
            if array.ndim == 2:
                return like(other, (await self._apply_columns(array.T)).T)
        return await (self @ other)

    async def random_vector(
        self, *, seed: int, distribution: str = "rademacher", keep: bool = False
    ) -> AsyncVector:
        """As Operator.random_vector."""
        return await self._create(source_seeded(seed, distribution), keep=keep)

    async def zeros(self, *, keep: bool = False) -> AsyncVector:
        """As Operator.zeros."""
        source = vector_pb2.VectorSource(zeros=vector_pb2.ZerosSource())
        return await self._create(source, keep=keep)

    async def parameters(self, *, keep: bool = False) -> AsyncVector:
        """As Operator.parameters."""
        source = vector_pb2.VectorSource(parameters=vector_pb2.ParametersSource())
        return await self._create(source, keep=keep)

    async def vector(self, array: Any, *, keep: bool = False) -> AsyncVector:
        """As Operator.vector."""
        elements = as_elements(array, self.shape[0], self.dtype, "array")
        return await _kept(await self._write(elements), keep)

    async def _ask(
        self, operation: str, values: Mapping[str, Any], labels: Mapping[str, str] | None
    ) -> AsyncJob[Any]:
        answer = await self._session.wire.unary(
            "JobService/CreateJob",
            job_pb2.CreateJobRequest(
                parent=self._session.parent,
                request_id=new_request_id(),
                spec=job_spec(operation, self._spec, self.shape[0], values),
                labels=labels,
            ),
            job_pb2.CreateJobResponse,
            timeout_s=self._session.wire.timeout.compute_s,
        )
        return AsyncJob(self._session, answer.job)

    async def _create(self, source: vector_pb2.VectorSource, *, keep: bool) -> AsyncVector:
        made = await create_vector(self._session, self.checkpoint, self._spec.dtype, source)
        return await _kept(made, keep)

    async def _write(self, elements: NDArray[Any]) -> AsyncVector:
        async def call(owner: str) -> vector_pb2.Vector:
            create = vector_pb2.CreateVectorRequest(
                parent=self._session.parent,
                request_id=new_request_id(),
                checkpoint=self.checkpoint,
                dtype=self._spec.dtype,
                session=owner,
            )
            return await write_elements(self._session, create, elements)

        return AsyncVector(self._session, await self._session.make(call), temporary=True)

    async def _apply(self, vectors: Sequence[AsyncVector]) -> list[AsyncVector]:
        if not vectors:
            return []

        async def call(owner: str) -> operator_pb2.ApplyOperatorResponse:
            return await self._session.wire.unary(
                "OperatorService/ApplyOperator",
                operator_pb2.ApplyOperatorRequest(
                    operator=self._spec,
                    request_id=new_request_id(),
                    vectors=[vector.name for vector in vectors],
                    session=owner,
                ),
                operator_pb2.ApplyOperatorResponse,
                timeout_s=self._session.wire.timeout.compute_s,
            )

        answer = await self._session.make(call)
        return [AsyncVector(self._session, product, temporary=True) for product in answer.products]

    async def _apply_columns(self, array: NDArray[Any]) -> NDArray[Any]:
        """Send the columns of (n, k), apply, fetch: (n, k)."""
        if array.ndim != 2 or array.shape[0] != self.shape[0]:
            given = array.shape[:-1] if array.shape[-1:] == (1,) else array.shape
            raise InvalidArgumentError(
                f"the operator takes ({self.shape[0]},) or ({self.shape[0]}, k), not {given}",
                reason="SHAPE_MISMATCH",
                field="v",
                metadata={"expected": str(self.shape[0]), "given": str(given)},
            )
        columns = [as_elements(column, self.shape[0], self.dtype, "v") for column in array.T]
        vectors: list[AsyncVector] = []
        try:
            vectors += await gather_bounded(
                _STREAMS, [partial(self._write, column) for column in columns]
            )
            products = await self._apply(vectors)
            vectors += products
            results = await gather_bounded(_STREAMS, [product.numpy for product in products])
        finally:
            # At once and not when collected: these may be most of the ranks' memory.
            await gather_bounded(8, [partial(_discard, vector) for vector in vectors])
        return np.stack(results, axis=1) if results else np.empty(array.shape, self.dtype)


async def _kept(vector: AsyncVector, keep: bool) -> AsyncVector:
    if keep:
        await vector.keep()
    return vector


async def _discard(vector: AsyncVector) -> None:
    try:
        await vector.delete()
    except HvpError:
        # The result, or the error on its way, matters more than a vector that may leak.
        return
