"""Upload sessions as rows, which survive a restart."""

from __future__ import annotations

import uuid
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from hvp_service.blobs.store import Blob, Digest
from hvp_service.calls.names import Name, noted
from hvp_service.storage.clock import SECOND, now_us
from hvp_service.storage.database import Database, uploads


@dataclass(frozen=True, kw_only=True)
class Upload:
    """One upload session, read from its row."""

    name: Name
    expected: Digest
    committed_size: int  # durable bytes
    writer_epoch: int
    state: str  # OPEN, FINISHED or CANCELLED
    expire_time: int  # microseconds
    blob: Blob | None = None


class UploadRows:
    """The table of sessions.

    Law: only an open session changes, but for its epoch and the times of it.

    A session is busy for a while after a server has handed it out, and after each commit of a
    stream, so that other servers hand out another one for the same bytes.
    """

    def __init__(self, database: Database):
        self._database = database

    async def find(self, name: Name) -> Upload | None:
        """The session, whatever its state."""
        async with self._database.reading() as connection:
            row = (
                await connection.execute(
                    sa.select(uploads).where(
                        uploads.c.id == name.id, uploads.c.project == name.project
                    )
                )
            ).one_or_none()
        return None if row is None else _from_row(row)

    async def open_sessions(self) -> list[Upload]:
        """Open sessions of all projects, those whose time is up among them."""
        async with self._database.reading() as connection:
            rows = await connection.execute(sa.select(uploads).where(uploads.c.state == "OPEN"))
            return [_from_row(row) for row in rows]

    async def open_sessions_for(
        self, connection: AsyncConnection, project: str, expected: Digest, *, but_busy: bool
    ) -> list[Upload]:
        """Open sessions for these bytes, the one that has most of them first.

        Args:
            connection: Connection of an open transaction.
            project: Project of the sessions.
            expected: The bytes.
            but_busy: Whether to leave out those that are busy, on whatever server.
        """
        idle = [uploads.c.busy_until < self._database.now()] if but_busy else []
        rows = await connection.execute(
            sa.select(uploads)
            .where(
                uploads.c.project == project,
                uploads.c.sha256 == expected.sha256,
                uploads.c.size_bytes == expected.size_bytes,
                uploads.c.state == "OPEN",
                uploads.c.expire_time >= now_us(),
                *idle,
            )
            .order_by(uploads.c.committed_size.desc())
        )
        return [_from_row(row) for row in rows]

    async def waiting_for_bytes(self, connection: AsyncConnection) -> list[Upload]:
        """Open sessions of all projects whose time is not up."""
        rows = await connection.execute(
            sa.select(uploads).where(uploads.c.state == "OPEN", uploads.c.expire_time >= now_us())
        )
        return [_from_row(row) for row in rows]

    async def insert(
        self,
        connection: AsyncConnection,
        project: str,
        expected: Digest,
        expire_time: int,
        blob: Blob | None,
        busy_s: float,
    ) -> Upload:
        """Insert a new session, which is finished at once where the blob is there."""
        upload = Upload(
            name=noted(Name(project, "uploads", uuid.uuid4().hex)),
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
                busy_until=self._busy_until(busy_s),
            )
        )
        return upload

    def _busy_until(self, busy_s: float) -> sa.ColumnElement[int]:
        return self._database.now() + int(busy_s * SECOND)

    async def prolong(
        self, connection: AsyncConnection, upload: Upload, expire_time: int, busy_s: float
    ) -> Upload:
        """Let a session last longer."""
        await connection.execute(
            _of(upload.name).values(expire_time=expire_time, busy_until=self._busy_until(busy_s))
        )
        return replace(upload, expire_time=expire_time)

    async def settle(
        self, connection: AsyncConnection, upload: Upload, committed_size: int, blob: Blob | None
    ) -> Upload:
        """Set the committed size of an open session; with a blob the session is finished."""
        settled = replace(
            upload,
            state="OPEN" if blob is None else "FINISHED",
            committed_size=committed_size,
            blob=blob,
        )
        await connection.execute(
            _of(upload.name).values(state=settled.state, committed_size=committed_size)
        )
        return settled

    async def commit(self, name: Name, committed_size: int, busy_s: float) -> None:
        """Set the committed size of a session, if it is open."""
        async with self._database.updating() as connection:
            await connection.execute(
                _of(name)
                .where(uploads.c.state == "OPEN")
                .values(committed_size=committed_size, busy_until=self._busy_until(busy_s))
            )

    async def epoch(self, name: Name) -> int | None:
        """The number of a session's newest writer; None unless it is open."""
        async with self._database.reading() as connection:
            found: int | None = await connection.scalar(
                sa.select(uploads.c.writer_epoch).where(
                    uploads.c.id == name.id, uploads.c.state == "OPEN"
                )
            )
        return found

    async def leave(self, name: Name, epoch: int) -> None:
        """Note that a writer has left."""
        async with self._database.updating() as connection:
            await connection.execute(
                _of(name).where(uploads.c.writer_epoch == epoch).values(busy_until=0)
            )

    async def cancel(self, name: Name) -> None:
        """Give a session up, if it is open."""
        async with self._database.updating() as connection:
            await connection.execute(
                _of(name).where(uploads.c.state == "OPEN").values(state="CANCELLED")
            )

    async def new_epoch(self, upload: Upload, busy_s: float) -> Upload:
        """Count one more writer of a session, and return the session with its number."""
        async with self._database.updating() as connection:
            epoch = await connection.scalar(
                _of(upload.name)
                .values(
                    writer_epoch=uploads.c.writer_epoch + 1, busy_until=self._busy_until(busy_s)
                )
                .returning(uploads.c.writer_epoch)
            )
        assert epoch is not None
        return replace(upload, writer_epoch=epoch)

    async def drop_expired(self, but: Collection[str]) -> list[str]:
        """Forget sessions whose time is up; their ids.

        Args:
            but: Ids of sessions to spare, because a stream writes to them.
        """
        busy = uploads.c.busy_until >= self._database.now()  # what a crash left so goes later
        others = [sa.not_(busy)] if self._database.is_shared else []
        async with self._database.writing() as connection:
            dropped = await connection.scalars(
                sa.delete(uploads)
                .where(
                    uploads.c.expire_time < now_us(),
                    uploads.c.id.not_in(list(but)),
                    *others,
                )
                .returning(uploads.c.id)
            )
            return list(dropped)


def _of(name: Name) -> sa.Update:
    return sa.update(uploads).where(uploads.c.id == name.id)


def _from_row(row: sa.Row[Any]) -> Upload:
    return Upload(
        name=Name(row.project, "uploads", row.id),
        expected=Digest(sha256=row.sha256, size_bytes=row.size_bytes),
        committed_size=row.committed_size,
        writer_epoch=row.writer_epoch,
        state=row.state,
        expire_time=row.expire_time,
    )
