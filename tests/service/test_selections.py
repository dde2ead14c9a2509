"""Rows of vectors and jobs from before there were selections are of all parameters."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from hvp_operations.eigsh import EigshSpec
from hvp_service.calls.names import Name
from hvp_service.calls.paging import Pager
from hvp_service.jobs.rows import read_spec, spec_row
from hvp_service.jobs.store import JobSpec
from hvp_service.operators.resolver import OperatorRef
from hvp_service.storage.database import open_database
from hvp_service.vectors.rows import ALL_PARAMETERS, Selection, VectorRows


async def test_a_vectors_row_without_a_selection_is_of_all_parameters(tmp_path: Path) -> None:
    path = tmp_path / "rows.db"
    await (await open_database(path)).close()
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '0001'")
        for column in (
            "requests.owner",
            "requests.lease_expire",
            "server.folder",
            "uploads.busy_until",
        ):
            connection.execute("ALTER TABLE {} DROP COLUMN {}".format(*column.split(".")))
        connection.execute("ALTER TABLE vectors DROP COLUMN selection")
        connection.execute(
            "INSERT INTO vectors (project, id, checkpoint_id, dtype, num_elements, generation, "
            "create_time) VALUES ('p', 'v', 'c', 'float32', 5, 'g', 1)"
        )
    database = await open_database(path)
    rows = VectorRows(database, Pager(b""), ttl_s=60)
    found = await rows.get(Name("p", "vectors", "v"))
    assert found.selection == ALL_PARAMETERS
    await database.close()


def test_a_jobs_row_without_a_selection_is_of_all_parameters() -> None:
    ref = OperatorRef(
        checkpoint="projects/p/checkpoints/c",
        data_batch="projects/p/dataBatches/b",
        kind="KIND_HESSIAN",
        parameters=("*.mlp.*",),
    )
    row = spec_row(JobSpec(operation="eigsh", operator=ref, spec=EigshSpec(k=1)))
    read = read_spec(row)
    assert read is not None
    assert read.operator == ref
    del row["operator"]["parameters"]
    old = read_spec(row)
    assert old is not None
    assert old.operator.parameters == ()


def test_selections_are_what_they_select() -> None:
    assert Selection(("a",), ("a*",)) == Selection(("a",), ("?",))
    assert Selection(("a",), ("a*",)) != Selection(("a", "b"), ("a*",))
