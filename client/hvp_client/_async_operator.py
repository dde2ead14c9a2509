"""The curvature of a loss as a linear operator."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, TypeGuard, final, overload

import numpy as np
from hvp_protos.v1 import job_pb2, operator_pb2, vector_pb2
from numpy.typing import NDArray

from hvp_client._async_job import AsyncJob
from hvp_client._async_vector import AsyncVector, check_seed, create_vector, source_seeded
from hvp_client._batches import Batch
from hvp_client._bulk import as_elements, as_real, write_elements
from hvp_client._checkpoints import Checkpoint
from hvp_client._exceptions import HvpError, InvalidArgumentError
from hvp_client._session import Session, gather_bounded, new_request_id

_STREAMS = 4  # vectors sent or fetched at once


async def open_operator(
    session: Session,
    checkpoint: Checkpoint | str,
    batch: Batch | str,
    kind: str,
    dtype: Any,
    micro_batch_size: int | None,
) -> AsyncOperator:
    """Check an operator on the server and fill in its defaults; see Client.operator."""
    try:
        wire_kind = operator_pb2.OperatorSpec.Kind.Value(f"KIND_{str(kind).upper()}")
    except ValueError:
        raise InvalidArgumentError(
            f"no operator kind {kind!r}; there are hessian, ggn and empirical_fisher",
            reason="KIND_UNSPECIFIED",
            field="kind",
        ) from None
    if micro_batch_size is not None and micro_batch_size < 1:
        raise InvalidArgumentError(
            f"micro_batch_size must be at least 1, not {micro_batch_size}; None lets the server "
            "choose",
            reason="MICRO_BATCH_INVALID",
            field="micro_batch_size",
        )
    spec = operator_pb2.OperatorSpec(
        checkpoint=checkpoint if isinstance(checkpoint, str) else checkpoint.name,
        data_batch=batch if isinstance(batch, str) else batch.name,
        kind=wire_kind,
        dtype=_dtype_name(dtype),
        micro_batch_size=micro_batch_size or 0,
    )
    answer = await session.wire.unary(
        "OperatorService/DescribeOperator",
        operator_pb2.DescribeOperatorRequest(operator=spec),
        operator_pb2.DescribeOperatorResponse,
        timeout_s=session.wire.timeout.compute_s,
    )
    return AsyncOperator(session, answer)


def _dtype_name(dtype: Any) -> str:
    """Name a dtype given as a string, a numpy dtype or a torch dtype; the server judges it."""
    if dtype is None:  # numpy would take it for float64
        return "float32"
    try:
        name: str = np.dtype(dtype).name
    except TypeError:
        name = str(dtype).removeprefix("torch.")
    return name


@final
class AsyncOperator:
    """A symmetric operator on parameter space; the awaitable twin of Operator.

    `H @ v` gives a coroutine: `w = await (H @ v)`.
    """

    __array_ufunc__ = None  # `array @ H` is not a numpy product

    def __init__(self, session: Session, description: operator_pb2.DescribeOperatorResponse):
        self._session = session
        self._spec = description.operator
        self._num_parameters = description.num_parameters

    @property
    def shape(self) -> tuple[int, int]:
        """`(n, n)`."""
        return (self._num_parameters, self._num_parameters)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of products and vectors: float32 or float64."""
        return np.dtype(self._spec.dtype)

    @property
    def kind(self) -> str:
        """`hessian`, `ggn` or `empirical_fisher`."""
        return operator_pb2.OperatorSpec.Kind.Name(self._spec.kind).removeprefix("KIND_").lower()

    @property
    def checkpoint(self) -> str:
        """Name of the checkpoint."""
        return self._spec.checkpoint

    @property
    def batch(self) -> str:
        """Name of the data batch."""
        return self._spec.data_batch

    @property
    def micro_batch_size(self) -> int:
        """Sequences that a rank takes at once."""
        return self._spec.micro_batch_size

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
        await self._session.free_released()
        answer = await self._session.wire.unary(
            "OperatorService/ComputeGradient",
            operator_pb2.ComputeGradientRequest(operator=self._spec, request_id=new_request_id()),
            operator_pb2.ComputeGradientResponse,
            timeout_s=self._session.wire.timeout.compute_s,
        )
        return AsyncVector(self._session, answer.gradient, temporary=True)

    @overload
    async def matvec(self, v: AsyncVector) -> AsyncVector: ...
    @overload
    async def matvec(self, v: Any) -> NDArray[Any]: ...
    async def matvec(self, v: Any) -> AsyncVector | NDArray[Any]:
        """As Operator.matvec."""
        if isinstance(v, AsyncVector):
            return (await self._apply([v]))[0]
        array = as_real(v, "v")
        if array.shape == (self._num_parameters, 1):  # SciPy's solvers pass columns
            return await self._apply_columns(array)
        return (await self._apply_columns(array[..., np.newaxis]))[:, 0]

    @overload
    async def matmat(self, V: Sequence[AsyncVector]) -> list[AsyncVector]: ...
    @overload
    async def matmat(self, V: Any) -> NDArray[Any]: ...
    async def matmat(self, V: Any) -> list[AsyncVector] | NDArray[Any]:
        """As Operator.matmat."""
        if _is_vectors(V):
            return await self._apply(list(V))
        return await self._apply_columns(as_real(V, "V"))

    async def __matmul__(self, other: Any) -> Any:
        if isinstance(other, AsyncVector):
            return await self.matvec(other)
        if _is_vectors(other):
            return await self.matmat(other)
        array = as_real(other, "v")
        return await (self.matmat(array) if array.ndim == 2 else self.matvec(array))

    async def random_vector(self, *, seed: int, distribution: str = "rademacher") -> AsyncVector:
        """As Operator.random_vector."""
        return await self._create(source_seeded(seed, distribution))

    async def zeros(self) -> AsyncVector:
        """As Operator.zeros."""
        return await self._create(vector_pb2.VectorSource(zeros=vector_pb2.ZerosSource()))

    async def parameters(self) -> AsyncVector:
        """As Operator.parameters."""
        return await self._create(vector_pb2.VectorSource(parameters=vector_pb2.ParametersSource()))

    async def vector(self, array: Any) -> AsyncVector:
        """As Operator.vector."""
        elements = as_elements(array, self._num_parameters, self.dtype, "array")
        await self._session.free_released()
        return await self._write(elements)

    async def eigsh(
        self,
        k: int,
        which: str = "LM",
        *,
        tol: float = 0.0,
        max_products: int | None = None,
        seed: int = 0,
        num_lanczos_vectors: int | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> AsyncJob:
        """As Operator.eigsh."""
        spec = job_pb2.EigshSpec(
            operator=self._spec,
            k=_count("k", k, self._num_parameters - 1, "K_INVALID"),
            which=_which(which),
            tol=_tolerance(tol),
            max_products=_optional_count("max_products", max_products),
            seed=check_seed(seed),
            num_lanczos_vectors=_optional_count("num_lanczos_vectors", num_lanczos_vectors),
        )
        answer = await self._session.wire.unary(
            "JobService/CreateJob",
            job_pb2.CreateJobRequest(
                parent=self._session.parent,
                request_id=new_request_id(),
                spec=job_pb2.JobSpec(eigsh=spec),
                labels=labels,
            ),
            job_pb2.CreateJobResponse,
            timeout_s=self._session.wire.timeout.compute_s,
        )
        return AsyncJob(self._session, answer.job)

    async def _create(self, source: vector_pb2.VectorSource) -> AsyncVector:
        return await create_vector(self._session, self.checkpoint, self._spec.dtype, source)

    async def _write(self, elements: NDArray[Any]) -> AsyncVector:
        create = vector_pb2.CreateVectorRequest(
            parent=self._session.parent,
            request_id=new_request_id(),
            checkpoint=self.checkpoint,
            dtype=self._spec.dtype,
        )
        message = await write_elements(self._session, create, elements)
        return AsyncVector(self._session, message, temporary=True)

    async def _apply(self, vectors: Sequence[AsyncVector]) -> list[AsyncVector]:
        if not vectors:
            return []
        await self._session.free_released()
        answer = await self._session.wire.unary(
            "OperatorService/ApplyOperator",
            operator_pb2.ApplyOperatorRequest(
                operator=self._spec,
                request_id=new_request_id(),
                vectors=[vector.name for vector in vectors],
            ),
            operator_pb2.ApplyOperatorResponse,
            timeout_s=self._session.wire.timeout.compute_s,
        )
        return [AsyncVector(self._session, product, temporary=True) for product in answer.products]

    async def _apply_columns(self, array: NDArray[Any]) -> NDArray[Any]:
        """Send the columns of (n, k), apply, fetch: (n, k)."""
        if array.ndim != 2 or array.shape[0] != self._num_parameters:
            given = array.shape[:-1] if array.shape[-1:] == (1,) else array.shape
            raise InvalidArgumentError(
                f"the operator takes ({self._num_parameters},) or ({self._num_parameters}, k), "
                f"not {given}",
                reason="SHAPE_MISMATCH",
                field="v",
                metadata={"expected": str(self._num_parameters), "given": str(given)},
            )
        columns = [as_elements(column, self._num_parameters, self.dtype, "v") for column in array.T]
        await self._session.free_released()
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


async def _discard(vector: AsyncVector) -> None:
    try:
        await vector.delete()
    except HvpError:
        # The result, or the error on its way, matters more than a vector that may leak.
        return


def _is_vectors(value: Any) -> TypeGuard[Sequence[AsyncVector]]:
    return isinstance(value, (list, tuple)) and any(isinstance(v, AsyncVector) for v in value)


def _count(field: str, value: int, largest: int, reason: str) -> int:
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not whole or not 1 <= value <= largest:
        raise InvalidArgumentError(
            f"{field} must be an integer from 1 to {largest}, not {value!r}",
            reason=reason,
            field=field,
        )
    return int(value)


def _optional_count(field: str, value: int | None) -> int:
    return 0 if value is None else _count(field, value, 2**31 - 1, f"{field.upper()}_INVALID")


def _which(which: str) -> job_pb2.EigshSpec.Which.ValueType:
    if which not in ("LA", "SA", "LM", "BE"):
        raise InvalidArgumentError(
            f"no which={which!r}; there are LA, SA, LM and BE",
            reason="WHICH_UNSUPPORTED",
            field="which",
        )
    return job_pb2.EigshSpec.Which.Value(f"WHICH_{which}")


def _tolerance(tol: float) -> float:
    if not (math.isfinite(tol) and tol >= 0):
        raise InvalidArgumentError(
            f"tol must be finite and not negative, not {tol}", reason="TOL_INVALID", field="tol"
        )
    return float(tol)
