"""The messages of an upload stream, and the order that they must have."""

from __future__ import annotations

from dataclasses import dataclass

from hvp_service.calls.errors import ServiceError
from hvp_service.uploads.rows import Upload


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """One message of an upload stream."""

    upload: str
    write_offset: int
    data: bytes
    crc32c: int
    finish: bool


def known_bytes(
    upload: Upload, chunk: Chunk, position: int, contiguous: int | None, max_chunk_bytes: int
) -> int:
    """Number of leading bytes of a chunk that the server has already.

    Args:
        upload: Session of the upload.
        chunk: The chunk that came.
        position: Number of bytes that the server has.
        contiguous: Offset at which the chunk before it ended; None for a stream's first chunk.
        max_chunk_bytes: Most bytes that a chunk may hold.

    Raises:
        ServiceError: CHUNK_TOO_LARGE, WRITE_OFFSET_GAP, SIZE_EXCEEDED.
    """
    if len(chunk.data) > max_chunk_bytes:
        raise ServiceError(
            "CHUNK_TOO_LARGE",
            f"A chunk holds at most {max_chunk_bytes} bytes; this one holds {len(chunk.data)}.",
            field="data",
        )
    offset, end = chunk.write_offset, chunk.write_offset + len(chunk.data)
    if offset < 0 or offset > position or (contiguous is not None and offset != contiguous):
        raise ServiceError(
            "WRITE_OFFSET_GAP",
            f"A chunk for byte {offset} came where {position} was due; ask for the upload's "
            "state and resume there.",
            metadata={"offset": str(offset), "committed_size": str(upload.committed_size)},
        )
    if end > upload.expected.size_bytes:
        raise ServiceError(
            "SIZE_EXCEEDED",
            f"{upload.expected.size_bytes} bytes were announced and byte {end} has come.",
            field="data",
        )
    return min(position, end) - offset
