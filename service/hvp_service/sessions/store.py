"""Sessions: leases of clients, whose vectors go when they do."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, final

import sqlalchemy as sa

from hvp_service.app.config import ServerConfig
from hvp_service.calls.errors import ServiceError, not_found, session_expired
from hvp_service.calls.names import Name, noted, parse
from hvp_service.storage.clock import SECOND, now_us
from hvp_service.storage.database import Database, sessions
from hvp_service.storage.lifetimes import Lifetime, Uses
from hvp_service.vectors.store import VectorStore

MIN_TTL_S = 0.5


@final
@dataclass(frozen=True, kw_only=True)
class Session:
    """One session, read from its row; times in microseconds."""

    name: Name
    ttl_us: int
    create_time: int
    expire_time: int


@final
class SessionStore:
    """Rows of sessions.

    Law: a session is there while it is renewed or in use, and a vector that belongs to a session
    is there only while the session is.

    Attributes:
        opened: Set when a session is opened, which may be due before all others.
    """

    def __init__(self, database: Database, vectors: VectorStore, config: ServerConfig):
        self._database = database
        self._vectors = vectors
        self._config = config
        self._uses = Uses()
        self.opened = asyncio.Event()

    async def create(self, project: str, ttl_s: float | None) -> Session:
        """Open a session.

        Args:
            project: Project of the session.
            ttl_s: Seconds that the session lives without a renewal, brought within the server's
                limits; None for the server's choice.

        Raises:
            ServiceError: TTL_INVALID.
        """
        if ttl_s is None:
            ttl_s = self._config.session_ttl_s
        if ttl_s <= 0:
            raise ServiceError("TTL_INVALID", "A time to live is more than 0 s.", field="ttl")
        ttl_us = int(min(max(ttl_s, MIN_TTL_S), self._config.max_session_ttl_s) * SECOND)
        name = noted(Name(project, "sessions", uuid.uuid4().hex))
        now = self._database.now()
        opened = sessions.insert().values(
            project=project,
            id=name.id,
            ttl_us=ttl_us,
            create_time=now,
            expire_time=now + ttl_us,
        )
        async with self._database.updating() as connection:
            row = (await connection.execute(opened.returning(sessions))).one()
        self.opened.set()
        return _from_row(row)

    async def renew(self, name: Name) -> Session:
        """Let a session live for another time to live from now.

        Raises:
            ServiceError: SESSION_EXPIRED.
        """
        async with self._database.updating() as connection:
            row = (
                await connection.execute(
                    sa.update(sessions)
                    .where(*_is(name))
                    .values(expire_time=self._database.now() + sessions.c.ttl_us)
                    .returning(sessions)
                )
            ).one_or_none()
        if row is None:
            raise session_expired(str(name))
        return _from_row(row)

    async def end(self, name: Name) -> None:
        """End a session, so that its vectors go; to end an ended one is no error."""
        async with self._database.writing() as connection:
            await connection.execute(sa.delete(sessions).where(*_is(name)))
        await self._vectors.collect()

    @contextlib.asynccontextmanager
    async def using(self, project: str, session: str) -> AsyncIterator[Lifetime]:
        """Hold a session for the block: it does not expire, and lives on as if renewed at its end.

        Args:
            project: Project in which vectors are to be made.
            session: Name of the session that they are to belong to; "" for none.

        Yields:
            The lifetime of vectors that are made in the block.

        Raises:
            ServiceError: SESSION_EXPIRED; RESOURCE_NOT_FOUND for a name that no session of the
                project can have.
        """
        if not session:
            yield Lifetime(expire_time=now_us() + int(self._config.vector_ttl_s * SECOND))
            return
        name = parse(session, "sessions")
        if name.project != project:
            raise not_found(session, "session")
        self._uses.begin([name.id])
        try:
            ttl_us = await self._renew_if_due(name)
            async with self._renewed(name, ttl_us):
                yield Lifetime(session=name.id)
            with contextlib.suppress(ServiceError):  # the call is done, whatever comes of the rest
                await self._renew_if_due(name)
        finally:
            self._uses.end([name.id])

    async def _renew_if_due(self, name: Name) -> int:
        query = sa.select(sessions, self._database.now().label("now")).where(*_is(name))
        async with self._database.reading() as connection:
            row = (await connection.execute(query)).one_or_none()
        if row is None:
            raise session_expired(str(name))
        if row.expire_time - row.now < row.ttl_us // 2:
            await self.renew(name)
        return int(row.ttl_us)

    @contextlib.asynccontextmanager
    async def _renewed(self, name: Name, ttl_us: int) -> AsyncIterator[None]:
        """Renew a session in time throughout the block, where other servers could end it."""

        async def renew() -> None:
            while True:
                await asyncio.sleep(ttl_us / SECOND / 4)
                with contextlib.suppress(ServiceError):
                    await self.renew(name)

        renewal = asyncio.create_task(renew()) if self._database.is_shared else None
        try:
            yield
        finally:
            if renewal is not None:
                renewal.cancel()

    async def expire(self) -> int | None:
        """End the sessions whose time is up, and let go of every vector that has outlived its own.

        Returns:
            When the next session or vector is due, in microseconds; None while none is.
        """
        # Not after a wait for the database, which whoever renews waits for too.
        now = self._database.now()
        async with self._database.writing() as connection:
            await connection.execute(
                sa.delete(sessions).where(
                    sessions.c.expire_time < now, sessions.c.id.not_in(self._uses.ids)
                )
            )
            due = await connection.scalar(sa.select(sa.func.min(sessions.c.expire_time)))
        await self._vectors.collect()
        times = [time for time in (due, await self._vectors.next_expiry()) if time is not None]
        return min(times, default=None)

    async def recover(self) -> None:
        """Give every session another time to live, after a time in which the server heard nobody.

        Called at start, and when the server was stopped.
        """
        async with self._database.updating() as connection:
            renewed = self._database.now() + sessions.c.ttl_us
            await connection.execute(
                sa.update(sessions)
                .where(sessions.c.expire_time < renewed)
                .values(expire_time=renewed)
            )


def _is(name: Name) -> tuple[sa.ColumnElement[bool], ...]:
    return sessions.c.project == name.project, sessions.c.id == name.id


def _from_row(row: sa.Row[Any]) -> Session:
    return Session(
        name=Name(row.project, "sessions", row.id),
        ttl_us=row.ttl_us,
        create_time=row.create_time,
        expire_time=row.expire_time,
    )
