"""Reading blobs."""

from __future__ import annotations

from collections.abc import AsyncIterator

from hvp_service.app.dependencies import Dependencies
from hvp_service.blobs.store import Piece, read_range
from hvp_service.calls.errors import ServiceError
from hvp_service.calls.names import Name


def resolve_range(offset: int, limit: int, size: int) -> tuple[int, int]:
    """Start and stop of a range; limit 0 means to the end.

    Raises:
        ServiceError: READ_RANGE_INVALID.
    """
    stop = offset + limit if limit else size
    if offset < 0 or limit < 0 or offset > size or stop > size:
        raise ServiceError(
            "READ_RANGE_INVALID",
            f"The range of {limit} from {offset} leaves the {size} there are.",
            metadata={"size": str(size)},
        )
    return offset, stop


async def download(deps: Dependencies, name: Name, offset: int, limit: int) -> AsyncIterator[Piece]:
    """Stream a range of a blob.

    Raises:
        ServiceError: RESOURCE_NOT_FOUND, READ_RANGE_INVALID.
    """
    with deps.blobs.hold(name.id):
        blob = await deps.blobs.get(name)
        start, stop = resolve_range(offset, limit, blob.digest.size_bytes)
        path = deps.blobs.path(blob.digest)
        async for piece in read_range(path, start, stop, deps.config.max_chunk_bytes):
            yield piece
