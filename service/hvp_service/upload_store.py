"""Uploads that resume: what has been promised as committed is never asked for again."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import time
import uuid
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from hvp_service.blob_store import Blob, BlobStore, Digest
from hvp_service.clock import SECOND, now_us
from hvp_service.config import ServerConfig
from hvp_service.database import Database, uploads
from hvp_service.errors import ServiceError, not_found
from hvp_service.names import Name, parse
from hvp_service.state_dir import StateDir
from hvp_service.upload_file import Hash, UploadFile, disk_full

Result = TypeVar("Result")

# A session that was just handed out is its caller's for this long, until the first stream comes.
_FIRST_STREAM_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Upload:
    """One upload as its row has it."""

    name: Name
    expected: Digest
    committed_size: int  # durable bytes
    writer_epoch: int
    state: str  # OPEN, FINISHED or CANCELLED
    expire_time: int  # microseconds
    blob: Blob | None = None


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """One message of an upload stream."""

    upload: str
    write_offset: int
    data: bytes
    crc32c: int
    finish: bool


def _from_row(row: sa.Row[Any]) -> Upload:
    return Upload(
        name=Name(row.project, "uploads", row.id),
        expected=Digest(sha256=row.sha256, size_bytes=row.size_bytes),
        committed_size=row.committed_size,
        writer_epoch=row.writer_epoch,
        state=row.state,
        expire_time=row.expire_time,
    )


class UploadStore:
    """Upload sessions: rows, partial files, and the streams that write to them.

    Durability order: bytes written, synced, row updated, and only then reported as committed.
    Every step on a file runs to its end under the upload's lock, whoever still waits for it.
    """

    def __init__(
        self, database: Database, state_dir: StateDir, blobs: BlobStore, config: ServerConfig
    ):
        self._database = database
        self._state_dir = state_dir
        self._blobs = blobs
        self._config = config
        # The newest stream of an upload, and what may write to its file: one stream at a time.
        self._epochs: dict[str, int] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._hashes: dict[str, tuple[int, Hash]] = {}  # at the committed size
        self._handed_out: dict[str, float] = {}  # monotonic time; until the first stream
        self._steps: set[asyncio.Task[Any]] = set()

    async def close(self) -> None:
        """Wait for the steps that run, so that the database may be closed."""
        while self._steps:
            await asyncio.wait(self._steps)

    async def start(self, project: str, expected: Digest) -> Upload:
        """Open a session, finished at once when the blob is here.

        An open session for the same bytes that nobody writes to goes on instead.

        Raises:
            ServiceError: DIGEST_MALFORMED, SIZE_INVALID, DISK_FULL.
        """
        expected.check("expected")
        blob = await self._blobs.find(project, expected.sha256)
        if blob is not None and blob.digest != expected:
            raise ServiceError(
                "SIZE_INVALID",
                f"The blob of this SHA-256 has {blob.digest.size_bytes} bytes.",
                field="expected.size_bytes",
            )
        await self._drop_expired()
        expire_time = now_us() + int(self._config.upload_ttl_s * SECOND)
        async with self._database.writing() as connection:
            if blob is None:
                free = await self._free_bytes(connection)
                left = await self._left_behind(
                    connection, project, expected, any_age=expected.size_bytes > free
                )
                if left is not None:
                    await connection.execute(
                        sa.update(uploads)
                        .where(uploads.c.id == left.name.id)
                        .values(expire_time=expire_time)
                    )
                    self._handed_out[left.name.id] = time.monotonic()
                    return replace(left, expire_time=expire_time)
                if expected.size_bytes > free:
                    raise disk_full(expected.size_bytes - free)
            upload = Upload(
                name=Name(project, "uploads", uuid.uuid4().hex),
                expected=expected,
                committed_size=0 if blob is None else expected.size_bytes,
                writer_epoch=0,
                state="OPEN" if blob is None else "FINISHED",
                expire_time=expire_time,
                blob=blob,
            )
            await connection.execute(
                uploads.insert().values(
                    id=upload.name.id,
                    project=project,
                    sha256=expected.sha256,
                    size_bytes=expected.size_bytes,
                    committed_size=upload.committed_size,
                    writer_epoch=0,
                    state=upload.state,
                    expire_time=upload.expire_time,
                )
            )
        if blob is None:
            self._handed_out[upload.name.id] = time.monotonic()
        return upload

    async def _free_bytes(self, connection: AsyncConnection) -> int:
        """Room that no open session has been promised."""
        promised = await connection.scalar(
            sa.select(
                sa.func.coalesce(sa.func.sum(uploads.c.size_bytes - uploads.c.committed_size), 0)
            ).where(uploads.c.state == "OPEN", uploads.c.expire_time >= now_us())
        )
        return shutil.disk_usage(self._state_dir.root).free - int(promised or 0)

    async def _left_behind(
        self, connection: AsyncConnection, project: str, expected: Digest, *, any_age: bool
    ) -> Upload | None:
        """The open session for these bytes with the most of them and no stream.

        One that was handed out a moment ago is about to have its first stream: two callers with
        the same bytes are not to send each other away, unless there is no room for both
        (`any_age`).
        """
        rows = await connection.execute(
            sa.select(uploads)
            .where(
                uploads.c.project == project,
                uploads.c.sha256 == expected.sha256,
                uploads.c.size_bytes == expected.size_bytes,
                uploads.c.state == "OPEN",
                uploads.c.expire_time >= now_us(),
            )
            .order_by(uploads.c.committed_size.desc())
        )
        before = time.monotonic() - (0.0 if any_age else _FIRST_STREAM_S)
        for row in rows:
            if row.id not in self._epochs and self._handed_out.get(row.id, before) <= before:
                return _from_row(row)
        return None

    async def get(self, name: Name) -> Upload:
        """State of a session.

        Raises:
            ServiceError: RESOURCE_NOT_FOUND, also for one that has expired or was given up.
        """
        upload = await self._find(name)
        if upload is None or upload.state == "CANCELLED":
            raise not_found(str(name), "upload")
        if upload.state == "FINISHED":
            blob = await self._blobs.find(name.project, upload.expected.sha256)
            if blob is None:
                raise not_found(str(name), "upload")
            return replace(upload, blob=blob)
        if upload.expire_time < now_us():
            raise not_found(str(name), "upload")
        return upload

    async def cancel(self, name: Name) -> None:
        """Give a session up; one that has ended stays as it is.

        Raises:
            ServiceError: RESOURCE_NOT_FOUND.
        """
        if await self._find(name) is None:
            raise not_found(str(name), "upload")
        self._epochs.pop(name.id, None)  # whoever writes to it now is told to stop
        async with self._lock(name.id):
            await self._drop(name, "CANCELLED")

    async def write(self, chunks: AsyncIterator[Chunk]) -> Upload:
        """Take one stream of chunks into the session that its first message names.

        A stream that ends early, in whatever way, leaves a session that resumes.

        Raises:
            ServiceError: RESOURCE_NOT_FOUND, CHUNK_CHECKSUM_MISMATCH, WRITE_OFFSET_GAP,
                UPLOAD_SUPERSEDED, BLOB_DIGEST_MISMATCH, CHUNK_TOO_LARGE, SIZE_EXCEEDED, DISK_FULL.
        """
        first = await anext(chunks, None)
        if first is None:
            raise not_found("", "upload")
        name = parse(first.upload, "uploads")
        upload = await self.get(name)
        if upload.state == "FINISHED":
            return upload
        upload = await self._new_epoch(upload)
        epoch = upload.writer_epoch
        self._handed_out.pop(name.id, None)
        opening = self._step(self._open(name, epoch))
        try:
            upload, file = await asyncio.shield(opening)
        except asyncio.CancelledError:
            self._step(self._abandon(opening, name.id, epoch))
            raise
        except Exception:
            self._end_epoch(name.id, epoch)
            raise
        if file is None:
            self._end_epoch(name.id, epoch)
            return upload
        try:
            return await self._take(upload, epoch, file, first, chunks)
        finally:
            # The client may be gone and this task cancelled: what has come is still kept.
            await asyncio.shield(self._step(self._leave(upload, epoch, file)))

    def _step(self, work: Coroutine[Any, Any, Result]) -> asyncio.Task[Result]:
        task = asyncio.ensure_future(work)
        self._steps.add(task)
        task.add_done_callback(self._steps.discard)
        return task

    async def _open(self, name: Name, epoch: int) -> tuple[Upload, UploadFile | None]:
        """The session and its file at the durable position; no file when it has ended."""
        async with self._lock(name.id):
            self._stop_if_superseded(name, epoch)
            upload = await self.get(name)  # an older stream may have committed more meanwhile
            if upload.state == "OPEN":
                upload = await self._settle(upload)
            if upload.state == "FINISHED":
                return upload, None
            position, known = self._hashes.get(name.id, (-1, None))
            file = await asyncio.to_thread(
                UploadFile,
                self._state_dir.upload(name.id),
                upload.committed_size,
                known.copy() if known and position == upload.committed_size else None,
            )
            return upload, file

    async def _abandon(
        self, opening: asyncio.Task[tuple[Upload, UploadFile | None]], identifier: str, epoch: int
    ) -> None:
        await asyncio.wait([opening])
        if opening.exception() is None and (file := opening.result()[1]) is not None:
            await asyncio.to_thread(file.close)
        self._end_epoch(identifier, epoch)

    async def _settle(self, upload: Upload) -> Upload:
        """An open session that agrees with its file, under its lock.

        Where the file has gone, a finish came as far as moving it, or it was damaged.
        """
        if not upload.committed_size:
            return upload
        path = self._state_dir.upload(upload.name.id)
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_size >= upload.committed_size:
                return upload
        self._hashes.pop(upload.name.id, None)
        whole = await asyncio.to_thread(self._blobs.is_whole, upload.expected)
        async with self._database.writing() as connection:
            blob = None
            if whole:
                blob = await self._blobs.register(connection, upload.name.project, upload.expected)
            settled = replace(
                upload,
                state="OPEN" if blob is None else "FINISHED",
                committed_size=0 if blob is None else upload.expected.size_bytes,
                blob=blob,
            )
            await connection.execute(
                sa.update(uploads)
                .where(uploads.c.id == upload.name.id)
                .values(state=settled.state, committed_size=settled.committed_size)
            )
        path.unlink(missing_ok=True)
        return settled

    async def _take(
        self,
        upload: Upload,
        epoch: int,
        file: UploadFile,
        first: Chunk,
        chunks: AsyncIterator[Chunk],
    ) -> Upload:
        chunk: Chunk | None = first
        expected_offset: int | None = None
        committed = upload.committed_size
        while chunk is not None:
            skip = self._admit(upload, chunk, file.position, expected_offset)
            new_bytes = file.position - committed + len(chunk.data) - skip
            commit = new_bytes >= self._config.commit_interval_bytes
            step = self._append(upload, epoch, file, chunk, skip, commit=commit)
            ended = await asyncio.shield(self._step(step))
            if ended is not None:
                return ended
            if commit:
                committed = file.position
            expected_offset = chunk.write_offset + len(chunk.data)
            chunk = await anext(chunks, None)
        await asyncio.shield(self._step(self._pause(upload, epoch, file)))
        return await self.get(upload.name)

    async def _pause(self, upload: Upload, epoch: int, file: UploadFile) -> None:
        async with self._lock(upload.name.id):
            self._stop_if_superseded(upload.name, epoch)
            await self._commit(upload, file)

    async def _append(
        self,
        upload: Upload,
        epoch: int,
        file: UploadFile,
        chunk: Chunk,
        skip: int,
        *,
        commit: bool,
    ) -> Upload | None:
        """Take one chunk in; the ended session when it was the last."""
        async with self._lock(upload.name.id):
            self._stop_if_superseded(upload.name, epoch)
            if chunk.data:
                await asyncio.to_thread(file.append, chunk.data, chunk.crc32c, skip)
            if chunk.finish:
                return await self._finish(upload, file)
            if commit:
                await self._commit(upload, file)
        return None

    def _admit(self, upload: Upload, chunk: Chunk, position: int, contiguous: int | None) -> int:
        """How many leading bytes of a chunk are here already."""
        if len(chunk.data) > self._config.max_chunk_bytes:
            raise ServiceError(
                "CHUNK_TOO_LARGE",
                f"A chunk holds at most {self._config.max_chunk_bytes} bytes; "
                f"this one holds {len(chunk.data)}.",
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

    async def _finish(self, upload: Upload, file: UploadFile) -> Upload:
        found = Digest(sha256=file.sha256(), size_bytes=file.position)
        if found != upload.expected:
            await self._drop(upload.name, "CANCELLED")
            raise ServiceError(
                "BLOB_DIGEST_MISMATCH",
                f"Announced were {upload.expected.size_bytes} bytes with SHA-256 "
                f"{upload.expected.sha256}, arrived have {found.size_bytes} with {found.sha256}; "
                "start again.",
            )
        await asyncio.to_thread(file.sync)
        async with self._database.writing() as connection:
            blob = await self._blobs.adopt(
                connection,
                upload.name.project,
                upload.expected,
                self._state_dir.upload(upload.name.id),
            )
            await connection.execute(
                sa.update(uploads)
                .where(uploads.c.id == upload.name.id)
                .values(state="FINISHED", committed_size=file.position)
            )
        self._hashes.pop(upload.name.id, None)
        return replace(upload, state="FINISHED", committed_size=file.position, blob=blob)

    async def _commit(self, upload: Upload, file: UploadFile) -> None:
        so_far = await asyncio.to_thread(file.sync)
        position = file.position
        async with self._database.writing() as connection:
            await connection.execute(
                sa.update(uploads)
                .where(uploads.c.id == upload.name.id, uploads.c.state == "OPEN")
                .values(committed_size=position)
            )
        self._hashes[upload.name.id] = (position, so_far)

    async def _leave(self, upload: Upload, epoch: int, file: UploadFile) -> None:
        identifier = upload.name.id
        async with self._lock(identifier):
            try:
                if (
                    self._epochs.get(identifier) == epoch
                    and self._state_dir.upload(identifier).exists()
                ):
                    await self._commit(upload, file)
            finally:
                await asyncio.to_thread(file.close)
        self._end_epoch(identifier, epoch)

    def _end_epoch(self, identifier: str, epoch: int) -> None:
        if self._epochs.get(identifier) == epoch:
            del self._epochs[identifier]
            self._locks.pop(identifier, None)

    async def _new_epoch(self, upload: Upload) -> Upload:
        async with self._database.writing() as connection:
            epoch = await connection.scalar(
                sa.update(uploads)
                .where(uploads.c.id == upload.name.id)
                .values(writer_epoch=uploads.c.writer_epoch + 1)
                .returning(uploads.c.writer_epoch)
            )
        assert epoch is not None
        self._epochs[upload.name.id] = max(epoch, self._epochs.get(upload.name.id, 0))
        return replace(upload, writer_epoch=epoch)

    def _stop_if_superseded(self, name: Name, epoch: int) -> None:
        if self._epochs.get(name.id) != epoch:
            raise ServiceError(
                "UPLOAD_SUPERSEDED",
                "A newer stream writes to this upload, or it was given up; stop this one.",
                resource=str(name),
            )

    async def _drop(self, name: Name, state: str) -> None:
        async with self._database.writing() as connection:
            await connection.execute(
                sa.update(uploads)
                .where(uploads.c.id == name.id, uploads.c.state == "OPEN")
                .values(state=state)
            )
        self._hashes.pop(name.id, None)
        self._handed_out.pop(name.id, None)
        with contextlib.suppress(FileNotFoundError):
            self._state_dir.upload(name.id).unlink()

    async def expire(self) -> None:
        """Drop sessions whose time is up and files without a session, settle what a crash left."""
        await self._drop_expired()
        files = list(self._state_dir.upload("x").parent.iterdir())  # a file comes after its row
        async with self._database.reading() as connection:
            rows = await connection.execute(sa.select(uploads).where(uploads.c.state == "OPEN"))
            sessions = [_from_row(row) for row in rows]
        open_ids = {upload.name.id for upload in sessions}
        for path in files:
            if path.name.removesuffix(".part") not in open_ids:
                path.unlink(missing_ok=True)
        for upload in sessions:
            if upload.name.id not in self._epochs:
                await self._step(self._settle_alone(upload.name))

    async def _settle_alone(self, name: Name) -> None:
        async with self._lock(name.id):
            upload = await self._find(name)
            if upload is not None and upload.state == "OPEN":
                await self._settle(upload)
        if name.id not in self._epochs:
            self._locks.pop(name.id, None)

    async def _drop_expired(self) -> None:
        async with self._database.writing() as connection:
            dropped = await connection.scalars(
                sa.delete(uploads)
                .where(uploads.c.expire_time < now_us(), uploads.c.id.not_in(list(self._epochs)))
                .returning(uploads.c.id)
            )
            ids = list(dropped)
        for identifier in ids:
            self._hashes.pop(identifier, None)
            self._handed_out.pop(identifier, None)
            self._state_dir.upload(identifier).unlink(missing_ok=True)

    def _lock(self, identifier: str) -> asyncio.Lock:
        return self._locks.setdefault(identifier, asyncio.Lock())

    async def _find(self, name: Name) -> Upload | None:
        async with self._database.reading() as connection:
            row = (
                await connection.execute(
                    sa.select(uploads).where(
                        uploads.c.id == name.id, uploads.c.project == name.project
                    )
                )
            ).one_or_none()
        return None if row is None else _from_row(row)
