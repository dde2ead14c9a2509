"""The base of every operator: a linear map between two spaces of vectors on the ranks."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any, overload

import numpy as np
from hvp_protos.v1 import operator_pb2, vector_pb2
from numpy.typing import NDArray

from hvp_client._arrays import like
from hvp_client._bulk import as_elements, as_real
from hvp_client._checkpoints import ParameterTensor
from hvp_client._exceptions import InvalidArgumentError, UnimplementedError
from hvp_client._handles import is_sequence_of, require_handle
from hvp_client._selections import as_globs, chosen
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


async def describe_operator(
    session: Session, spec: operator_pb2.OperatorSpec
) -> operator_pb2.DescribeOperatorResponse:
    """Check an operator on the server and fill in its defaults.

    Args:
        session: The client's session.
        spec: The operator; fields may be left at their defaults.

    Returns:
        The operator with every default filled in, and the shapes of its domain and codomain.

    Raises:
        UnimplementedError: `DETERMINISM_UNSUPPORTED`: the server is older than the word.
        HvpError: As DescribeOperator says.
    """
    answer = await session.wire.unary(
        "OperatorService/DescribeOperator",
        operator_pb2.DescribeOperatorRequest(operator=spec),
        operator_pb2.DescribeOperatorResponse,
        timeout_s=session.wire.timeout.compute_s,
    )
    if spec.deterministic and not answer.operator.deterministic:
        raise UnimplementedError(
            "the server does not know deterministic operators; install a newer version there",
            reason="DETERMINISM_UNSUPPORTED",
            field="deterministic",
        )
    return answer


class AsyncLinearMap:
    """A linear map that the server holds: it gives products with vectors, never a matrix.

    Law: A(au + bv) == aAu + bAv, to rounding of `dtype`.
    """

    __array_ufunc__ = None  # numpy leaves `array @ A` to this class

    def __init__(
        self,
        session: Session,
        spec: operator_pb2.OperatorSpec,
        domain: VectorSpace,
        codomain: VectorSpace,
        tensors: tuple[ParameterTensor, ...],
        *,
        transposed: bool = False,
    ):
        """Keep the answer of DescribeOperator.

        Args:
            session: The client's session.
            spec: The operator, with every default filled in.
            domain: The space of the vectors that it takes.
            codomain: The space of the vectors that it gives.
            tensors: The parameters that its vectors of parameter space have.
            transposed: Whether this is the transpose of the operator that `spec` names.
        """
        self._session = session
        self._spec = spec
        self._domain = domain
        self._codomain = codomain
        self._tensors = tensors
        self._transposed = transposed

    @property
    def shape(self) -> tuple[int, int]:
        """`(m, n)`: the map takes vectors of n elements and gives vectors of m elements."""
        return (self._codomain.num_elements, self._domain.num_elements)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of vectors and products: float32 or float64."""
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
        """Precision of the operands of matrix products: `full`, `tf32` or `bfloat16`."""
        return self._spec.precision

    @property
    def deterministic(self) -> bool:
        """Whether every result has the same bits each time it is asked for."""
        return self._spec.deterministic

    @property
    def selection(self) -> tuple[str, ...]:
        """Patterns by which the parameters were selected; empty where all of them are."""
        return tuple(self._spec.parameters)

    @property
    def parameter_tensors(self) -> tuple[ParameterTensor, ...]:
        """The selected parameters: name, shape and offset in the operator's vectors."""
        return self._tensors

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """Names of the selected parameters, in the order of the operator's vectors."""
        return tuple(tensor.name for tensor in self._tensors)

    @overload
    async def matvec(self, v: AsyncVector) -> AsyncVector: ...
    @overload
    async def matvec(self, v: Any) -> Any: ...
    async def matvec(self, v: AsyncVector | Any) -> AsyncVector | Any:
        """Multiply one vector.

        Args:
            v: A vector of the domain, or real numbers (n,) or (n, 1), in numpy, torch or lists;
                outputs of a model also in their own shape.

        Returns:
            For a vector a new vector, which stays on the ranks. For numbers an array (m,) or (m, 1)
            in `dtype`, and for a tensor a tensor on its device: these travel, as `v` does. Cost:
            one product; in GEMM passes 6 to 11 for a Hessian and 4 to 6 for a GGN or Fisher matrix,
            by the server's schedule, and 3 for a Jacobian.

        Raises:
            InvalidArgumentError: `SHAPE_MISMATCH`, `NON_FINITE`, `DTYPE_UNSUPPORTED` or
                `VECTOR_SPACE_MISMATCH`; `field` is `v`.
            OutOfRangeError: `NON_FINITE`: the product is not finite.
        """
        if isinstance(v, AsyncVector):
            return (await self._apply([v]))[0]
        array = self._flat(v, "v")
        if array.shape == (self.shape[1], 1):  # SciPy's solvers pass columns
            return like(v, await self._apply_columns(array))
        return like(v, (await self._apply_columns(array[..., np.newaxis]))[:, 0])

    @overload
    async def matmat(self, V: Sequence[AsyncVector]) -> list[AsyncVector]: ...
    @overload
    async def matmat(self, V: Any) -> Any: ...
    async def matmat(self, V: Sequence[AsyncVector] | Any) -> list[AsyncVector] | Any:
        """Multiply k vectors at once; they share the gathering of the weights.

        Args:
            V: A sequence of k vectors, or real numbers (n, k), in numpy, torch or lists.

        Returns:
            For vectors a list of k new vectors; for numbers an array or tensor (m, k). Cost: k
            products, and memory for 2k vectors on the ranks.

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
        """A random vector of the domain, expanded on the ranks from its seed.

        Args:
            seed: From 0 to 2**64 − 1; a seed gives the same vector on any number of ranks.
            distribution: `rademacher` (±1), `gaussian` or `sphere` (uniform, of norm 1).
            keep: Whether to keep the vector at once, as `Vector.keep` does.

        Returns:
            A new vector; nothing but the seed travels.

        Raises:
            InvalidArgumentError: `SEED_INVALID` or `DISTRIBUTION_UNSPECIFIED`.
            ResourceExhaustedError: `VECTOR_MEMORY`.
        """
        return await self._create(source_seeded(seed, distribution), keep=keep)

    async def zeros(self, *, keep: bool = False) -> AsyncVector:
        """The zero vector of the domain; `keep` as `Vector.keep`."""
        source = vector_pb2.VectorSource(zeros=vector_pb2.ZerosSource())
        return await self._create(source, keep=keep)

    async def vector(self, array: Any, *, keep: bool = False) -> AsyncVector:
        """Bring an array to the ranks, as a vector of the domain.

        Args:
            array: Real finite numbers (n,), outputs of a model also in their own shape: numpy,
                torch, or anything `np.asarray` takes.
            keep: Whether to keep the vector at once, as `Vector.keep` does.

        Returns:
            A new vector of the operator's dtype.

        Raises:
            InvalidArgumentError: `SHAPE_MISMATCH`, `NON_FINITE` or `DTYPE_UNSUPPORTED`.
            ResourceExhaustedError: `VECTOR_MEMORY`.
        """
        elements = as_elements(self._flat(array, "array"), self.shape[1], self.dtype, "array")
        return await _kept(await self._write(elements), keep)

    def _restricted(self, globs: Sequence[str | Sequence[str]]) -> operator_pb2.OperatorSpec:
        """The same operator on some of its own parameters, by patterns or one list of them."""
        patterns = as_globs(globs[0] if len(globs) == 1 else globs)
        spec = operator_pb2.OperatorSpec()
        spec.CopyFrom(self._spec)
        spec.parameters[:] = [each.name for each in chosen(patterns, self._tensors)]
        return spec

    def _flat(self, value: Any, field: str) -> NDArray[Any]:
        """Real numbers, flat where they come in the domain's own shape."""
        array = as_real(value, field)
        return array.reshape(-1) if array.shape == self._domain.shape else array

    async def _create(self, source: vector_pb2.VectorSource, *, keep: bool) -> AsyncVector:
        return await _kept(await create_vector(self._session, self._domain, source), keep)

    async def _write(self, elements: NDArray[Any]) -> AsyncVector:
        return await write_vector(self._session, self._domain, elements)

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
        async with self._columns(array) as vectors:
            products = await self._apply(vectors)
            try:
                results = await gather_bounded(_STREAMS, [product.numpy for product in products])
            finally:
                await _discard_all(products)
        return np.stack(results, axis=1) if results else np.empty((self.shape[0], 0), self.dtype)

    @contextlib.asynccontextmanager
    async def _vectors(self, given: Any, field: str) -> AsyncIterator[Sequence[AsyncVector]]:
        """What a caller gives, as vectors for the block: handles, or numbers (n,) or (n, k)."""
        if isinstance(given, AsyncVector):
            yield [given]
        elif is_sequence_of(given, AsyncVector):
            yield [require_handle(each, AsyncVector, field) for each in given]
        else:
            array = as_real(given, field)
            columns = array[..., np.newaxis] if array.ndim == 1 else array
            async with self._columns(columns, field) as vectors:
                yield vectors

    @contextlib.asynccontextmanager
    async def _columns(
        self, array: NDArray[Any], field: str = "v"
    ) -> AsyncIterator[list[AsyncVector]]:
        """The columns of (n, k) as vectors, for the block."""
        n = self.shape[1]
        if array.ndim != 2 or array.shape[0] != n:
            given = array.shape[:-1] if array.shape[-1:] == (1,) else array.shape
            raise InvalidArgumentError(
                f"the operator takes ({n},) or ({n}, k), not {given}",
                reason="SHAPE_MISMATCH",
                field=field,
                metadata={"expected": str(n), "given": str(given)},
            )
        columns = [as_elements(column, n, self.dtype, field) for column in array.T]
        vectors: list[AsyncVector] = []
        try:
            vectors += await gather_bounded(
                _STREAMS, [partial(self._write, column) for column in columns]
            )
            yield vectors
        finally:
            await _discard_all(vectors)


async def _discard_all(vectors: Sequence[AsyncVector]) -> None:
    """At once and not when they are collected: these may be most of the ranks' memory."""
    await gather_bounded(8, [partial(discard, vector) for vector in vectors])


async def _kept(vector: AsyncVector, keep: bool) -> AsyncVector:
    if keep:
        await vector.keep()
    return vector
