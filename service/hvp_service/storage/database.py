"""Rows in SQLite: the tables, and transactions on them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import sqlite3
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.schema import CreateColumn

from hvp_service.calls.errors import ServiceError
from hvp_service.metrics import instruments

# Another number is another format, which no other server may open. A column that is added with a
# default for the rows without it leaves the number as it is: see `_add_columns`.
SCHEMA_VERSION = 1

METADATA = sa.MetaData()

blobs = sa.Table(
    "blobs",
    METADATA,
    sa.Column("project", sa.String, primary_key=True),
    sa.Column("sha256", sa.String, primary_key=True),
    sa.Column("size_bytes", sa.BigInteger, nullable=False),
    sa.Column("create_time", sa.BigInteger, nullable=False),
    # When a caller was last told of it who may be about to use it; 0 once something is made of it.
    sa.Column("mention_time", sa.BigInteger, nullable=False, server_default="0"),
)

uploads = sa.Table(
    "uploads",
    METADATA,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("project", sa.String, nullable=False),
    sa.Column("sha256", sa.String, nullable=False),
    sa.Column("size_bytes", sa.BigInteger, nullable=False),
    sa.Column("committed_size", sa.BigInteger, nullable=False),
    sa.Column("writer_epoch", sa.BigInteger, nullable=False),
    sa.Column("state", sa.String, nullable=False),  # OPEN FINISHED CANCELLED
    sa.Column("expire_time", sa.BigInteger, nullable=False),
)

checkpoints = sa.Table(
    "checkpoints",
    METADATA,
    sa.Column("project", sa.String, primary_key=True),
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("architecture", sa.String, nullable=False),
    sa.Column("num_parameters", sa.BigInteger, nullable=False),
    sa.Column("vocab_size", sa.BigInteger, nullable=False),
    sa.Column("max_positions", sa.BigInteger, nullable=True),
    sa.Column("stored_dtype", sa.String, nullable=False),
    sa.Column("size_bytes", sa.BigInteger, nullable=False),
    sa.Column("parameters", sa.JSON, nullable=False),  # [[name, shape, offset], ...]
    sa.Column("create_time", sa.BigInteger, nullable=False),
    sa.Column("labels", sa.JSON, nullable=False, server_default="{}"),
    sa.Column("task", sa.String, nullable=False, server_default="causal language modelling"),
    sa.Column("batch_schema", sa.JSON(none_as_null=True), nullable=True),
)

checkpoint_files = sa.Table(
    "checkpoint_files",
    METADATA,
    sa.Column("project", sa.String, primary_key=True),
    sa.Column("checkpoint_id", sa.String, primary_key=True),
    sa.Column("path", sa.String, primary_key=True),
    sa.Column("sha256", sa.String, nullable=False),
    sa.Column("size_bytes", sa.BigInteger, nullable=False),
)

data_batches = sa.Table(
    "data_batches",
    METADATA,
    sa.Column("project", sa.String, primary_key=True),
    sa.Column("id", sa.String, primary_key=True),  # SHA-256 of the blob
    sa.Column("size_bytes", sa.BigInteger, nullable=False),
    sa.Column("num_sequences", sa.BigInteger, nullable=False),
    sa.Column("sequence_length", sa.BigInteger, nullable=False),
    sa.Column("num_targets", sa.BigInteger, nullable=False),
    sa.Column("max_token_id", sa.BigInteger, nullable=False),
    sa.Column("has_attention_mask", sa.Boolean, nullable=False),
    sa.Column("create_time", sa.BigInteger, nullable=False),
    sa.Column("fields", sa.JSON, nullable=False, server_default="[]"),
)

vectors = sa.Table(
    "vectors",
    METADATA,
    sa.Column("project", sa.String, primary_key=True),
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("checkpoint_id", sa.String, nullable=False),
    sa.Column("dtype", sa.String, nullable=False),
    sa.Column("num_elements", sa.BigInteger, nullable=False),
    sa.Column("recipe", sa.JSON(none_as_null=True), nullable=True),  # how to make it again
    sa.Column("generation", sa.String, nullable=False),  # of the ranks that first held it
    sa.Column("create_time", sa.BigInteger, nullable=False),
    sa.Column("session", sa.String, nullable=False, server_default=""),  # id; "": of none
    sa.Column("expire_time", sa.BigInteger, nullable=True),  # unless it is used before
    sa.Column("kept", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("batch_id", sa.String, nullable=False, server_default=""),  # "": parameter space
    sa.Column("shape", sa.JSON, nullable=False, server_default="[]"),  # of outputs
    sa.Column("selection", sa.JSON, nullable=False, server_default="{}"),  # of parameters; {}: all
    sa.Column(
        "activation", sa.JSON, nullable=False, server_default="{}"
    ),  # {}: the model's outputs
)

sessions = sa.Table(
    "sessions",
    METADATA,
    sa.Column("project", sa.String, primary_key=True),
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("ttl_us", sa.BigInteger, nullable=False),
    sa.Column("create_time", sa.BigInteger, nullable=False),
    sa.Column("expire_time", sa.BigInteger, nullable=False),
)

jobs = sa.Table(
    "jobs",
    METADATA,
    sa.Column("project", sa.String, primary_key=True),
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("spec", sa.JSON, nullable=False),
    sa.Column("labels", sa.JSON, nullable=False),
    sa.Column("state", sa.String, nullable=False, index=True),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("max_attempts", sa.Integer, nullable=False),
    sa.Column("lease_owner", sa.String, nullable=False),
    sa.Column("lease_expire", sa.BigInteger, nullable=False),
    sa.Column("progress", sa.JSON(none_as_null=True), nullable=True),
    sa.Column("result", sa.JSON(none_as_null=True), nullable=True),
    sa.Column("error", sa.JSON(none_as_null=True), nullable=True),
    sa.Column("last_sequence", sa.BigInteger, nullable=False),
    sa.Column("create_time", sa.BigInteger, nullable=False),
    sa.Column("start_time", sa.BigInteger, nullable=True),
    sa.Column("end_time", sa.BigInteger, nullable=True),
    sa.Column("extends", sa.String, nullable=False, server_default=""),  # name of another job
    # The other job's result for as long as this one needs it, whatever becomes of that job.
    sa.Column("earlier", sa.JSON(none_as_null=True), nullable=True),
)

# The vectors that a job needs which has not ended; none of another one.
job_inputs = sa.Table(
    "job_inputs",
    METADATA,
    sa.Column("project", sa.String, primary_key=True),
    sa.Column("vector_id", sa.String, primary_key=True),
    sa.Column("job_id", sa.String, primary_key=True),
)

job_events = sa.Table(
    "job_events",
    METADATA,
    sa.Column("project", sa.String, primary_key=True),
    sa.Column("job_id", sa.String, primary_key=True),
    sa.Column("sequence", sa.BigInteger, primary_key=True),
    sa.Column("time", sa.BigInteger, nullable=False),
    sa.Column("body", sa.JSON, nullable=False),
)

requests = sa.Table(
    "requests",
    METADATA,
    sa.Column("project", sa.String, primary_key=True),
    sa.Column("method", sa.String, primary_key=True),
    sa.Column("request_id", sa.String, primary_key=True),
    sa.Column("payload_sha256", sa.String, nullable=False),
    sa.Column("response", sa.LargeBinary, nullable=False),
    sa.Column("create_time", sa.BigInteger, nullable=False),
)

api_keys = sa.Table(
    "api_keys",
    METADATA,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("project", sa.String, nullable=False, index=True),  # "-": every one
    sa.Column("role", sa.String, nullable=False),
    sa.Column("label", sa.String, nullable=False),
    sa.Column("sha256", sa.String, nullable=False),  # of the secret
    sa.Column("create_time", sa.BigInteger, nullable=False),
    sa.Column("expire_time", sa.BigInteger, nullable=True),
    sa.Column("revoke_time", sa.BigInteger, nullable=True),
    sa.Column("use_time", sa.BigInteger, nullable=True),
)

server = sa.Table(
    "server",
    METADATA,
    sa.Column("schema_version", sa.Integer, primary_key=True),
    sa.Column("page_token_key", sa.LargeBinary, nullable=False),
)


_PATIENCE_S = 30.0
_LOG_PAGES = 100
_RETRY_AFTER_S = 5.0

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


class DatabaseBusyError(ServiceError):
    """The database cannot be used at present: nothing of this transaction has happened."""

    def __init__(self, why: str):
        instruments.DATABASE_BUSY.inc()
        super().__init__(
            "STATE_DIR_BUSY",
            f"The state folder's database cannot be used at present ({why}): its disk is slow or "
            "full, or another program holds it. Call again.",
            retry_after_s=_RETRY_AFTER_S,
        )


class SchemaVersionError(Exception):
    """The state directory was written by another version."""


class Database:
    """Transactions on one SQLite file.

    Law: what `writing` did is durable when its block has ended without an exception, and undone
    when it ended with one.
    """

    def __init__(self, engine: AsyncEngine, page_token_key: bytes):
        self._engine = engine
        # SQLite has one writer at a time. Writers wait for their turn here, without a connection,
        # so that however many wait, readers find one.
        self._turn = asyncio.Lock()
        self.page_token_key = page_token_key

    @contextlib.asynccontextmanager
    async def reading(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that sees one state of the rows.

        Raises:
            DatabaseBusyError: Every connection is taken, or another program holds the file whole.
        """
        with instruments.transaction("read"), _passing_troubles():
            async with self._engine.connect() as connection, connection.begin():
                yield connection

    @contextlib.asynccontextmanager
    async def writing(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that nobody else writes beside.

        Raises:
            DatabaseBusyError: The disk is slow or full, or another process has the file open.
        """
        with instruments.transaction("write"):
            async with self._writing() as connection:
                yield connection

    @contextlib.asynccontextmanager
    async def _writing(self) -> AsyncIterator[AsyncConnection]:
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

    async def shrink(self) -> None:
        """Give the room of deleted rows back to the disk; files of 0.1 keep it for new rows."""
        async with self.writing() as connection:
            await connection.exec_driver_sql("PRAGMA incremental_vacuum")

    async def close(self) -> None:
        """Close every connection."""
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


def _loads(text: str) -> Any:
    """Read a JSON column; damaged text stays text, so that one row does not spoil its list."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _add_columns(connection: sa.Connection) -> None:
    """Give the tables of an older server the columns that they lack.

    Every such column is nullable or has a default, so the older server can still open the file.
    """
    inspector = sa.inspect(connection)
    quote = connection.dialect.identifier_preparer.format_table
    for table in METADATA.sorted_tables:
        known = {column["name"] for column in inspector.get_columns(table.name)}
        for column in table.columns:
            if column.name not in known:
                definition = CreateColumn(column).compile(dialect=connection.dialect)
                connection.exec_driver_sql(f"ALTER TABLE {quote(table)} ADD COLUMN {definition}")


async def open_database(path: Path) -> Database:
    """Open the file, creating the tables in a new one and columns that an older one lacks.

    Raises:
        SchemaVersionError: The file holds another version's tables.
        DatabaseBusyError: Another program holds the file.
    """
    engine = create_async_engine(
        # Made of parts: in a URL written out, a `?` of the path would begin its query.
        sa.URL.create("sqlite+aiosqlite", database=str(path)),
        pool_timeout=_PATIENCE_S,
        hide_parameters=True,  # an error's text goes to the log
        json_deserializer=_loads,
    )
    sa.event.listen(engine.sync_engine, "connect", _prepare_connection)
    sa.event.listen(engine.sync_engine, "begin", _begin)
    database = Database(engine, b"")
    try:
        async with database.writing() as connection:
            await connection.run_sync(METADATA.create_all)
            row = (await connection.execute(sa.select(server))).one_or_none()
            if row is None:
                database.page_token_key = secrets.token_bytes(32)
                await connection.execute(
                    server.insert().values(
                        schema_version=SCHEMA_VERSION, page_token_key=database.page_token_key
                    )
                )
            elif row.schema_version != SCHEMA_VERSION:
                raise SchemaVersionError(
                    f"{path} has schema version {row.schema_version}, this server writes "
                    f"{SCHEMA_VERSION}; use the server that wrote it, or an empty --state-dir"
                )
            else:
                await connection.run_sync(_add_columns)
                database.page_token_key = row.page_token_key
    except BaseException:
        await engine.dispose()
        raise
    return database
