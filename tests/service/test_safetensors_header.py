from __future__ import annotations

import json
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hvp_service.storage.safetensors_header import (
    MAX_HEADER_BYTES,
    PickleError,
    SafetensorsError,
    parse_header,
    read_header,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

FAST = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def file_of(header: Any, data: bytes) -> bytes:
    """A file with any header."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def read(path: Path, content: bytes) -> dict[str, Any]:
    path.write_bytes(content)
    return dict(read_header(path).tensors)


def library_takes(path: Path) -> bool:
    try:
        with safe_open(path, framework="np") as file:
            list(file.keys())
    except SafetensorError:
        return False
    return True


tensors = st.dictionaries(
    st.text(min_size=1, max_size=20).filter(lambda name: name != "__metadata__"),
    st.tuples(
        st.sampled_from(["float32", "float64", "int64", "uint8", "bool", "float16"]),
        st.lists(st.integers(0, 4), max_size=3),
    ),
    max_size=4,
)


@FAST
@given(tensors)
def test_every_file_that_the_library_writes_is_read(tmp_path: Path, wanted: Any) -> None:
    arrays = {name: np.zeros(shape, dtype) for name, (dtype, shape) in wanted.items()}
    found = read(tmp_path / "f", save(arrays))
    assert {name: span.shape for name, span in found.items()} == {
        name: array.shape for name, array in arrays.items()
    }
    assert {name: span.end - span.begin for name, span in found.items()} == {
        name: array.nbytes for name, array in arrays.items()
    }


@FAST
@given(st.data())
def test_a_changed_byte_is_refused_or_harmless_to_the_library(
    tmp_path: Path, data: st.DataObject
) -> None:
    content = bytearray(save({"a": np.arange(3.0), "b": np.zeros((2, 2), np.int64)}))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    del content[data.draw(st.integers(0, len(content))) :]
    path = tmp_path / "f"
    try:
        read(path, bytes(content))
    except (SafetensorsError, PickleError):
        return
    assert library_takes(path)


sizes = st.one_of(st.integers(-1, 9), st.sampled_from([2**31, 2**63, 2**64, 1.5, None, "1"]))


@FAST
@given(
    st.dictionaries(
        st.sampled_from(["a", "b", "__metadata__"]),
        st.one_of(
            st.builds(
                entry,
                st.sampled_from(["F32", "U8", "F4", "F99", 3]),
                st.lists(sizes, max_size=3),
                st.lists(sizes, max_size=3),
            ),
            st.none(),
            st.dictionaries(st.text(max_size=2), st.text(max_size=2), max_size=2),
        ),
    ),
    st.integers(0, 12),
)
def test_a_header_that_is_taken_is_one_that_the_library_takes(
    tmp_path: Path, header: Any, num_bytes: int
) -> None:
    path = tmp_path / "f"
    try:
        read(path, file_of(header, bytes(num_bytes)))
    except SafetensorsError:
        return
    assert library_takes(path)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "length alone"),
        (b"abc", "length alone"),
        ((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{", "are possible"),
        ((50).to_bytes(8, "little") + b"{}", "the file has"),
        (file_of(b"[]", b""), "start with"),
        (file_of(b"{", b""), "not JSON"),
        (file_of(b"{\xff}", b""), "UTF-8"),
        (file_of(b'{"a":NaN}', b""), "no JSON"),
        (file_of(b"{" * 100_000, b""), "JSON"),
        (file_of(b'{"a":' + json.dumps(entry()).encode() + b',"a":1}', bytes(8)), "twice"),
        (file_of({"a": entry(offsets=(0, 4))}, bytes(4)), "takes 8 bytes"),
        (file_of({"a": entry(offsets=(8, 0))}, bytes(8)), r"\[begin, end\]"),
        (file_of({"a": entry(offsets=(1, 9))}, bytes(9)), "hole"),
        (file_of({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)), "overlaps"),
        (file_of({"a": entry()}, bytes(7)), "of which the file has 7"),
        (file_of({"a": entry()}, bytes(9)), "tensors end at byte 8"),
        (file_of({"a": entry(dtype="F128")}, bytes(8)), "unknown dtype"),
        (file_of({"a": entry(shape=(2**62, 2**62))}, bytes(8)), "more elements"),
        (file_of({"a": entry(shape=(-2,))}, bytes(8)), "list of sizes"),
        (file_of({"a": entry(shape=(True, 2))}, bytes(8)), "list of sizes"),
        (file_of({"a": {"dtype": "F32"}}, bytes(8)), "exactly the fields"),
        (file_of({"__metadata__": {"a": 1}}, b""), "strings to strings"),
        (file_of({"a" * 1025: entry()}, bytes(8)), "more than 1024 characters"),
        (file_of({"a": entry(shape=(1,) * 65)}, bytes(8)), "more than 64 dimensions"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, content: bytes, problem: str) -> None:
    with pytest.raises(SafetensorsError, match=problem):
        read(tmp_path / "f", content)


def test_an_error_points_at_the_tensor_and_its_field(tmp_path: Path) -> None:
    content = file_of({"first": entry(), "second": entry(offsets=(9, 17))}, bytes(17))
    with pytest.raises(SafetensorsError) as caught:
        read(tmp_path / "f", content)
    assert caught.value.field == "second.data_offsets"
    assert content[caught.value.byte_offset :].startswith(b'"second"')


@pytest.mark.parametrize("start", [b"\x80\x02}q\x00.", b"\x80\x04\x95aaaaaaa", b"PK\x03\x04aaaaaa"])
def test_pickles_and_zip_archives_are_told_apart(tmp_path: Path, start: bytes) -> None:
    with pytest.raises(PickleError):
        read(tmp_path / "f", start)


@pytest.mark.parametrize("length", [0x280, 0x380, 0x480, 0x580])
def test_a_header_whose_length_begins_like_a_pickle_is_read(tmp_path: Path, length: int) -> None:
    raw = json.dumps({"a": entry()}).encode().ljust(length)
    assert read(tmp_path / "f", file_of(raw, bytes(8)))


@pytest.mark.parametrize(
    "raw",
    [b'{"a":[' + b"[]," * (5 << 20) + b"[]]}", b"{" + b'"a":{},' * (1 << 20) + b'"a":{}}'],
    ids=["lists", "objects"],
)
def test_a_header_that_would_be_many_times_as_large_in_memory_is_refused_before_it_is(
    raw: bytes,
) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(SafetensorsError, match="are possible"):
            parse_header(raw, 0)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 1 << 20


def test_a_long_header_with_a_key_twice_is_refused_in_a_moment() -> None:
    names = "".join(f'"k{index}":0,' for index in range(50_000))
    began = time.monotonic()
    with pytest.raises(SafetensorsError, match="'z' stands twice"):
        parse_header(f'{{{names}"z":0,"z":0}}'.encode(), 0)
    assert time.monotonic() - began < 5.0  # comparing every pair takes a minute
