"""Arrays that are to become vectors."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import google_crc32c
import numpy as np
import pytest
from hvp_client import InvalidArgumentError
from hvp_client._bulk import as_elements, read_elements
from hvp_client._exceptions import UnavailableError
from hvp_client._settings import Retry, Timeout
from hvp_protos.v1 import vector_pb2

F32, F64 = np.dtype("float32"), np.dtype("float64")


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize(
    "value",
    [[1, 2, 3], np.arange(6)[::2] - 1.0, np.array([True, False, True]), np.ones(3, ">f8")],
    ids=["list", "strided", "bool", "big-endian"],
)
def test_real_numbers_are_taken_in_the_operators_dtype(value: Any, dtype: np.dtype[Any]) -> None:
    elements = as_elements(value, 3, dtype, "v")
    assert elements.dtype == dtype.newbyteorder("<")
    assert elements.flags.c_contiguous
    np.testing.assert_array_equal(elements, np.asarray(value).astype(dtype))


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (np.ones(4), "SHAPE_MISMATCH"),
        (np.ones((3, 1)), "SHAPE_MISMATCH"),
        (1.0, "SHAPE_MISMATCH"),
        (np.ones(3) * 1j, "DTYPE_UNSUPPORTED"),
        (["a", "b", "c"], "DTYPE_UNSUPPORTED"),
        ([1, [2], 3], "DTYPE_UNSUPPORTED"),
        (np.array([1.0, np.nan, np.inf]), "NON_FINITE"),
        (np.array([1.0, 1e300, 1.0]), "NON_FINITE"),
    ],
)
def test_what_cannot_be_a_vector_is_refused_before_it_is_sent(value: Any, reason: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        as_elements(value, 3, F32, "v")
    assert (caught.value.reason, caught.value.field) == (reason, "v")
    if reason == "NON_FINITE":
        assert caught.value.metadata == {"index": "1"}


class Breaking:
    """A wire on which every stream breaks after one chunk of two elements."""

    def __init__(self, elements: Any):
        self.timeout, self.retry = Timeout(), Retry(initial_backoff_s=0.001)
        self.elements = elements
        self.asked: list[tuple[int, int]] = []

    async def server_stream(
        self, method: str, request: vector_pb2.ReadVectorRequest, *_: Any, **__: Any
    ) -> AsyncGenerator[vector_pb2.ReadVectorResponse, None]:
        self.asked.append((request.element_offset, request.element_limit))
        end = request.element_offset + min(2, request.element_limit)
        data = self.elements[request.element_offset : end].tobytes()
        yield vector_pb2.ReadVectorResponse(
            element_offset=request.element_offset, data=data, crc32c=google_crc32c.value(data)
        )
        raise UnavailableError("the connection broke")


async def test_a_part_of_a_vector_is_read_on_from_where_its_stream_broke() -> None:
    wire = Breaking(np.arange(10.0))
    session: Any = SimpleNamespace(wire=wire)
    part = await read_elements(session, "v", 5, F64, start=3)
    np.testing.assert_array_equal(part, [3, 4, 5, 6, 7])
    assert wire.asked == [(3, 5), (5, 3), (7, 1)]
