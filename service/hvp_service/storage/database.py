"""The tables, and transactions on them: in an SQLite file or in PostgreSQL."""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from pydantic import SecretStr
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

from hvp_service.metrics import instruments
from hvp_service.storage.engines import Engine
from hvp_service.storage.migrate import migrate
from hvp_service.storage.postgres import PostgresEngine
from hvp_service.storage.signals import Signals
from hvp_service.storage.sqlite import SqliteEngine
from hvp_service.storage.troubles import DatabaseRefusedError

METADATA = sa.MetaData()


class Json(sa.types.TypeDecorator[Any]):
    """JSON as Python writes it, with NaN and infinities, which PostgreSQL's own type refuses.

    Text that is damaged stays text, so that one row does not spoil its list.
    """

    impl = sa.Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: sa.Dialect) -> str | None:
        """The column's text; None is no text."""
        return None if value is None else json.dumps(value)

    def process_result_value(self, value: Any, dialect: sa.Dialect) -> Any:
        """The text's value."""
        if not isinstance(value, str):
            return value  # SQLite keeps in a column whatever was put there
        try:
            return json.loads(value)
        except ValueError:
            return value


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
    # Until when other servers take it that a stream writes to it.
    sa.Column("busy_until", sa.BigInteger, nullable=False, server_default="0"),
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
    sa.Column("parameters", Json, nullable=False),  # [[name, shape, offset], ...]
    sa.Column("create_time", sa.BigInteger, nullable=False),
    sa.Column("labels", Json, nullable=False, server_default="{}"),
    sa.Column("task", sa.String, nullable=False, server_default="causal language modelling"),
    sa.Column("batch_schema", Json, nullable=True),
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
    sa.Column("fields", Json, nullable=False, server_default="[]"),
)

vectors = sa.Table(
    "vectors",
    METADATA,
    sa.Column("project", sa.String, primary_key=True),
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("checkpoint_id", sa.String, nullable=False),
    sa.Column("dtype", sa.String, nullable=False),
    sa.Column("num_elements", sa.BigInteger, nullable=False),
    sa.Column("recipe", Json, nullable=True),  # how to make it again
    sa.Column("generation", sa.String, nullable=False),  # of the ranks that first held it
    sa.Column("create_time", sa.BigInteger, nullable=False),
    sa.Column("session", sa.String, nullable=False, server_default=""),  # id; "": of none
    sa.Column("expire_time", sa.BigInteger, nullable=True),  # unless it is used before
    sa.Column("kept", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("batch_id", sa.String, nullable=False, server_default=""),  # "": parameter space
    sa.Column("shape", Json, nullable=False, server_default="[]"),  # of outputs
    sa.Column("selection", Json, nullable=False, server_default="{}"),  # of parameters; {}: all
    sa.Column("activation", Json, nullable=False, server_default="{}"),  # {}: the model's outputs
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
    sa.Column("spec", Json, nullable=False),
    sa.Column("labels", Json, nullable=False),
    sa.Column("state", sa.String, nullable=False, index=True),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("max_attempts", sa.Integer, nullable=False),
    sa.Column("lease_owner", sa.String, nullable=False),
    sa.Column("lease_expire", sa.BigInteger, nullable=False),
    sa.Column("progress", Json, nullable=True),
    sa.Column("result", Json, nullable=True),
    sa.Column("error", Json, nullable=True),
    sa.Column("last_sequence", sa.BigInteger, nullable=False),
    sa.Column("create_time", sa.BigInteger, nullable=False),
    sa.Column("start_time", sa.BigInteger, nullable=True),
    sa.Column("end_time", sa.BigInteger, nullable=True),
    sa.Column("extends", sa.String, nullable=False, server_default=""),  # name of another job
    # The other job's result for as long as this one needs it, whatever becomes of that job.
    sa.Column("earlier", Json, nullable=True),
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
    sa.Column("body", Json, nullable=False),
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
    sa.Column("owner", sa.String, nullable=False, server_default=""),  # "": it is answered
    sa.Column("lease_expire", sa.BigInteger, nullable=False, server_default="0"),
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
    sa.Column("schema_version", sa.Integer, primary_key=True),  # 1; newer ones are Alembic's
    sa.Column("page_token_key", sa.LargeBinary, nullable=False),
    sa.Column("folder", sa.String, nullable=False, server_default=""),  # id of the files' folder
)


_TOLD = "told"  # among a connection's own notes: topics of which the open transaction has news


class Database:
    """Transactions on rows.

    Laws:
        What `writing` and `updating` did is durable when the block has ended without an exception,
        and undone when it ended with one.
        Transactions of `writing` run one after the other, on whatever server.

    Args:
        engine: What the kind of database does its own way.
        page_token_key: Key of page tokens, the same on every server of the database.
    """

    def __init__(self, engine: Engine, page_token_key: bytes):
        self._engine = engine
        self.page_token_key = page_token_key

    @property
    def is_shared(self) -> bool:
        """Whether other servers may use the database beside this one."""
        return self._engine.is_shared

    @property
    def signals(self) -> Signals:
        """Wake-ups at changes that were told."""
        return self._engine.signals

    def now(self) -> sa.ColumnElement[int]:
        """The database's time in a statement, in microseconds; the same for all servers."""
        return self._engine.now()

    @contextlib.asynccontextmanager
    async def reading(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that sees one state of the rows.

        Raises:
            DatabaseBusyError: The rows cannot be had at present.
        """
        with instruments.transaction("read"):
            async with self._engine.reading() as connection:
                yield connection

    @contextlib.asynccontextmanager
    async def writing(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that may rely on whatever it reads: no other one of `writing` runs.

        Raises:
            DatabaseBusyError: The rows cannot be had at present, or others write for too long.
        """
        async with self._telling(alone=True) as connection:
            yield connection

    @contextlib.asynccontextmanager
    async def updating(self) -> AsyncIterator[AsyncConnection]:
        """A transaction beside others.

        It relies only on rows that it has locked (`with_for_update`) or that its own statements
        compare.

        Raises:
            DatabaseBusyError: As for `writing`.
        """
        async with self._telling(alone=False) as connection:
            yield connection

    @contextlib.asynccontextmanager
    async def _telling(self, *, alone: bool) -> AsyncIterator[AsyncConnection]:
        told: set[str] = set()
        with instruments.transaction("write"):
            async with self._engine.writing(alone=alone) as connection:
                connection.info[_TOLD] = told
                yield connection
                await self._engine.announce(connection, sorted(told))
        for topic in told:
            self.signals.ring(topic)

    def tell(self, connection: AsyncConnection, topic: str) -> None:
        """Have everybody who waits for news of a topic woken once the open transaction is done."""
        connection.info[_TOLD].add(topic)

    async def keep_folder(self, identity: str, root: Path) -> None:
        """Refuse a folder that does not hold the files that the rows are about.

        Args:
            identity: Id of the folder; the first one that a database sees is the right one.
            root: Path of the folder.

        Raises:
            DatabaseRefusedError: The files are in another folder.
        """
        async with self.writing() as connection:
            if await connection.scalar(sa.select(server.c.folder)) == "":
                await connection.execute(sa.update(server).values(folder=identity))
            elif await connection.scalar(sa.select(server.c.folder)) != identity:
                raise DatabaseRefusedError(
                    f"the files that belong to the rows at {self._engine.where} are not in {root}: "
                    "give every server of one database the same --state-dir, on a disk that they "
                    "share, or give this server a database of its own"
                )

    async def shrink(self) -> None:
        """Give the room of deleted rows back to the disk."""
        await self._engine.shrink()

    async def close(self) -> None:
        """Close every connection."""
        await self._engine.close()


def insert_missing(connection: AsyncConnection, table: sa.Table) -> Any:
    """An INSERT that leaves the rows alone which are there already."""
    if connection.dialect.name == "postgresql":
        return postgresql.insert(table).on_conflict_do_nothing()
    return sqlite.insert(table).on_conflict_do_nothing()


async def open_database(where: Path | SecretStr) -> Database:
    """Open a database, bringing its tables to this version's form.

    Args:
        where: Path of an SQLite file, which may be missing, or URL of a PostgreSQL database.

    Raises:
        DatabaseRefusedError: No server can start on it; SchemaVersionError: this one cannot.
        DatabaseBusyError: Another program holds the file, or the server does not answer.
    """
    engine = _engine(where)
    database = Database(engine, b"")
    try:
        await engine.check()
        async with database.writing() as connection:
            await connection.run_sync(migrate, engine.where)
            database.page_token_key = await _page_token_key(connection)
        await engine.listen()
    except BaseException:
        await engine.close()
        raise
    return database


def _engine(where: Path | SecretStr) -> Engine:
    if isinstance(where, Path):
        return SqliteEngine(where)
    return PostgresEngine(where.get_secret_value())


async def _page_token_key(connection: AsyncConnection) -> bytes:
    key = await connection.scalar(sa.select(server.c.page_token_key))
    if key is None:
        key = secrets.token_bytes(32)
        await connection.execute(server.insert().values(schema_version=1, page_token_key=key))
    return bytes(key)
