"""Request ids: a call repeated with the same id gets the first one's answer."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import sqlalchemy as sa
import structlog

from hvp_service.calls.errors import ServiceError
from hvp_service.storage.clock import SECOND, now_us
from hvp_service.storage.database import Database, insert_missing, requests
from hvp_service.storage.troubles import DatabaseBusyError

MAX_REQUEST_ID_LENGTH = 128
_LEASE_US = 15 * SECOND
_LOOK_S = 1.0  # between looks at a lease, which runs out without anybody's notice

Key = tuple[str, str, str]  # project, method, request id

log = structlog.get_logger()


@dataclass
class _Running:
    payload_sha256: str
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    num_callers: int = 0


class RequestLog:
    """Answers that were given, by (project, method, request id).

    Law: of the calls with one key and one payload, at most one has its effect, however they
    overlap; a call that failed has left no answer, and the next one tries again. An answer that
    cannot be kept, because the database is busy, is given all the same.

    Where several servers share the database, a row is there before a call does its work, under a
    lease of its server: the same call at another server waits for the answer, and does the work
    itself when the lease has run out.

    Args:
        database: The database that holds the rows.
        owner: Id of this server process, which no other server has or had.
    """

    def __init__(self, database: Database, owner: str):
        self._database = database
        self._owner = owner
        self._running: dict[Key, _Running] = {}

    async def once(
        self,
        key: Key,
        payload: bytes,
        respond: Callable[[], Awaitable[bytes]],
    ) -> bytes:
        """The answer of the first call with this key.

        Args:
            key: Project, method and request id; an empty id is never remembered.
            payload: Bytes of the request without its id.
            respond: Does the work and gives the answer's bytes.

        Raises:
            ServiceError: REQUEST_ID_REUSED, REQUEST_ID_INVALID.
        """
        if not key[2]:
            return await respond()
        if len(key[2]) > MAX_REQUEST_ID_LENGTH or not key[2].isprintable():
            raise ServiceError(
                "REQUEST_ID_INVALID",
                f"A request id has at most {MAX_REQUEST_ID_LENGTH} characters, all printable.",
                field="request_id",
            )
        digest = hashlib.sha256(payload).hexdigest()
        running = self._running.setdefault(key, _Running(digest))
        self._check(running.payload_sha256, digest)
        running.num_callers += 1
        try:
            async with running.lock:
                return await self._answer(key, digest, respond)
        finally:
            running.num_callers -= 1
            if not running.num_callers:
                del self._running[key]

    async def forget(self, before_us: int) -> None:
        """Drop the answers given before a time."""
        async with self._database.writing() as connection:
            await connection.execute(sa.delete(requests).where(requests.c.create_time < before_us))

    async def _answer(
        self, key: Key, digest: str, respond: Callable[[], Awaitable[bytes]]
    ) -> bytes:
        known = await (self._claim if self._database.is_shared else self._find)(key, digest)
        if known is not None:
            return known
        if not self._database.is_shared:
            response = await respond()
            await self._keep(key, digest, response)
            return response
        renewal = asyncio.create_task(self._renew(key))
        try:
            response = await respond()
        except BaseException:
            await asyncio.shield(asyncio.ensure_future(self._release(key)))
            raise
        finally:
            renewal.cancel()
        await self._keep(key, digest, response)
        return response

    async def _find(self, key: Key, digest: str) -> bytes | None:
        """The answer that was given; None where there is none."""
        async with self._database.reading() as connection:
            row = (await connection.execute(sa.select(requests).where(*_is(key)))).one_or_none()
        if row is None:
            return None
        self._check(row.payload_sha256, digest)
        return bytes(row.response)

    async def _claim(self, key: Key, digest: str) -> bytes | None:
        """The answer that was given, by whatever server; None once it is for this one to give."""
        while True:
            news = self._database.signals.event(_topic(key))
            until = self._database.now() + _LEASE_US
            async with self._database.updating() as connection:
                made = await connection.execute(
                    insert_missing(connection, requests).values(
                        **_columns(key),
                        payload_sha256=digest,
                        response=b"",
                        create_time=now_us(),
                        owner=self._owner,
                        lease_expire=until,
                    )
                )
                if made.rowcount:
                    return None
                row = (await connection.execute(sa.select(requests).where(*_is(key)))).one_or_none()
                if row is not None:
                    self._check(row.payload_sha256, digest)
                    if not row.owner:
                        return bytes(row.response)
                    taken = await connection.execute(
                        sa.update(requests)
                        .where(
                            *_is(key),
                            requests.c.owner == row.owner,
                            requests.c.lease_expire < self._database.now(),
                        )
                        .values(owner=self._owner, lease_expire=until)
                    )
                    if taken.rowcount:
                        return None
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(news.wait(), _LOOK_S)

    async def _renew(self, key: Key) -> None:
        while True:
            await asyncio.sleep(_LEASE_US / SECOND / 3)
            with contextlib.suppress(DatabaseBusyError):
                async with self._database.updating() as connection:
                    until = self._database.now() + _LEASE_US
                    await connection.execute(
                        sa.update(requests).where(*self._ours(key)).values(lease_expire=until)
                    )

    async def _release(self, key: Key) -> None:
        """Let the next call try again."""
        with contextlib.suppress(DatabaseBusyError):  # the lease runs out
            async with self._database.updating() as connection:
                await connection.execute(sa.delete(requests).where(*self._ours(key)))
                self._database.tell(connection, _topic(key))

    async def _keep(self, key: Key, digest: str, response: bytes) -> None:
        try:
            async with self._database.updating() as connection:
                if self._database.is_shared:
                    await connection.execute(
                        sa.update(requests)
                        .where(*self._ours(key))
                        .values(response=response, owner="", lease_expire=0)
                    )
                    self._database.tell(connection, _topic(key))
                else:
                    await connection.execute(
                        requests.insert().values(
                            **_columns(key),
                            payload_sha256=digest,
                            response=response,
                            create_time=now_us(),
                        )
                    )
        except DatabaseBusyError as error:
            # A refusal now would have the caller try again, and the call its effect twice.
            log.warning("an answer is given and not remembered", method=key[1], why=str(error))

    def _ours(self, key: Key) -> tuple[sa.ColumnElement[bool], ...]:
        return *_is(key), requests.c.owner == self._owner

    @staticmethod
    def _check(first: str, second: str) -> None:
        if first != second:
            raise ServiceError(
                "REQUEST_ID_REUSED",
                "This request id came before with another request; use a new one.",
                field="request_id",
            )


def _columns(key: Key) -> dict[str, str]:
    return dict(zip(("project", "method", "request_id"), key, strict=True))


def _is(key: Key) -> tuple[sa.ColumnElement[bool], ...]:
    return tuple(requests.c[column] == value for column, value in _columns(key).items())


def _topic(key: Key) -> str:
    return f"answer {hashlib.sha256(repr(key).encode()).hexdigest()}"
