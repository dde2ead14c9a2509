"""Arrays that are to become vectors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hvp_client import InvalidArgumentError
from hvp_client._bulk import as_elements

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
