"""Databases of other versions: older ones are brought up to date, newer ones are refused."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hvp_service.app.config import ServerConfig
from hvp_service.app.dependencies import open_dependencies
from hvp_service.calls.names import Name
from hvp_service.jobs import service as jobs
from hvp_service.storage.database import METADATA, open_database
from hvp_service.storage.state_dir import StateDir
from hvp_service.storage.troubles import SchemaVersionError
from pydantic import SecretStr

from tests.modules.postgres import Server
from tests.service.quadratic_backend import QuadraticBackend
from tests.service.world import PROJECT, make_operator

SCHEMA_0_1 = (Path(__file__).parent / "schema_0_1.sql").read_text()


def rows_of_0_1(new: Path, old: Path) -> sqlite3.Connection:
    """A file with the tables of 0.1, and what they can hold of a present file's rows."""
    connection = sqlite3.connect(old, isolation_level=None)
    connection.executescript(SCHEMA_0_1)
    connection.execute("ATTACH ? AS new", (str(new),))
    tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master")]
    for table in tables:
        columns = [row[1] for row in connection.execute(f"PRAGMA main.table_info({table})")]
        if columns:
            listed = ", ".join(columns)
            connection.execute(
                f"INSERT INTO main.{table} ({listed}) SELECT {listed} FROM new.{table}"  # noqa: S608
            )
    connection.execute("DETACH new")
    return connection


async def test_a_folder_of_0_1_opens_and_its_running_and_queued_jobs_are_finished(
    config: ServerConfig, state_dir: StateDir
) -> None:
    deps = await open_dependencies(config, state_dir, QuadraticBackend())
    ref = await make_operator(deps)
    await deps.close()
    old = state_dir.root / "old.sqlite3"
    connection = rows_of_0_1(state_dir.database, old)
    operator = {
        **{"checkpoint": ref.checkpoint, "data_batch": ref.data_batch, "kind": ref.kind},
        **{"dtype": ref.dtype, "micro_batch_size": 0, "precision": ""},
    }
    spec = {
        **{"operator": operator, "k": 2, "which": "BE", "tol": 0.0},
        **{"max_products": 0, "seed": 1, "num_lanczos_vectors": 0},
    }
    for name, state, attempt in (("running", "RUNNING", 1), ("queued", "QUEUED", 0)):
        connection.execute(
            "INSERT INTO jobs (project, id, spec, labels, state, attempt, max_attempts, "
            "lease_owner, lease_expire, last_sequence, create_time) "
            "VALUES (?, ?, ?, '{}', ?, ?, 3, 'dead', 0, 0, 1)",
            (PROJECT, name, json.dumps(spec), state, attempt),
        )
    connection.close()
    old.rename(state_dir.database)
    for beside in state_dir.root.glob("hvp.sqlite3-*"):
        beside.unlink()

    again = await open_dependencies(config, state_dir, QuadraticBackend())
    try:
        for name, attempt in (("running", 2), ("queued", 1)):
            done = await jobs.wait(again, Name(PROJECT, "jobs", name), 10.0)
            assert (done.state, done.attempt) == ("SUCCEEDED", attempt), done.error
            assert done.result is not None
            assert done.result.result.eigenvalues == pytest.approx([1.0, 6.0])  # type: ignore[attr-defined]
    finally:
        await again.close()


async def described(where: Path | SecretStr) -> dict[str, Any]:
    """Columns and indexes of every table, as the database itself tells them."""
    database = await open_database(where)

    def describe(connection: sa.Connection) -> dict[str, Any]:
        found = sa.inspect(connection)
        return {
            table: (
                {
                    each["name"]: (str(each["type"]), each["nullable"])
                    for each in found.get_columns(table)
                },
                found.get_pk_constraint(table)["constrained_columns"],
                sorted(tuple(each["column_names"]) for each in found.get_indexes(table)),
            )
            for table in found.get_table_names()
            if table != "alembic_version"
        }

    try:
        async with database.reading() as connection:
            return await connection.run_sync(describe)
    finally:
        await database.close()


async def test_the_revisions_make_the_tables_that_the_statements_are_about(
    where: Path | SecretStr, postgres: Server
) -> None:
    if isinstance(where, SecretStr):
        where = SecretStr(await postgres.new_database())
    made = await described(where)
    assert made.keys() == METADATA.tables.keys()
    for name, (columns, key, indexes) in made.items():
        table = METADATA.tables[name]
        assert {each: nullable for each, (_, nullable) in columns.items()} == {
            column.name: column.nullable for column in table.columns
        }
        assert key == [column.name for column in table.primary_key.columns]
        assert indexes == sorted(
            tuple(column.name for column in index.columns) for index in table.indexes
        )


async def test_a_file_of_0_1_and_a_new_one_come_to_the_same_tables(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "old.db")
    connection.executescript(SCHEMA_0_1)
    connection.execute("INSERT INTO server VALUES (1, x'00')")
    connection.commit()
    connection.close()
    assert await described(tmp_path / "old.db") == await described(tmp_path / "new.db")


async def test_a_database_of_a_newer_version_is_refused_and_left_as_it_is(
    where: Path | SecretStr, postgres: Server
) -> None:
    if isinstance(where, SecretStr):
        where = SecretStr(await postgres.new_database())
    database = await open_database(where)
    async with database.writing() as connection:
        await connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    await database.close()
    for _ in range(2):
        with pytest.raises(SchemaVersionError, match=r"revision 9999, .*use the version"):
            await open_database(where)


async def test_opening_twice_at_once_runs_each_revision_once(postgres: Server) -> None:
    where = SecretStr(await postgres.new_database())
    opened = await asyncio.gather(*(open_database(where) for _ in range(4)))
    assert len({database.page_token_key for database in opened}) == 1
    for database in opened:
        await database.close()
