"""The curvature of a loss as a linear operator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, final, overload

import numpy as np
from hvp_protos.v1 import job_pb2, operator_pb2, vector_pb2
from numpy.typing import NDArray

from hvp_client._arrays import like
from hvp_client._bulk import as_elements, as_real
from hvp_client._exceptions import InvalidArgumentError
from hvp_client._handles import is_sequence_of, require_handle
from hvp_client._labels import check_labels
from hvp_client._results import Plan, plan_from_proto
from hvp_client._session import Session, gather_bounded, new_request_id
from hvp_client._spaces import VectorSpace
from hvp_client._specs import job_spec, kind_name
from hvp_client.awaited.job import AsyncJob
from hvp_client.awaited.questions import AsyncQuestions
from hvp_client.awaited.vector import (
    AsyncVector,
    create_vector,
    discard,
    source_seeded,
    write_vector,
)

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
class AsyncOperator(AsyncQuestions):
    """The curvature of a loss L(θ) as a symmetric linear operator: products, never a matrix.

    Law: u·Hv == v·Hu and H(au + bv) == aHu + bHv, to rounding of `dtype`. What the properties tell
    does not change while the handle lives.

    An `AsyncOperator`'s products are awaited: `w = await (H @ v)`. An `Operator` is a
    `scipy.sparse.linalg.LinearOperator` where SciPy is installed: SciPy's solvers take it and run
    on this side, with every product travelling, and `H + 1e-3 * I`, `2 * H` or `H @ A` are SciPy's
    operators. The questions of the same names as its solvers, which give a job, run where the
    vectors are.
    """

    __array_ufunc__ = None  # numpy leaves `array @ H` to this class

    def __init__(self, session: Session, description: operator_pb2.DescribeOperatorResponse):
        self._session = session
        self._num_parameters = description.num_parameters
        self._spec = description.operator

    @property
    def shape(self) -> tuple[int, int]:
        """`(n, n)`, n the number of parameters."""
        return (self._num_parameters, self._num_parameters)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of products and vectors: float32 or float64."""
        return np.dtype(self._spec.dtype)

    @property
    def kind(self) -> str:
        """Such as `hessian`, `ggn` or `empirical_fisher_token`."""
        return kind_name(self._spec.kind)

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
        """Sequences that a rank takes at once; results do not depend on it."""
        return self._spec.micro_batch_size

    @property
    def precision(self) -> str:
        """Of the operands of matrix products: `full`, `tf32` or `bfloat16`."""
        return self._spec.precision

    async def loss(self) -> float:
        """L(θ): mean over every supervised target of the batch, nats.

        Returns:
            The loss. Cost: one forward pass.

        Raises:
            OutOfRangeError: `NON_FINITE`; metadata names the first block.
        """
        answer = await self._session.wire.unary(
            "OperatorService/EvaluateLoss",
            operator_pb2.EvaluateLossRequest(operator=self._spec),
            operator_pb2.EvaluateLossResponse,
            timeout_s=self._session.wire.timeout.compute_s,
        )
        return answer.loss

    async def gradient(self) -> AsyncVector:
        """∇L(θ), left on the ranks.

        Returns:
            A new vector. Cost: 3 GEMM passes, 4 where memory is short.

        Raises:
            OutOfRangeError: `NON_FINITE`; metadata names the first block.
        """

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
    async def matvec(self, v: AsyncVector | Any) -> AsyncVector | Any:
        """Hv.

        Args:
            v: A vector, or real numbers (n,) or (n, 1), in numpy, torch or lists.

        Returns:
            A new vector for a vector. For numbers an array of their shape in `dtype`, and for a
            tensor a tensor on its device; v and Hv travel. Cost: one product.

        Raises:
            InvalidArgumentError: `SHAPE_MISMATCH`, `NON_FINITE`, `DTYPE_UNSUPPORTED` or
                `VECTOR_SPACE_MISMATCH`; `field` is `v`.
            OutOfRangeError: `NON_FINITE`: the product is not finite.
        """
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
    async def matmat(self, V: Sequence[AsyncVector] | Any) -> list[AsyncVector] | Any:
        """HV for k vectors at once, which share the gathering of the weights.

        Args:
            V: A sequence of vectors, or real numbers (n, k), in numpy, torch or lists.

        Returns:
            As many new vectors, or an array or tensor (n, k). Cost: k products; on the ranks 2k
            vectors.

        Raises:
            InvalidArgumentError: As for matvec.
            ResourceExhaustedError: `VECTOR_MEMORY`: give fewer at once.
        """
        if is_sequence_of(V, AsyncVector):
            return await self._apply(list(V))
        return like(V, await self._apply_columns(as_real(V, "V")))

    @overload
    async def __matmul__(self, other: AsyncVector) -> AsyncVector: ...
    @overload
    async def __matmul__(
        self, other: list[AsyncVector] | tuple[AsyncVector, ...]
    ) -> list[AsyncVector]: ...
    @overload
    async def __matmul__(self, other: Any) -> Any: ...
    async def __matmul__(
        self, other: AsyncVector | Sequence[AsyncVector] | Any
    ) -> AsyncVector | list[AsyncVector] | Any:
        if isinstance(other, AsyncVector):
            return await self.matvec(other)
        if is_sequence_of(other, AsyncVector):
            return await self.matmat(other)
        return await (self.matmat(other) if as_real(other, "v").ndim == 2 else self.matvec(other))

    @overload
    async def __rmatmul__(self, other: AsyncVector) -> AsyncVector: ...
    @overload
    async def __rmatmul__(self, other: Any) -> Any: ...
    async def __rmatmul__(self, other: AsyncVector | Any) -> AsyncVector | Any:
        # H is symmetric: vᵀH is (Hv)ᵀ, and rows (k, n) give rows.
        if not is_sequence_of(other, AsyncVector) and not isinstance(other, AsyncVector):
            array = as_real(other, "v")
            if array.ndim == 2:
                return like(other, (await self._apply_columns(array.T)).T)
        return await (self @ other)

    async def random_vector(
        self, *, seed: int, distribution: str = "rademacher", keep: bool = False
    ) -> AsyncVector:
        """A random probe, expanded on the ranks from its seed.

        Args:
            seed: From 0 to 2**64 − 1; the same vector on any number of ranks.
            distribution: `rademacher` (±1), `gaussian` or `sphere` (uniform, of norm 1).
            keep: As `Vector.keep`.

        Returns:
            A new vector; nothing but the seed travels.

        Raises:
            InvalidArgumentError: `SEED_INVALID` or `DISTRIBUTION_UNSPECIFIED`.
            ResourceExhaustedError: `VECTOR_MEMORY`.
        """
        return await self._create(source_seeded(seed, distribution), keep=keep)

    async def zeros(self, *, keep: bool = False) -> AsyncVector:
        """The zero vector; `keep` as `Vector.keep`."""
        source = vector_pb2.VectorSource(zeros=vector_pb2.ZerosSource())
        return await self._create(source, keep=keep)

    async def parameters(self, *, keep: bool = False) -> AsyncVector:
        """θ, the model's own parameters; `keep` as `Vector.keep`."""
        source = vector_pb2.VectorSource(parameters=vector_pb2.ParametersSource())
        return await self._create(source, keep=keep)

    async def vector(self, array: Any, *, keep: bool = False) -> AsyncVector:
        """Bring an array to the ranks.

        Args:
            array: Real finite numbers (n,): numpy, torch, or anything `np.asarray` takes.
            keep: As `Vector.keep`.

        Returns:
            A new vector of the operator's dtype.

        Raises:
            InvalidArgumentError: `SHAPE_MISMATCH`, `NON_FINITE` or `DTYPE_UNSUPPORTED`.
            ResourceExhaustedError: `VECTOR_MEMORY`.
        """
        elements = as_elements(array, self.shape[0], self.dtype, "array")
        return await _kept(await self._write(elements), keep)

    async def plan(self, operation: str, **values: Any) -> Plan:
        """Tell what a question would take, without queueing anything.

        Args:
            operation: Name of the question, which is a method of this class.
            values: As that method takes them, by name.

        Returns:
            Products, bytes on each rank, seconds where the pace is known, and whether it fits.

        Raises:
            InvalidArgumentError: `OPERATION_UNKNOWN`, or as the question itself.
        """
        answer = await self._session.wire.unary(
            "JobService/PlanJob",
            job_pb2.PlanJobRequest(
                parent=self._session.parent,
                spec=job_spec(operation, self._spec, self.shape[0], values),
            ),
            job_pb2.PlanJobResponse,
        )
        return plan_from_proto(answer.plan)

    def __repr__(self) -> str:
        size = f"n={self.shape[0]:,}"
        return f"<{type(self).__name__} {self.kind} {size} {self.dtype} of {self.checkpoint}>"

    async def _ask(
        self, operation: str, values: Mapping[str, Any], labels: Mapping[str, str] | None
    ) -> AsyncJob[Any]:
        answer = await self._session.wire.unary(
            "JobService/CreateJob",
            job_pb2.CreateJobRequest(
                parent=self._session.parent,
                request_id=new_request_id(),
                spec=job_spec(operation, self._spec, self.shape[0], values),
                labels=check_labels(labels),
            ),
            job_pb2.CreateJobResponse,
            timeout_s=self._session.wire.timeout.compute_s,
        )
        return AsyncJob(self._session, answer.job)

    @property
    def _space(self) -> VectorSpace:
        return VectorSpace(checkpoint=self.checkpoint, dtype=self._spec.dtype)

    async def _create(self, source: vector_pb2.VectorSource, *, keep: bool) -> AsyncVector:
        return await _kept(await create_vector(self._session, self._space, source), keep)

    async def _write(self, elements: NDArray[Any]) -> AsyncVector:
        return await write_vector(self._session, self._space, elements)

    async def _apply(self, vectors: Sequence[AsyncVector]) -> list[AsyncVector]:
        if not vectors:
            return []
        names = [require_handle(vector, AsyncVector, "V").name for vector in vectors]

        async def call(owner: str) -> operator_pb2.ApplyOperatorResponse:
            return await self._session.wire.unary(
                "OperatorService/ApplyOperator",
                operator_pb2.ApplyOperatorRequest(
                    operator=self._spec,
                    request_id=new_request_id(),
                    vectors=names,
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
            await gather_bounded(8, [partial(discard, vector) for vector in vectors])
        return np.stack(results, axis=1) if results else np.empty(array.shape, self.dtype)


async def _kept(vector: AsyncVector, keep: bool) -> AsyncVector:
    if keep:
        await vector.keep()
    return vector
