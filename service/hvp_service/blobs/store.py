"""Immutable files named by their SHA-256."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import re
from collections.abc import AsyncIterator, Collection, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from hvp_service.calls.errors import ServiceError, not_found
from hvp_service.calls.names import Name
from hvp_service.calls.paging import Pager, PageRequest
from hvp_service.storage.clock import SECOND, now_us
from hvp_service.storage.database import (
    Database,
    blobs,
    checkpoint_files,
    data_batches,
    insert_missing,
    uploads,
)
from hvp_service.storage.lifetimes import Holds
from hvp_service.storage.state_dir import StateDir, sync_folder

_DIGESTS_PER_QUERY = 1000  # SQLite takes 32 766 variables in a statement

SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class Digest:
    """Identity of a byte string: lower-case hexadecimal SHA-256 and length in bytes."""

    sha256: str
    size_bytes: int

    def check(self, field: str) -> None:
        """Refuse a value that cannot be a digest.

        Raises:
            ServiceError: DIGEST_MALFORMED, SIZE_INVALID.
        """
        if not SHA256.fullmatch(self.sha256):
            raise ServiceError(
                "DIGEST_MALFORMED",
                "A SHA-256 is 64 lower-case hexadecimal digits.",
                field=f"{field}.sha256",
            )
        if self.size_bytes < 0:
            raise ServiceError(
                "SIZE_INVALID", "A size is 0 bytes or more.", field=f"{field}.size_bytes"
            )


@dataclass(frozen=True, kw_only=True)
class Blob:
    """A finished upload."""

    project: str
    digest: Digest
    create_time: int  # microseconds

    @property
    def name(self) -> str:
        """Resource name."""
        return str(Name(self.project, "blobs", self.digest.sha256))


@dataclass(frozen=True)
class Piece:
    """Consecutive bytes of a file."""

    offset: int
    data: bytes
    crc32c: int  # of `data`


async def read_range(path: Path, start: int, stop: int, piece_bytes: int) -> AsyncIterator[Piece]:
    """Bytes `start` to `stop` of a file, read off the event loop."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(offset: int) -> Piece:
        data = os.pread(descriptor, min(piece_bytes, stop - offset), offset)
        if not data:
            raise OSError(f"{path} ends at byte {offset}, before {stop}")
        return Piece(offset, data, google_crc32c.value(data))

    coming = asyncio.ensure_future(asyncio.to_thread(read, start)) if start < stop else None
    try:
        while coming is not None:
            piece = await coming
            start += len(piece.data)
            # The next piece is read while this one is sent.
            coming = asyncio.ensure_future(asyncio.to_thread(read, start)) if start < stop else None
            yield piece
    finally:
        if coming is not None:  # a thread may be at it
            await asyncio.wait([coming])
        os.close(descriptor)


class BlobStore:
    """Rows and files of blobs.

    Laws:
        The file of a row is always complete.
        A blob of which something is made stays. One of which nothing is made stays for the grace
        after the last time that a caller heard that it is here, and may rely on that.
        A file whose rows were deleted goes when no call uses it.

    Args:
        database: The database that holds the rows.
        state_dir: The folder that holds the files.
        pager: Makes page tokens.
        grace_s: The grace of the second law, in seconds.
    """

    def __init__(self, database: Database, state_dir: StateDir, pager: Pager, *, grace_s: float):
        self._grace_us = int(grace_s * SECOND)
        self._holds = Holds(self._remove)
        self._database = database
        self._state_dir = state_dir
        self._pager = pager

    def path(self, digest: Digest) -> Path:
        """Path of a blob's file."""
        return self._state_dir.blob(digest.sha256)

    async def find(self, project: str, sha256: str) -> Blob | None:
        """Look up a blob by its SHA-256; None where there is none."""
        async with self._database.reading() as connection:
            row = (
                await connection.execute(
                    sa.select(blobs).where(blobs.c.project == project, blobs.c.sha256 == sha256)
                )
            ).one_or_none()
        if row is None:
            return None
        return Blob(
            project=project,
            digest=Digest(sha256=row.sha256, size_bytes=row.size_bytes),
            create_time=row.create_time,
        )

    async def get(self, name: Name) -> Blob:
        """Look up a blob by its name.

        Raises:
            ServiceError: RESOURCE_NOT_FOUND.
        """
        blob = await self.find(name.project, name.id)
        if blob is None:
            raise not_found(str(name), "blob")
        return blob

    async def require(self, project: str, digest: Digest, field: str) -> Path:
        """Path of an input's file, which has to be here.

        Raises:
            ServiceError: DIGEST_MALFORMED, SIZE_INVALID, INPUT_MISSING.
        """
        digest.check(field)
        blob = await self.find(project, digest.sha256)
        if blob is None or blob.digest != digest:
            raise _input_missing(project, digest)
        return self.path(digest)

    async def claim(self, connection: AsyncConnection, project: str, digest: Digest) -> None:
        """Check that an input is still there, in the transaction that inserts what is made of it.

        From then on the blob lives as long as what is made of it, and its grace has ended.

        Raises:
            ServiceError: INPUT_MISSING.
        """
        claimed = await connection.execute(_named(project, digest.sha256).values(mention_time=0))
        if not claimed.rowcount:
            raise _input_missing(project, digest)

    async def mention(self, project: str, digests: Sequence[Digest]) -> set[Digest]:
        """The digests whose blobs are here; the caller is told so, and they stay for the grace."""
        here: set[Digest] = set()
        async with self._database.updating() as connection:
            for start in range(0, len(digests), _DIGESTS_PER_QUERY):
                asked = [d.sha256 for d in digests[start : start + _DIGESTS_PER_QUERY]]
                rows = await connection.execute(
                    sa.update(blobs)
                    .where(blobs.c.project == project, blobs.c.sha256.in_(asked))
                    .values(mention_time=now_us())
                    .returning(blobs.c.sha256, blobs.c.size_bytes)
                )
                here.update(Digest(sha256=row.sha256, size_bytes=row.size_bytes) for row in rows)
        return here

    async def missing(self, project: str, digests: Sequence[Digest]) -> list[Digest]:
        """The digests whose blobs are not here, in order; the other blobs stay for the grace."""
        for index, digest in enumerate(digests):
            digest.check(f"digests[{index}]")
        here = await self.mention(project, digests)
        return [digest for digest in digests if digest not in here]

    async def adopt(
        self, connection: AsyncConnection, project: str, digest: Digest, file: Path
    ) -> Blob:
        """Make a verified, synced file a blob inside an open transaction; the file moves."""
        target = self.path(digest)

        def move() -> None:
            if not target.parent.is_dir():
                target.parent.mkdir(exist_ok=True)
                sync_folder(target.parent.parent)
            file.rename(target)  # the same bytes, should they be there already
            sync_folder(target.parent)

        await asyncio.to_thread(move)
        return await self._insert(connection, project, digest)

    def is_whole(self, digest: Digest) -> bool:
        """Whether a blob's file is there with the bytes that its name says. Blocks."""
        try:
            with self.path(digest).open("rb") as file:
                if os.fstat(file.fileno()).st_size != digest.size_bytes:
                    return False
                return hashlib.file_digest(file, "sha256").hexdigest() == digest.sha256
        except FileNotFoundError:
            return False

    async def register(
        self, connection: AsyncConnection, project: str, digest: Digest
    ) -> Blob | None:
        """Make a file that `is_whole` a blob inside an open transaction; None if it has gone."""
        if not self.path(digest).exists():
            return None
        return await self._insert(connection, project, digest)

    async def _insert(self, connection: AsyncConnection, project: str, digest: Digest) -> Blob:
        create_time = now_us()
        await connection.execute(
            insert_missing(connection, blobs).values(
                project=project,
                sha256=digest.sha256,
                size_bytes=digest.size_bytes,
                create_time=create_time,
            )
        )
        await connection.execute(_named(project, digest.sha256).values(mention_time=create_time))
        return Blob(project=project, digest=digest, create_time=create_time)

    async def list_page(self, project: str, page: PageRequest) -> tuple[list[Blob], str]:
        """One page of a project's blobs, oldest first, and the next page's token."""
        async with self._database.reading() as connection:
            rows, token = await self._pager.fetch(
                connection,
                blobs,
                page,
                scope=f"{project}/blobs",
                where=[blobs.c.project == project],
                id_column="sha256",
            )
        return [
            Blob(
                project=project,
                digest=Digest(sha256=row.sha256, size_bytes=row.size_bytes),
                create_time=row.create_time,
            )
            for row in rows
        ], token

    async def delete(self, name: Name) -> None:
        """Delete a blob that nothing is made of.

        Raises:
            ServiceError: RESOURCE_NOT_FOUND, RESOURCE_IN_USE.
        """
        this = sa.and_(blobs.c.project == name.project, blobs.c.sha256 == name.id)
        if not await self._delete(this, _unused()):
            await self.get(name)
            raise ServiceError(
                "RESOURCE_IN_USE",
                "A checkpoint or a data batch is made of this blob; delete that first.",
                resource=str(name),
            )

    async def release(self, project: str, digests: Iterable[Digest]) -> None:
        """Delete those of these blobs of which nothing is made and that no caller may rely on."""
        wanted = sorted({digest.sha256 for digest in digests})
        for start in range(0, len(wanted), _DIGESTS_PER_QUERY):
            await self._delete(
                blobs.c.project == project,
                blobs.c.sha256.in_(wanted[start : start + _DIGESTS_PER_QUERY]),
                blobs.c.mention_time < now_us() - self._grace_us,
                _unused(),
            )

    async def collect(self) -> None:
        """Delete every blob of which nothing is made and that no caller may rely on."""
        before = now_us() - self._grace_us
        await self._delete(blobs.c.create_time < before, blobs.c.mention_time < before, _unused())

    async def _delete(self, *where: sa.ColumnElement[bool]) -> list[str]:
        """Delete rows, then files that nothing names any more; returns the SHA-256s of the rows."""
        async with self._database.writing() as connection:
            deleted = sa.delete(blobs).where(*where).returning(blobs.c.sha256)
            names = list((await connection.scalars(deleted)).all())
        # Only now are the rows gone for good.
        if free := self._holds.leave(names):
            await self._remove(free)
        return names

    def hold(self, *sha256s: str) -> AbstractContextManager[None]:
        """Use blobs for a block: their files stay until the block's end."""
        return self._holds.hold(sha256s)

    async def close(self) -> None:
        """Wait for files that are being removed."""
        await self._holds.close()

    async def sweep(self) -> None:
        """Remove files that neither a row nor an open upload names."""
        root = self._state_dir.blob("xx").parent.parent
        files = await asyncio.to_thread(lambda: [path.name for path in root.glob("*/*")])
        await self._remove(self._holds.leave(files))

    async def _remove(self, names: Collection[str]) -> None:
        """Remove the files of these SHA-256s that neither a row nor an open upload names."""
        # Nobody makes a blob anew beside this transaction.
        async with self._database.writing() as connection:
            known = set((await connection.scalars(sa.select(blobs.c.sha256))).all())
            # Of an upload whose last step was interrupted the file may have been moved already.
            known.update(
                (
                    await connection.scalars(
                        sa.select(uploads.c.sha256).where(uploads.c.state == "OPEN")
                    )
                ).all()
            )
            unnamed = [self._state_dir.blob(name) for name in names if name not in known]
            await asyncio.to_thread(_unlink, unnamed)


def _unlink(files: Iterable[Path]) -> None:
    for path in files:
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # others are left in it
            path.parent.rmdir()


def _named(project: str, sha256: str) -> sa.Update:
    return sa.update(blobs).where(blobs.c.project == project, blobs.c.sha256 == sha256)


def _unused() -> sa.ColumnElement[bool]:
    """The condition that neither a checkpoint nor a data batch is made of a blob."""
    users = [
        sa.exists().where(table.c.project == blobs.c.project, column == blobs.c.sha256)
        for table, column in (
            (checkpoint_files, checkpoint_files.c.sha256),
            (data_batches, data_batches.c.id),
        )
    ]
    return sa.not_(sa.or_(*users))


def _input_missing(project: str, digest: Digest) -> ServiceError:
    return ServiceError(
        "INPUT_MISSING",
        f"The blob {digest.sha256} of {digest.size_bytes} bytes is not on the server; "
        "upload it and call again.",
        resource=str(Name(project, "blobs", digest.sha256)),
        metadata={"sha256": digest.sha256},
    )
