"""The Jacobian of a model's outputs as a linear operator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, final, overload

import numpy as np
from hvp_protos.v1 import operator_pb2
from numpy.typing import NDArray

from hvp_client._arrays import like
from hvp_client._bulk import as_elements, as_real
from hvp_client._exceptions import InvalidArgumentError
from hvp_client._handles import is_sequence_of, require_handle
from hvp_client._session import Session, gather_bounded, new_request_id
from hvp_client._spaces import VectorSpace
from hvp_client.awaited.vector import (
    AsyncVector,
    create_vector,
    discard,
    source_seeded,
    write_vector,
)

_STREAMS = 4  # vectors sent or fetched at once


async def open_jacobian(session: Session, spec: operator_pb2.OperatorSpec) -> AsyncJacobian:
    """Check an operator on the server and fill in its defaults; see Client.jacobian."""
    answer = await session.wire.unary(
        "OperatorService/DescribeOperator",
        operator_pb2.DescribeOperatorRequest(operator=spec),
        operator_pb2.DescribeOperatorResponse,
        timeout_s=session.wire.timeout.compute_s,
    )
    return AsyncJacobian(session, answer, transposed=False)


@final
class AsyncJacobian:
    """J = ∂(outputs)/∂θ of a model on a batch: products both ways, never a matrix.

    Of a language model the outputs are the logits at every position, whether its label counts or
    not, as vectors (sequences × positions × vocabulary), row-major. `J @ v` is their derivative
    along v, `J.T @ u` the gradient of u·outputs; an `AsyncJacobian`'s products are awaited.

    Law: u·(J v) == (Jᵀu)·v, to rounding of `dtype`. What the properties tell does not change while
    the handle lives.
    """

    __array_ufunc__ = None  # numpy leaves `array @ J` to this class

    def __init__(
        self,
        session: Session,
        description: operator_pb2.DescribeOperatorResponse,
        *,
        transposed: bool,
    ):
        self._session = session
        self._description = description
        self._spec = description.operator
        self._transposed = transposed

    @property
    def T(self) -> AsyncJacobian:  # noqa: N802 (numpy's name)
        """The transpose, which takes outputs to parameters."""
        return AsyncJacobian(self._session, self._description, transposed=not self._transposed)

    @property
    def shape(self) -> tuple[int, int]:
        """`(m, n)`: numbers in all outputs, and parameters; of the transpose `(n, m)`."""
        m, n = math.prod(self.output_shape), self._description.num_parameters
        return (n, m) if self._transposed else (m, n)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """`(sequences, positions, vocabulary)`."""
        return tuple(self._description.codomain_shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of products and vectors: float32 or float64."""
        return np.dtype(self._spec.dtype)

    @property
    def checkpoint(self) -> str:
        """Name of the checkpoint."""
        return self._spec.checkpoint

    @property
    def batch(self) -> str:
        """Name of the data batch."""
        return self._spec.data_batch

    @property
    def precision(self) -> str:
        """Of the operands of matrix products: `full`, `tf32` or `bfloat16`."""
        return self._spec.precision

    @overload
    async def matvec(self, v: AsyncVector) -> AsyncVector: ...
    @overload
    async def matvec(self, v: Any) -> Any: ...
    async def matvec(self, v: AsyncVector | Any) -> AsyncVector | Any:
        """J v, or of the transpose Jᵀ u.

        Args:
            v: A vector of the space that it takes, or real numbers (n,), in numpy, torch or lists;
                of outputs also in their own shape.

        Returns:
            A new vector for a vector. For numbers an array (m,) in `dtype`, of the transpose (n,),
            and for a tensor a tensor on its device; both travel. Cost: 3 GEMM passes.

        Raises:
            InvalidArgumentError: `SHAPE_MISMATCH`, `NON_FINITE`, `DTYPE_UNSUPPORTED` or
                `VECTOR_SPACE_MISMATCH`; `field` is `v`.
            OutOfRangeError: `NON_FINITE`: the product is not finite.
        """
        if isinstance(v, AsyncVector):
            return (await self._apply([v]))[0]
        array = as_real(v, "v")
        if self._transposed and array.shape == self.output_shape:
            array = array.reshape(-1)
        if array.shape == (self.shape[1], 1):  # SciPy's solvers pass columns
            return like(v, await self._apply_columns(array))
        return like(v, (await self._apply_columns(array[..., np.newaxis]))[:, 0])

    @overload
    async def matmat(self, V: Sequence[AsyncVector]) -> list[AsyncVector]: ...
    @overload
    async def matmat(self, V: Any) -> Any: ...
    async def matmat(self, V: Sequence[AsyncVector] | Any) -> list[AsyncVector] | Any:
        """Products with k vectors at once.

        Args:
            V: A sequence of vectors, or real numbers (n, k), in numpy, torch or lists.

        Returns:
            As many new vectors, or an array or tensor (m, k). Cost: as k products.

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

    async def random_vector(
        self, *, seed: int, distribution: str = "rademacher", keep: bool = False
    ) -> AsyncVector:
        """A random vector of the space that it takes, expanded on the ranks from its seed.

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
        source = source_seeded(seed, distribution)
        made = await create_vector(self._session, self._domain, source)
        if keep:
            await made.keep()
        return made

    async def vector(self, array: Any, *, keep: bool = False) -> AsyncVector:
        """Bring an array to the ranks, as a vector of the space that it takes.

        Args:
            array: Real finite numbers (n,), of outputs also in their own shape: numpy, torch, or
                anything `np.asarray` takes.
            keep: As `Vector.keep`.

        Returns:
            A new vector of the operator's dtype.

        Raises:
            InvalidArgumentError: `SHAPE_MISMATCH`, `NON_FINITE` or `DTYPE_UNSUPPORTED`.
            ResourceExhaustedError: `VECTOR_MEMORY`.
        """
        numbers = as_real(array, "array")
        if self._transposed and numbers.shape == self.output_shape:
            numbers = numbers.reshape(-1)
        elements = as_elements(numbers, self.shape[1], self.dtype, "array")
        made = await write_vector(self._session, self._domain, elements)
        if keep:
            await made.keep()
        return made

    def __repr__(self) -> str:
        m, n = self.shape
        of = f"of {self.checkpoint} on {self.batch}"
        return f"<{type(self).__name__} ({m:,}, {n:,}) {self.dtype} {of}>"

    @property
    def _domain(self) -> VectorSpace:
        return VectorSpace(
            checkpoint=self.checkpoint,
            dtype=self._spec.dtype,
            data_batch=self.batch if self._transposed else "",
        )

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
                    transposed=self._transposed,
                ),
                operator_pb2.ApplyOperatorResponse,
                timeout_s=self._session.wire.timeout.compute_s,
            )

        answer = await self._session.make(call)
        return [AsyncVector(self._session, product, temporary=True) for product in answer.products]

    async def _apply_columns(self, array: NDArray[Any]) -> NDArray[Any]:
        """Send the columns of (n, k), apply, fetch: (m, k)."""
        if array.ndim != 2 or array.shape[0] != self.shape[1]:
            given = array.shape[:-1] if array.shape[-1:] == (1,) else array.shape
            raise InvalidArgumentError(
                f"the operator takes ({self.shape[1]},) or ({self.shape[1]}, k), not {given}",
                reason="SHAPE_MISMATCH",
                field="v",
                metadata={"expected": str(self.shape[1]), "given": str(given)},
            )
        columns = [as_elements(column, self.shape[1], self.dtype, "v") for column in array.T]
        vectors: list[AsyncVector] = []
        try:
            vectors += await gather_bounded(
                _STREAMS,
                [partial(write_vector, self._session, self._domain, column) for column in columns],
            )
            products = await self._apply(vectors)
            vectors += products
            results = await gather_bounded(_STREAMS, [product.numpy for product in products])
        finally:
            # At once and not when collected: these may be most of the ranks' memory.
            await gather_bounded(8, [partial(discard, vector) for vector in vectors])
        if not results:
            return np.empty((self.shape[0], 0), self.dtype)
        return np.stack(results, axis=1)
