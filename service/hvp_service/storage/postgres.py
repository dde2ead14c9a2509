"""PostgreSQL, which several servers may use at once."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Collection, Iterator
from typing import Any, final
from urllib.parse import SplitResult, unquote, urlsplit

import asyncpg
import sqlalchemy as sa
import structlog
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

from hvp_service.storage.engines import Engine
from hvp_service.storage.troubles import DatabaseRefusedError, DatabaseUnavailableError

_PATIENCE_S = 30.0
_IDLE_S = 60.0  # a server that hangs in a transaction must not hold the others up for ever
_CONNECT_S = 10.0
_CONNECTIONS = 10
_MORE_CONNECTIONS = 20  # while many calls run at once
_OLDEST_VERSION = 13

_CHANNEL = "hvp"
_ALONE = 0x687670  # key of the lock that a transaction holds which nobody else writes beside
_HEARTBEAT_S = 15.0
_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 5.0

# Classes of SQLSTATE that pass: a connection, a rollback for others' sake, room, an operator, the
# disk; and a role or a database that an operator takes away from a server that runs.
_PASSING_CLASSES = frozenset({"08", "28", "3D", "40", "53", "57", "58"})
# A lock was not had in time, a transaction lay idle, the server is a standby at present.
_PASSING = frozenset({"55P03", "25P02", "25P03", "25006"})

log = structlog.get_logger()


@final
class PostgresEngine(Engine):
    """Transactions on a PostgreSQL database.

    Readers see one state of the rows (REPEATABLE READ); writers are READ COMMITTED. One that is
    not alone locks the rows that it changes before it looks at them; those that are alone hold a
    lock of their own, which goes with their connection.

    Args:
        url: URL of the database, as libpq's, checked by `split_url`.
    """

    is_shared = True

    def __init__(self, url: str) -> None:
        super().__init__(shown_url(url))
        self._url = url
        self._engine = create_async_engine(
            "postgresql+asyncpg://",
            # The driver reads the URL: sslmode, passfile, several hosts are as for every client.
            async_creator=self._connect,
            pool_size=_CONNECTIONS,
            max_overflow=_MORE_CONNECTIONS,
            pool_timeout=_PATIENCE_S,
            hide_parameters=True,  # an error's text goes to the log
            pool_pre_ping=True,  # after a restart of the server the first call finds it up again
        )
        self._listener: asyncio.Task[None] | None = None

    async def _connect(self) -> Any:
        return await asyncpg.connect(
            self._url,
            timeout=_CONNECT_S,
            command_timeout=2 * _PATIENCE_S,
            server_settings={
                "application_name": "hvp",
                "lock_timeout": str(int(1000 * _PATIENCE_S)),
                "idle_in_transaction_session_timeout": str(int(1000 * _IDLE_S)),
            },
        )

    @contextlib.asynccontextmanager
    async def reading(self) -> AsyncIterator[AsyncConnection]:
        """See Engine."""
        async with self._connection(
            isolation_level="REPEATABLE READ", postgresql_readonly=True
        ) as connection:
            yield connection

    @contextlib.asynccontextmanager
    async def writing(self, *, alone: bool) -> AsyncIterator[AsyncConnection]:
        """See Engine."""
        async with self._connection(isolation_level="READ COMMITTED") as connection:
            if alone:
                await connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_ALONE)))
            yield connection

    @contextlib.asynccontextmanager
    async def _connection(self, **options: Any) -> AsyncIterator[AsyncConnection]:
        connection = self._engine.connect()
        with _passing_troubles():
            with _lost_connections():
                await connection.start()
            try:
                connection = await connection.execution_options(**options)
                async with connection.begin():
                    yield connection
            finally:
                await asyncio.shield(asyncio.ensure_future(connection.close()))

    def now(self) -> sa.ColumnElement[int]:
        """The database server's clock, which all of its servers share."""
        seconds = sa.func.extract("epoch", sa.func.clock_timestamp())
        return sa.cast(seconds * 1_000_000, sa.BigInteger)

    async def announce(self, connection: AsyncConnection, topics: Collection[str]) -> None:
        """See Engine."""
        for topic in topics:
            await connection.execute(sa.select(sa.func.pg_notify(_CHANNEL, topic)))

    async def check(self) -> None:
        """Refuse a server that is not there, too old, of another encoding or closed to us."""
        try:
            connection = await self._connect()
        except asyncpg.InvalidCatalogNameError:
            raise DatabaseRefusedError(
                f"there is no database at {self.where}: create it (createdb), or correct "
                "--database-url"
            ) from None
        except asyncpg.InvalidAuthorizationSpecificationError as error:  # passwords among them
            raise DatabaseRefusedError(
                f"PostgreSQL does not let the server in at {self.where} ({error}): correct the "
                "user and the password in HVP_DATABASE_URL, or pg_hba.conf"
            ) from None
        except (asyncpg.InterfaceError, ValueError):  # whose words may hold the password
            raise DatabaseRefusedError(
                f"the database URL of {self.where} has an option that the driver does not take: "
                "options are libpq's, such as ?sslmode=verify-full"
            ) from None
        except (OSError, asyncpg.PostgresError) as error:
            raise DatabaseRefusedError(
                f"no PostgreSQL server answers at {self.where} ({_words(error)}): start it, or "
                "correct --database-url"
            ) from None
        try:
            version = connection.get_server_version()
            encoding = await connection.fetchval("SHOW server_encoding")
        finally:
            await connection.close()
        if version.major < _OLDEST_VERSION:
            raise DatabaseRefusedError(
                f"{self.where} is PostgreSQL {version.major}; use {_OLDEST_VERSION} or later"
            )
        if encoding != "UTF8":
            raise DatabaseRefusedError(
                f"the database at {self.where} has the encoding {encoding}: create one with "
                "ENCODING 'UTF8'"
            )

    async def listen(self) -> None:
        """See Engine."""
        self._listener = asyncio.create_task(self._listen())

    async def _listen(self) -> None:
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                connection = await self._connect()
                try:
                    await connection.add_listener(
                        _CHANNEL, lambda _c, _p, _n, topic: self.signals.ring(topic)
                    )
                    self.signals.ring_all()  # what was told before is lost
                    pause_s = _FIRST_PAUSE_S
                    await _until_lost(connection)
                finally:
                    connection.terminate()
            except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
                log.warning("the database's news are not heard; trying again", why=_words(error))
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    async def shrink(self) -> None:
        """PostgreSQL does that by itself (autovacuum)."""

    async def close(self) -> None:
        """See Engine."""
        if self._listener is not None:
            self._listener.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._listener
        await self._engine.dispose()


async def _until_lost(connection: Any) -> None:
    """Return when a connection has ended; one that is silent is asked for a sign of life."""
    lost = asyncio.Event()
    connection.add_termination_listener(lambda _: lost.set())
    while not lost.is_set():
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(lost.wait(), _HEARTBEAT_S)
            return
        await connection.fetchval("SELECT 1", timeout=_CONNECT_S)


def split_url(url: str) -> SplitResult:
    """Take a database URL apart.

    Raises:
        ValueError: It is none; the message does not hold it, because of the password in it.
    """
    try:
        parts = urlsplit(url)
        hosts = parts.netloc.rpartition("@")[2].split(",")
        _ = [urlsplit(f"//{host}").port for host in hosts]
    except ValueError:
        raise ValueError(
            "the database URL cannot be read: write postgresql://USER:PASSWORD@HOST:PORT/NAME, "
            "and the characters :/?#[]@% of a password as %3A %2F %3F %23 %5B %5D %40 %25"
        ) from None
    if parts.scheme not in ("postgresql", "postgres") or parts.fragment:
        raise ValueError(
            "a database URL is postgresql://USER:PASSWORD@HOST:PORT/NAME, with the characters "
            ":/?#[]@% of a password written as %3A and so on; leave it out for the SQLite file "
            "in the state folder"
        )
    return parts


def shown_url(url: str) -> str:
    """A database URL as it may be shown: without password and options."""
    parts = split_url(url)
    user, host = f"{parts.username}@" if parts.username else "", parts.netloc.rpartition("@")[2]
    return unquote(f"postgresql://{user}{host}{parts.path}")


def _words(error: BaseException) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


@contextlib.contextmanager
def _lost_connections() -> Iterator[None]:
    """Turn what a driver says that cannot connect into DatabaseUnavailableError."""
    try:
        yield
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        raise DatabaseUnavailableError(_words(error)) from error


@contextlib.contextmanager
def _passing_troubles() -> Iterator[None]:
    """Turn errors of a database that passes into DatabaseUnavailableError."""
    try:
        yield
    except sa.exc.TimeoutError as error:
        raise DatabaseUnavailableError("every connection is in use") from error
    except sa.exc.DBAPIError as error:
        state = str(getattr(error.orig, "sqlstate", None) or "")
        if not (error.connection_invalidated or state[:2] in _PASSING_CLASSES or state in _PASSING):
            raise
        raise DatabaseUnavailableError(_words(error.orig or error)) from error
    except TimeoutError as error:  # of a statement: nothing came back
        raise DatabaseUnavailableError("it does not answer") from error
    except (asyncpg.PostgresConnectionError, asyncpg.InterfaceError) as error:
        raise DatabaseUnavailableError(_words(error)) from error
