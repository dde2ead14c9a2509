"""Uploads that resume: bytes that were reported as committed are never asked for again."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Coroutine
from dataclasses import replace
from typing import Any, TypeVar

from sqlalchemy.ext.asyncio import AsyncConnection

from hvp_service.app.config import ServerConfig
from hvp_service.blobs.store import BlobStore, Digest
from hvp_service.calls.errors import ServiceError, not_found
from hvp_service.calls.names import Name, parse
from hvp_service.storage.clock import SECOND, now_us
from hvp_service.storage.database import Database
from hvp_service.storage.state_dir import StateDir
from hvp_service.uploads.chunks import Chunk, known_bytes
from hvp_service.uploads.file import Hash, UploadFile
from hvp_service.uploads.reservations import UploadRoom
from hvp_service.uploads.rows import Upload, UploadRows
from hvp_service.uploads.writers import Writers

Result = TypeVar("Result")

# A session that was just handed out is its caller's for this long, until the first stream comes.
_FIRST_STREAM_S = 60.0


class UploadStore:
    """Upload sessions: partial files beside their rows, and the streams that write to them.

    Durability order: bytes written, synced, row updated, and only then reported as committed.
    Every step on a file runs to its end under the upload's lock, whoever still waits for it.
    """

    def __init__(
        self, database: Database, state_dir: StateDir, blobs: BlobStore, config: ServerConfig
    ):
        self._database = database
        self._rows = UploadRows(database)
        self._state_dir = state_dir
        self._blobs = blobs
        self._config = config
        self._room = UploadRoom(
            self._rows,
            state_dir.root,
            silence_s=config.upload_silence_s,
            share=config.upload_share,
        )
        self._writers = Writers(self._rows, state_dir)
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
        if blob is not None:
            await self._blobs.mention(project, [expected])
        await self._drop_expired()
        expire_time = now_us() + int(self._config.upload_ttl_s * SECOND)
        async with self._database.writing() as connection:
            if blob is None:
                fits = await self._room.has(connection, project, expected.size_bytes)
                left = await self._left_behind(connection, project, expected, any_age=not fits)
                if left is not None:
                    await self._room.take(connection, left)
                    self._handed_out[left.name.id] = time.monotonic()
                    return await self._rows.prolong(connection, left, expire_time, _FIRST_STREAM_S)
                await self._room.check(connection, project, expected.size_bytes)
            upload = await self._rows.insert(
                connection, project, expected, expire_time, blob, _FIRST_STREAM_S
            )
            if blob is None:
                self._room.hear(upload.name.id)
                self._handed_out[upload.name.id] = time.monotonic()
        return upload

    async def _left_behind(
        self, connection: AsyncConnection, project: str, expected: Digest, *, any_age: bool
    ) -> Upload | None:
        """The open session that no stream writes to and that has most of these bytes.

        A session that was handed out a moment ago is about to have its first stream. It is passed
        over, so that two callers with the same bytes do not send each other away, unless there is
        no room for both (`any_age`).
        """
        before = time.monotonic() - (0.0 if any_age else _FIRST_STREAM_S)
        others = self._state_dir.is_shared and not any_age
        found = await self._rows.open_sessions_for(connection, project, expected, but_busy=others)
        for upload in found:
            identifier = upload.name.id
            if (
                identifier not in self._writers.epochs
                and self._handed_out.get(identifier, before) <= before
            ):
                return upload
        return None

    async def get(self, name: Name) -> Upload:
        """Look up a session by its name.

        Raises:
            ServiceError: RESOURCE_NOT_FOUND, also for one that has expired or was given up.
        """
        upload = await self._rows.find(name)
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
        """Give a session up; a session that has ended stays as it is.

        Raises:
            ServiceError: RESOURCE_NOT_FOUND.
        """
        if await self._rows.find(name) is None:
            raise not_found(str(name), "upload")
        self._writers.revoke(name.id)  # whoever writes to it now is told to stop
        async with self._writers.alone(name.id):
            await self._drop(name)

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
        async with self._database.writing() as connection:
            await self._room.take(connection, upload)
        upload = await self._writers.begin(upload, _FIRST_STREAM_S)
        epoch = upload.writer_epoch
        self._handed_out.pop(name.id, None)
        opening = self._step(self._open(name, epoch))
        try:
            upload, file = await asyncio.shield(opening)
        except asyncio.CancelledError:
            self._step(self._abandon(opening, name.id, epoch))
            raise
        except Exception:
            self._writers.end(name.id, epoch)
            raise
        if file is None:
            self._writers.end(name.id, epoch)
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
        async with self._writers.alone(name.id):
            await self._writers.require_newest(name, epoch)
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
        self._writers.end(identifier, epoch)

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
            settled = await self._rows.settle(
                connection, upload, upload.expected.size_bytes if blob else 0, blob
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
            skip = known_bytes(
                upload, chunk, file.position, expected_offset, self._config.max_chunk_bytes
            )
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
        async with self._writers.alone(upload.name.id):
            await self._writers.require_newest(upload.name, epoch)
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
        """Write one chunk to the file; gives the ended session when the chunk was the last."""
        async with self._writers.alone(upload.name.id):
            await self._writers.require_newest(upload.name, epoch)
            self._room.hear(upload.name.id)
            if chunk.data:
                await asyncio.to_thread(file.append, chunk.data, chunk.crc32c, skip)
            if chunk.finish:
                return await self._finish(upload, file)
            if commit:
                await self._commit(upload, file)
        return None

    async def _finish(self, upload: Upload, file: UploadFile) -> Upload:
        found = Digest(sha256=file.sha256(), size_bytes=file.position)
        if found != upload.expected:
            await self._drop(upload.name)
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
            finished = await self._rows.settle(connection, upload, file.position, blob)
        self._hashes.pop(upload.name.id, None)
        self._room.forget(upload.name.id)
        return finished

    async def _commit(self, upload: Upload, file: UploadFile) -> None:
        so_far = await asyncio.to_thread(file.sync)
        position = file.position
        await self._rows.commit(upload.name, position, _FIRST_STREAM_S)
        if not self._state_dir.is_shared:  # else another server may have written others' bytes
            self._hashes[upload.name.id] = (position, so_far)

    async def _leave(self, upload: Upload, epoch: int, file: UploadFile) -> None:
        identifier = upload.name.id
        async with self._writers.alone(identifier):
            try:
                if (
                    await self._writers.is_newest(upload.name, epoch)
                    and self._state_dir.upload(identifier).exists()
                ):
                    await self._commit(upload, file)
                    if self._state_dir.is_shared:
                        await self._rows.leave(upload.name, epoch)
            finally:
                await asyncio.to_thread(file.close)
        self._writers.end(identifier, epoch)

    async def _drop(self, name: Name) -> None:
        await self._rows.cancel(name)
        self._hashes.pop(name.id, None)
        self._handed_out.pop(name.id, None)
        self._room.forget(name.id)
        with contextlib.suppress(FileNotFoundError):
            self._state_dir.upload(name.id).unlink()

    async def expire(self) -> None:
        """Drop sessions whose time is up and files without a session, settle what a crash left."""
        await self._drop_expired()
        files = list(self._state_dir.upload("x").parent.iterdir())  # a file comes after its row
        sessions = await self._rows.open_sessions()
        open_ids = {upload.name.id for upload in sessions}
        for path in files:
            if path.name.removesuffix(".part") not in open_ids:
                path.unlink(missing_ok=True)
        for upload in sessions:
            if upload.name.id not in self._writers.epochs:
                await self._step(self._settle_alone(upload.name))

    async def _settle_alone(self, name: Name) -> None:
        async with self._writers.alone(name.id):
            upload = await self._rows.find(name)
            if upload is not None and upload.state == "OPEN":
                await self._settle(upload)
        self._writers.tidy(name.id)

    async def _drop_expired(self) -> None:
        for identifier in await self._rows.drop_expired(but=self._writers.epochs):
            self._hashes.pop(identifier, None)
            self._handed_out.pop(identifier, None)
            self._room.forget(identifier)
            self._state_dir.upload(identifier).unlink(missing_ok=True)
