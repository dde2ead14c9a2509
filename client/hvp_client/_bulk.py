"""Elements of vectors on the wire: checked chunks, sent again or read on after a break."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, TypeVar

import google_crc32c
import numpy as np
from hvp_protos.chunks import encoded
from hvp_protos.v1 import vector_pb2
from numpy.typing import NDArray

from hvp_client._arrays import as_numpy
from hvp_client._exceptions import AbortedError, HvpError, InvalidArgumentError, OutOfRangeError
from hvp_client._session import Session
from hvp_client._wire import CHUNK_BYTES, Pauses, is_resumable

Message = TypeVar("Message")


def as_elements(value: Any, num_elements: int, dtype: np.dtype[Any], field: str) -> NDArray[Any]:
    """Check an array that is to become a vector.

    Args:
        value: Real numbers of shape (n,), as `as_numpy` takes them.
        num_elements: n.
        dtype: Dtype of the vector, float32 or float64.
        field: Name of the argument, for the error.

    Returns:
        The elements, contiguous and little-endian; a view where that is possible.

    Raises:
        InvalidArgumentError: `DTYPE_UNSUPPORTED`, `SHAPE_MISMATCH`, or `NON_FINITE` with the index
            of the first such element as metadata.
    """
    array = as_real(value, field)
    if array.shape != (num_elements,):
        raise InvalidArgumentError(
            f"{field} has shape {array.shape} but the operator takes ({num_elements},)",
            reason="SHAPE_MISMATCH",
            field=field,
            metadata={"expected": str(num_elements), "given": str(array.shape)},
        )
    with np.errstate(over="ignore"):  # what overflows in the cast is refused as not finite below
        elements = np.ascontiguousarray(array, dtype=dtype.newbyteorder("<"))
    finite = np.isfinite(elements)
    if not finite.all():
        index = int(finite.argmin())
        raise InvalidArgumentError(
            f"{field}[{index}] is {array[index]}, which is not finite in {dtype}",
            reason="NON_FINITE",
            field=field,
            metadata={"index": str(index)},
        )
    return elements


def as_real(value: Any, field: str) -> NDArray[Any]:
    """Make an array of something and check that it holds real numbers.

    Args:
        value: Anything that `as_numpy` takes.
        field: Name of the argument, for the error.

    Returns:
        The array, of a boolean, integer or floating dtype.

    Raises:
        InvalidArgumentError: `DTYPE_UNSUPPORTED`: it is no array, or not of real numbers.
    """
    try:
        array = as_numpy(value)
    except (TypeError, ValueError) as error:
        raise InvalidArgumentError(
            f"{field} cannot be made a numpy array: {error}",
            reason="DTYPE_UNSUPPORTED",
            field=field,
        ) from None
    if array.dtype.kind not in "fiub":
        raise InvalidArgumentError(
            f"{field} holds {array.dtype}; vectors are real",
            reason="DTYPE_UNSUPPORTED",
            field=field,
        )
    return array


async def write_elements(
    session: Session, create: vector_pb2.CreateVectorRequest, elements: NDArray[Any]
) -> vector_pb2.Vector:
    """Create a vector of these elements in one stream.

    Args:
        session: The client's session.
        create: Request for the vector, without a source; its request id makes a second try safe.
        elements: (n,) elements, from `as_elements`.

    Returns:
        The vector as the server describes it.

    Raises:
        HvpError: As CreateVector says.
    """
    wire = session.wire
    pauses = Pauses(wire.retry, wire.retry.patience_s)
    while True:
        try:
            answer = await wire.client_stream(
                "VectorService/WriteVector",
                _messages(create, elements),
                vector_pb2.WriteVectorResponse,
                silence_s=wire.timeout.silence_s,
                # The ranks take it between two products, and a product may be long.
                answer_s=wire.timeout.compute_s,
                asked=create,
            )
            return answer.vector
        except HvpError as error:
            if not is_resumable(error):
                raise
            await pauses.after(error)


async def _messages(
    create: vector_pb2.CreateVectorRequest, elements: NDArray[Any]
) -> AsyncIterator[bytes]:
    step = CHUNK_BYTES // elements.itemsize
    for offset in range(0, elements.size, step):
        data = elements[offset : offset + step].tobytes()
        head = vector_pb2.WriteVectorRequest(
            create=create if offset == 0 else None,
            element_offset=offset,
            crc32c=google_crc32c.value(data),
        )
        yield encoded(head, data)


async def read_elements(
    session: Session, name: str, num_elements: int, dtype: np.dtype[Any], start: int = 0
) -> NDArray[Any]:
    """Fetch elements of a vector; a broken stream is read on from where it broke.

    Args:
        session: The client's session.
        name: Name of the vector.
        num_elements: Number of elements to fetch.
        dtype: Dtype of the vector.
        start: Flat index of the first element to fetch.

    Returns:
        An array (num_elements,) of that dtype.

    Raises:
        HvpError: The vector is gone, or patience with a broken connection is over.
    """
    wire = session.wire
    pauses = Pauses(wire.retry, wire.retry.patience_s)
    elements = np.empty(num_elements, dtype)
    filled = 0
    while filled < num_elements:
        stream = wire.server_stream(
            "VectorService/ReadVector",
            vector_pb2.ReadVectorRequest(
                name=name, element_offset=start + filled, element_limit=num_elements - filled
            ),
            vector_pb2.ReadVectorResponse,
            bulk=True,
            # The ranks answer between two products, and a product may be long.
            silence_s=wire.timeout.compute_s,
        )
        try:
            async with aclosing(stream):
                async for message in _ahead(stream):
                    filled = await asyncio.to_thread(_store, elements, filled, message, start)
                    pauses.reset()
            if filled < num_elements:
                raise OutOfRangeError(
                    f"the server sent {filled} of {num_elements} elements", reason="SHAPE_MISMATCH"
                )
        except HvpError as error:
            if not is_resumable(error):
                raise
            await pauses.after(error)
    return elements


async def _ahead(stream: AsyncIterator[Message]) -> AsyncIterator[Message]:
    """The same messages; the next one comes while the caller is at work on one."""
    coming = asyncio.ensure_future(anext(stream, None))
    try:
        while (message := await coming) is not None:
            coming = asyncio.ensure_future(anext(stream, None))
            yield message
    finally:
        coming.cancel()
        await asyncio.wait([coming])


def _store(
    elements: NDArray[Any], filled: int, message: vector_pb2.ReadVectorResponse, start: int
) -> int:
    """Put a chunk in its place and return how far the array is filled."""
    expected = start + filled
    if google_crc32c.value(message.data) != message.crc32c or message.element_offset != expected:
        raise AbortedError(
            f"a chunk at element {message.element_offset} was damaged on the way",
            reason="CHUNK_CHECKSUM_MISMATCH",
        )
    chunk = np.frombuffer(message.data, elements.dtype.newbyteorder("<"))
    elements[filled : filled + chunk.size] = chunk
    return filled + chunk.size
