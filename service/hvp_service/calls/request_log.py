"""Request ids: a call repeated with the same id gets the first one's answer."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import sqlalchemy as sa
import structlog

from hvp_service.calls.errors import ServiceError
from hvp_service.storage.clock import now_us
from hvp_service.storage.database import Database, requests
from hvp_service.storage.troubles import DatabaseBusyError

MAX_REQUEST_ID_LENGTH = 128

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
    """

    def __init__(self, database: Database):
        self._database = database
        self._running: dict[tuple[str, str, str], _Running] = {}

    async def once(
        self,
        key: tuple[str, str, str],
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
        if len(key[2]) > MAX_REQUEST_ID_LENGTH:
            raise ServiceError(
                "REQUEST_ID_INVALID",
                f"A request id has at most {MAX_REQUEST_ID_LENGTH} characters.",
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
        self, key: tuple[str, str, str], digest: str, respond: Callable[[], Awaitable[bytes]]
    ) -> bytes:
        project, method, request_id = key
        async with self._database.reading() as connection:
            row = (
                await connection.execute(
                    sa.select(requests).where(
                        requests.c.project == project,
                        requests.c.method == method,
                        requests.c.request_id == request_id,
                    )
                )
            ).one_or_none()
        if row is not None:
            self._check(row.payload_sha256, digest)
            return bytes(row.response)
        response = await respond()
        try:
            async with self._database.writing() as connection:
                await connection.execute(
                    requests.insert().values(
                        project=project,
                        method=method,
                        request_id=request_id,
                        payload_sha256=digest,
                        response=response,
                        create_time=now_us(),
                    )
                )
        except DatabaseBusyError as error:
            # A refusal now would have the caller try again, and the call its effect twice.
            log.warning("an answer is given and not remembered", method=method, why=str(error))
        return response

    @staticmethod
    def _check(first: str, second: str) -> None:
        if first != second:
            raise ServiceError(
                "REQUEST_ID_REUSED",
                "This request id came before with another request; use a new one.",
                field="request_id",
            )
