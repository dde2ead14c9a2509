"""The header of a safetensors file, read strictly and without torch.

Layout: 8 bytes little-endian header length N, N bytes of JSON that start with `{`, then the data.
Every tensor has a dtype, a shape and a span of the data; the spans follow one another from the
first byte of the data to the last byte of the file, without a hole and without overlap.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvp_folders.json_bounds import JsonBounds

# The format allows 100 MB, which become a gigabyte of Python objects. The largest published files
# have headers of some hundred kilobytes.
MAX_HEADER_BYTES = 16 << 20
MAX_TENSORS = 100_000
MAX_NAME_LENGTH = 1024
MAX_DIMENSIONS = 64
# A tensor of four dimensions is one object with two lists and seven entries.
_BOUNDS = JsonBounds(
    num_bytes=MAX_HEADER_BYTES,
    num_objects=MAX_TENSORS + 2,
    num_lists=2 * MAX_TENSORS + 2,
    num_items=8 * MAX_TENSORS,
)

# Bits per element; everything the format names.
DTYPE_BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8,
    "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "F64": 64, "I64": 64, "U64": 64, "C64": 64,
}  # fmt: skip

_PICKLE = b"\x80"  # the opcode that begins every pickle since protocol 2
_PICKLE_PROTOCOLS = (b"\x02", b"\x03", b"\x04", b"\x05")
_ZIP = b"PK\x03\x04"
_MAX_INTEGER = (1 << 63) - 1


class SafetensorsError(Exception):
    """A file that is not a safetensors file.

    Attributes:
        message: What is wrong with the file.
        byte_offset: Where in the file the fault is.
        field: The tensor at fault and its field, or "".
    """

    def __init__(self, message: str, *, byte_offset: int, field: str = ""):
        super().__init__(message)
        self.message = message
        self.byte_offset = byte_offset
        self.field = field


class PickleError(Exception):
    """A pickle, or a zip archive of pickles: reading it would run its code."""


@dataclass(frozen=True)
class TensorSpan:
    """One tensor of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int  # bytes from the start of the data
    end: int


@dataclass(frozen=True)
class Header:
    """The header of a file, checked."""

    tensors: dict[str, TensorSpan]
    data_start: int  # byte in the file


def read_header(path: Path) -> Header:
    """Read and check a file's header.

    Cost: reads the header alone.

    Raises:
        SafetensorsError: With the offset of the first thing that is wrong.
        PickleError: The file starts as a pickle or a zip archive.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        # A header of 640 bytes begins as a pickle does; only the brace behind tells them apart.
        if _looks_pickled(start) and file.peek(1)[:1] != b"{":
            raise PickleError
        if len(start) < 8:
            raise SafetensorsError(
                f"the file has {size} bytes, the length alone takes 8", byte_offset=size
            )
        length = int.from_bytes(start, "little")
        if length > MAX_HEADER_BYTES:
            raise SafetensorsError(
                f"the header's length is given as {length} bytes, {MAX_HEADER_BYTES} are possible",
                byte_offset=0,
            )
        if 8 + length > size:
            raise SafetensorsError(
                f"the header's length is given as {length} bytes, the file has {size}",
                byte_offset=0,
            )
        raw = file.read(length)
    return parse_header(raw, size - 8 - length)


def _looks_pickled(start: bytes) -> bool:
    return start.startswith(_ZIP) or (start[:1] == _PICKLE and start[1:2] in _PICKLE_PROTOCOLS)


def parse_header(raw: bytes, data_bytes: int) -> Header:
    """Check a header against the number of data bytes that follow it.

    Raises:
        SafetensorsError: As `read_header`.
    """
    tensors: dict[str, TensorSpan] = {}
    for name, entry in _load_json(raw).items():
        if len(name) > MAX_NAME_LENGTH:
            raise _at(raw, name, "", f"has a name of more than {MAX_NAME_LENGTH} characters")
        if name == "__metadata__":
            _check_metadata(entry, raw)
        else:
            tensors[name] = _read_entry(name, entry, raw)
    position = 0
    for name, span in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if span.begin != position:
            what = "overlaps the tensor before it" if span.begin < position else "leaves a hole"
            raise _at(
                raw,
                name,
                "data_offsets",
                f"starts at byte {span.begin} of the data where {position} is due: it {what}",
            )
        if span.end > data_bytes:
            raise _at(
                raw,
                name,
                "data_offsets",
                f"ends at byte {span.end} of the data, of which the file has {data_bytes}",
            )
        position = span.end
    if position != data_bytes:
        raise SafetensorsError(
            f"the tensors end at byte {position} of the data, of which the file has {data_bytes}",
            byte_offset=8 + len(raw) + position,
        )
    return Header(tensors=tensors, data_start=8 + len(raw))


def _load_json(raw: bytes) -> dict[str, Any]:
    def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            counts = Counter(name for name, _ in pairs)
            twice = next(name for name, count in counts.items() if count > 1)
            raise SafetensorsError(
                f"the key {twice!r} stands twice", byte_offset=_offset_of(raw, twice), field=twice
            )
        return found

    def refuse_constant(text: str) -> Any:
        raise SafetensorsError(f"{text} is no JSON", byte_offset=8 + raw.find(text.encode()))

    if not raw.startswith(b"{"):
        raise SafetensorsError("the header does not start with '{'", byte_offset=8)
    if too_much := _BOUNDS.exceeded_by(raw):
        raise SafetensorsError(f"the header has {too_much}", byte_offset=8)
    try:
        loaded = json.loads(
            raw.decode("utf-8"), object_pairs_hook=refuse_duplicates, parse_constant=refuse_constant
        )
    except UnicodeDecodeError as error:
        raise SafetensorsError("the header is not UTF-8", byte_offset=8 + error.start) from None
    except json.JSONDecodeError as error:
        offset = len(error.doc[: error.pos].encode())
        raise SafetensorsError(
            f"the header is not JSON: {error.msg}", byte_offset=8 + offset
        ) from None
    except (RecursionError, ValueError):  # nesting, or an integer of thousands of digits
        raise SafetensorsError("the header is not JSON of this format", byte_offset=8) from None
    assert isinstance(loaded, dict)  # it starts with a brace
    return loaded


def _check_metadata(entry: Any, raw: bytes) -> None:
    if not isinstance(entry, dict) or not all(isinstance(value, str) for value in entry.values()):
        raise SafetensorsError(
            "__metadata__ maps strings to strings",
            field="__metadata__",
            byte_offset=_offset_of(raw, "__metadata__"),
        )


def _read_entry(name: str, entry: Any, raw: bytes) -> TensorSpan:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _at(raw, name, "", "has not exactly the fields dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _at(raw, name, "dtype", f"has the unknown dtype {str(dtype)[:40]!r}")
    if not isinstance(shape, list) or not all(_is_size(size) for size in shape):
        raise _at(raw, name, "shape", "has a shape that is not a list of sizes")
    if len(shape) > MAX_DIMENSIONS:
        raise _at(raw, name, "shape", f"has more than {MAX_DIMENSIONS} dimensions")
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(_is_size(offset) for offset in offsets)
        or offsets[0] > offsets[1]
    ):
        raise _at(raw, name, "data_offsets", "has data_offsets that are not [begin, end]")
    bits = DTYPE_BITS[dtype]
    for size in shape:
        # Stepwise: sizes multiply to numbers of any length, and a zero does not excuse them.
        bits *= size
        if bits > _MAX_INTEGER:
            raise _at(raw, name, "shape", "has more elements than a file can hold")
    if bits % 8:
        raise _at(raw, name, "shape", "does not fill whole bytes")
    begin, end = offsets
    if bits // 8 != end - begin:
        raise _at(
            raw,
            name,
            "data_offsets",
            f"of {dtype} and shape {shape[:8]} takes {bits // 8} bytes, its data_offsets "
            f"span {end - begin}",
        )
    return TensorSpan(dtype=dtype, shape=tuple(shape), begin=begin, end=end)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_INTEGER


def _at(raw: bytes, name: str, field: str, problem: str) -> SafetensorsError:
    shown = name[:200]
    return SafetensorsError(
        f"the tensor {shown!r} {problem}",
        byte_offset=_offset_of(raw, name),
        field=f"{shown}.{field}" if field else shown,
    )


def _offset_of(raw: bytes, name: str) -> int:
    """Byte of a key in the file; the header's start where the key is written with escapes."""
    found = raw.find(json.dumps(name, ensure_ascii=False).encode("utf-8", "surrogatepass"))
    return 8 + max(found, 0)
