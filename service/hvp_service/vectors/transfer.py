"""Transfers of elements: a stream into a vector, and a range of a vector into a stream."""

from __future__ import annotations

import asyncio
import shutil
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from hvp_workers.backend import Backend

from hvp_service.app.dependencies import Dependencies
from hvp_service.blobs.service import resolve_range
from hvp_service.blobs.store import Piece, read_range
from hvp_service.calls.errors import ServiceError
from hvp_service.calls.names import Name, parse
from hvp_service.operators.activations import activation_of
from hvp_service.operators.resolver import check_dtype
from hvp_service.uploads.file import UploadFile, disk_full
from hvp_service.vectors.rows import Vector
from hvp_service.vectors.service import FileSource, checkpoint_name, create, space_of, wrong_size
from hvp_service.vectors.store import ITEM_BYTES


@dataclass(frozen=True, kw_only=True)
class VectorPiece:
    """One message of a stream that writes a vector."""

    element_offset: int
    data: bytes
    crc32c: int


async def write(
    deps: Dependencies,
    project: str,
    checkpoint: str,
    dtype: str,
    request_id: str,
    pieces: AsyncIterator[VectorPiece],
    session: str = "",
    data_batch: str = "",
    parameters: Sequence[str] = (),
    module: str = "",
    of_input: bool = False,
) -> Vector:
    """Make a vector from elements that come in one stream, in a session or in none.

    Raises:
        ServiceError: As `create` and `receive`, REQUEST_ID_REUSED.
    """
    # The session is held from the first element on: it must not expire in a slow stream.
    async with deps.sessions.using(project, session):
        space = data_batch, parameters, module, of_input
        source = await receive(deps, project, checkpoint, dtype, pieces, *space)
        return await _write(deps, project, checkpoint, dtype, request_id, source, session, *space)


async def _write(
    deps: Dependencies,
    project: str,
    checkpoint: str,
    dtype: str,
    request_id: str,
    source: FileSource,
    session: str,
    data_batch: str,
    parameters: Sequence[str],
    module: str,
    of_input: bool,
) -> Vector:
    space = data_batch, parameters, module, of_input

    async def respond() -> bytes:
        made = await create(deps, project, checkpoint, dtype, source, session, *space)
        return str(made.name).encode()

    try:
        # The elements' digest stands for them: a stream cannot be kept to be compared.
        name = await deps.request_log.once(
            (project, "WriteVector", request_id),
            "\0".join(
                [checkpoint, dtype, source.sha256, session, data_batch, *parameters]
                + ([module, str(of_input)] if module else [])
            ).encode(),
            respond,
        )
    finally:
        source.path.unlink(missing_ok=True)
    return await deps.vectors.get(parse(name.decode(), "vectors"))


async def receive(
    deps: Dependencies,
    project: str,
    checkpoint: str,
    dtype: str,
    pieces: AsyncIterator[VectorPiece],
    data_batch: str = "",
    parameters: Sequence[str] = (),
    module: str = "",
    of_input: bool = False,
) -> FileSource:
    """Take the elements of a vector that come in one stream into a temporary file.

    The caller unlinks the file.

    Raises:
        ServiceError: RESOURCE_NOT_FOUND, DTYPE_UNSUPPORTED, SHAPE_MISMATCH,
            CHUNK_CHECKSUM_MISMATCH, CHUNK_TOO_LARGE, WRITE_OFFSET_GAP, DISK_FULL,
            PARAMETERS_NOT_FOUND, PARAMETERS_INVALID, MODULES_INVALID, MODULE_NOT_FOUND,
            MODULE_UNSUPPORTED.
    """
    owner = checkpoint_name(project, checkpoint)
    known = check_dtype(dtype)
    activation = activation_of(module, of_input=of_input, field="create.module")
    num_elements, *_ = await space_of(deps, owner, data_batch, parameters, activation, known)
    item = ITEM_BYTES[known]
    expected = num_elements * item
    free = shutil.disk_usage(deps.state_dir.root).free
    if expected > free:
        raise disk_full(expected - free)
    path = deps.state_dir.temporary(f"{uuid.uuid4().hex}.write")
    file = await asyncio.to_thread(UploadFile, path, 0, None)
    try:
        async for piece in pieces:
            if len(piece.data) > deps.config.max_chunk_bytes:
                raise ServiceError(
                    "CHUNK_TOO_LARGE",
                    f"A chunk holds at most {deps.config.max_chunk_bytes} bytes.",
                    field="data",
                )
            if piece.element_offset * item != file.position:
                raise ServiceError(
                    "WRITE_OFFSET_GAP",
                    f"A chunk for element {piece.element_offset} came where "
                    f"{file.position // item} was due; send the vector again.",
                )
            if file.position + len(piece.data) > expected:
                raise wrong_size(expected, file.position + len(piece.data), "data")
            await asyncio.to_thread(file.append, piece.data, piece.crc32c, 0)
        await asyncio.to_thread(file.sync)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    finally:
        file.close()
    return FileSource(path, file.sha256())


async def read(deps: Dependencies, name: Name, offset: int, limit: int) -> AsyncIterator[Piece]:
    """Stream a range of elements; the pieces' offsets are in elements.

    Raises:
        ServiceError: RESOURCE_NOT_FOUND, READ_RANGE_INVALID, INPUT_MISSING.
    """
    async with deps.vectors.using([name]) as (vector,):
        start, stop = resolve_range(offset, limit, vector.num_elements)
        item = ITEM_BYTES[vector.dtype]
        piece_bytes = deps.config.max_chunk_bytes // item * item
        if (kept := deps.vectors.file(vector)).exists():
            async for piece in read_range(kept, start * item, stop * item, piece_bytes):
                yield Piece(piece.offset // item, piece.data, piece.crc32c)
            return
        part = deps.state_dir.temporary(f"{uuid.uuid4().hex}.read")

        async def save(backend: Backend) -> None:
            await deps.vectors.ensure_resident(backend, [vector])
            await backend.save_vector(vector.name.id, part, start, stop)

        async def unlink() -> None:
            part.unlink(missing_ok=True)

        try:
            await deps.group.call(save, undo=unlink)
            async for piece in read_range(part, 0, (stop - start) * item, piece_bytes):
                yield Piece(start + piece.offset // item, piece.data, piece.crc32c)
        finally:
            await unlink()
