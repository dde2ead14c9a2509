"""The embedded database: one SQLite file, which one server uses."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import time
from collections.abc import AsyncIterator, Collection, Iterator
from pathlib import Path
from typing import Any, final

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

from hvp_service.storage.clock import now_us
from hvp_service.storage.engines import Engine
from hvp_service.storage.troubles import DatabaseBusyError

_PATIENCE_S = 30.0
_LOG_PAGES = 100

# What SQLite cannot do now and may do later: a lock, a disk that is full or fails, no descriptor.
_PASSING = frozenset(
    {
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_PROTOCOL,
    }
)


@final
class SqliteEngine(Engine):
    """Transactions on one SQLite file.

    Args:
        path: Path of the file.
    """

    is_shared = False

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self._engine = create_async_engine(
            # Made of parts: in a URL written out, a `?` of the path would begin its query.
            sa.URL.create("sqlite+aiosqlite", database=str(path)),
            pool_timeout=_PATIENCE_S,
            hide_parameters=True,  # an error's text goes to the log
        )
        sa.event.listen(self._engine.sync_engine, "connect", _prepare_connection)
        sa.event.listen(self._engine.sync_engine, "begin", _begin)
        # SQLite has one writer at a time. Writers wait for their turn here, without a connection,
        # so that however many wait, readers find one.
        self._turn = asyncio.Lock()

    @contextlib.asynccontextmanager
    async def reading(self) -> AsyncIterator[AsyncConnection]:
        """See Engine."""
        with _passing_troubles():
            async with self._engine.connect() as connection, connection.begin():
                yield connection

    @contextlib.asynccontextmanager
    async def writing(self, *, alone: bool) -> AsyncIterator[AsyncConnection]:
        """See Engine; here every one is alone."""
        deadline = time.monotonic() + _PATIENCE_S
        try:
            async with asyncio.timeout(_PATIENCE_S):
                await self._turn.acquire()
        except TimeoutError:
            raise DatabaseBusyError(f"others wrote for {_PATIENCE_S:g} s") from None
        try:
            with _passing_troubles():
                async with self._engine.connect() as connection:
                    # IMMEDIATE takes the write lock first: a read that later wants to write could
                    # only fail when another writer came between.
                    immediate = await connection.execution_options(write_deadline=deadline)
                    async with immediate.begin():
                        yield immediate
        finally:
            self._turn.release()

    def now(self) -> sa.ColumnElement[int]:
        """This process's clock, which nobody shares."""
        return sa.literal(now_us(), sa.BigInteger)

    async def announce(self, connection: AsyncConnection, topics: Collection[str]) -> None:
        """There is nobody else to tell."""

    async def check(self) -> None:
        """Every file will do that can be opened."""

    async def listen(self) -> None:
        """There is nobody else to hear."""

    async def shrink(self) -> None:
        """Give the room of deleted rows back; files of 0.1 keep it for new rows."""
        async with self.writing(alone=True) as connection:
            await connection.exec_driver_sql("PRAGMA incremental_vacuum")

    async def close(self) -> None:
        """See Engine."""
        await self._engine.dispose()


@contextlib.contextmanager
def _passing_troubles() -> Iterator[None]:
    """Turn SQLite's passing errors, such as a locked file, into DatabaseBusyError."""
    try:
        yield
    except sa.exc.TimeoutError as error:
        raise DatabaseBusyError("every connection is in use") from error
    except (sa.exc.DBAPIError, sqlite3.Error) as error:
        cause = error.orig if isinstance(error, sa.exc.DBAPIError) else error
        if getattr(cause, "sqlite_errorcode", -1) & 0xFF not in _PASSING:
            raise
        raise DatabaseBusyError(str(cause)) from error


def _prepare_connection(connection: Any, _: Any) -> None:
    # The driver's own transaction handling starts no transaction before SELECT; with it off,
    # `_begin` decides.
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute("PRAGMA auto_vacuum=INCREMENTAL")  # for a new file: see `shrink`
    cursor.execute(_patience(_PATIENCE_S))
    cursor.execute("PRAGMA journal_mode=WAL")
    # The log beside the rows is written back early: by itself it would grow to 4 MiB and stay so.
    cursor.execute(f"PRAGMA wal_autocheckpoint={_LOG_PAGES}")
    cursor.execute(f"PRAGMA journal_size_limit={_LOG_PAGES * 4096}")
    cursor.execute("PRAGMA synchronous=FULL")  # a row promised to a caller survives a power cut
    cursor.close()


def _begin(connection: sa.Connection) -> None:
    deadline: float | None = connection.get_execution_options().get("write_deadline")
    if deadline is None:
        connection.exec_driver_sql("BEGIN")
    else:
        # Whoever has waited for a turn has less time left to wait for other programs.
        connection.exec_driver_sql(_patience(deadline - time.monotonic()))
        connection.exec_driver_sql("BEGIN IMMEDIATE")


def _patience(seconds: float) -> str:
    return f"PRAGMA busy_timeout={max(1, int(1000 * seconds))}"
