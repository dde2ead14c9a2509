"""Rows in SQLite: the tables, and transactions on them."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.schema import CreateColumn

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

server = sa.Table(
    "server",
    METADATA,
    sa.Column("schema_version", sa.Integer, primary_key=True),
    sa.Column("page_token_key", sa.LargeBinary, nullable=False),
)


_PATIENCE_S = 30
_LOG_PAGES = 100


class DatabaseBusyError(Exception):
    """Another transaction has held the write lock for long: nothing of this one has happened."""


class SchemaVersionError(Exception):
    """The state directory was written by another version."""


class Database:
    """Transactions on one SQLite file.

    Law: what `writing` did is durable when its block has ended without an exception, and undone
    when it ended with one.
    """

    def __init__(self, engine: AsyncEngine, page_token_key: bytes):
        self._engine = engine
        self.page_token_key = page_token_key

    @contextlib.asynccontextmanager
    async def reading(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that sees one state of the rows."""
        async with self._engine.connect() as connection, connection.begin():
            yield connection

    @contextlib.asynccontextmanager
    async def writing(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that nobody else writes beside.

        Raises:
            DatabaseBusyError: The disk is slow, or another process has the file open.
        """
        async with self._engine.connect() as connection:
            # IMMEDIATE takes the write lock first: a read that later wants to write could only
            # fail when another writer came between.
            immediate = await connection.execution_options(immediate=True)
            async with immediate.begin():
                yield immediate

    async def shrink(self) -> None:
        """Give the room of deleted rows back to the disk; files of 0.1 keep it for new rows."""
        async with self.writing() as connection:
            await connection.exec_driver_sql("PRAGMA incremental_vacuum")

    async def close(self) -> None:
        """Close every connection."""
        await self._engine.dispose()


def _prepare_connection(connection: Any, _: Any) -> None:
    # The driver's own transaction handling starts no transaction before SELECT; with it off,
    # `_begin` decides.
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute("PRAGMA auto_vacuum=INCREMENTAL")  # for a new file: see `shrink`
    cursor.execute("PRAGMA journal_mode=WAL")
    # The log beside the rows is written back early: by itself it would grow to 4 MiB and stay so.
    cursor.execute(f"PRAGMA wal_autocheckpoint={_LOG_PAGES}")
    cursor.execute(f"PRAGMA journal_size_limit={_LOG_PAGES * 4096}")
    cursor.execute("PRAGMA synchronous=FULL")  # a row promised to a caller survives a power cut
    cursor.execute(f"PRAGMA busy_timeout={int(1000 * _PATIENCE_S)}")
    cursor.close()


def _begin(connection: sa.Connection) -> None:
    immediate = connection.get_execution_options().get("immediate", False)
    try:
        connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")
    except sa.exc.OperationalError as error:
        if "database is locked" not in str(error.orig):
            raise
        raise DatabaseBusyError(f"the database was locked for {_PATIENCE_S} s") from error


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
    """
    engine = create_async_engine(f"sqlite+aiosqlite:///{path}")
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
