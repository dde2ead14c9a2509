"""Transactions on the state folder's database."""

from __future__ import annotations

import asyncio
import sqlite3
import string
from pathlib import Path

import pytest
import sqlalchemy as sa
from hvp_service.calls.errors import ServiceError
from hvp_service.storage import sqlite
from hvp_service.storage.clock import now_us
from hvp_service.storage.database import Database, open_database, requests
from hvp_service.storage.troubles import DatabaseBusyError

# Every printable character that a name can have, and two that a URL would read as one.
NAMEABLE = string.printable.replace("/", "") + "é漢\N{GRINNING FACE}" + "%3F"


async def keep(rows: Database, request_id: str) -> None:
    """Write one row."""
    async with rows.writing() as connection:
        await connection.execute(
            requests.insert().values(
                project="p",
                method="m",
                request_id=request_id,
                payload_sha256="",
                response=b"",
                create_time=now_us(),
            )
        )


async def kept(rows: Database) -> list[str]:
    """What `keep` has written."""
    async with rows.reading() as connection:
        return list((await connection.scalars(sa.select(requests.c.request_id))).all())


def inside(folder: Path) -> set[Path]:
    """What lies in a folder."""
    return set(folder.iterdir())


async def test_a_write_that_finds_no_turn_says_so_and_the_next_one_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "_PATIENCE_S", 0.05)
    rows = await open_database(tmp_path / "rows.db")
    other = sqlite3.connect(tmp_path / "rows.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(DatabaseBusyError):
        async with rows.writing():
            pass
    assert await kept(rows) == []  # readers never wait
    other.execute("ROLLBACK")
    other.close()
    await keep(rows, "r")
    await rows.close()


async def test_however_many_wait_for_a_held_lock_all_hear_that_the_folder_is_busy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "_PATIENCE_S", 0.5)
    rows = await open_database(tmp_path / "rows.db")
    other = sqlite3.connect(tmp_path / "rows.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    outcomes = await asyncio.gather(
        *(keep(rows, str(number)) for number in range(20)), return_exceptions=True
    )
    reasons = [getattr(outcome, "reason", outcome) for outcome in outcomes]
    assert reasons == ["STATE_DIR_BUSY"] * 20
    other.execute("ROLLBACK")
    other.close()
    await asyncio.gather(*(keep(rows, str(number)) for number in range(20)))
    assert len(await kept(rows)) == 20
    await rows.close()


async def test_a_reader_that_finds_every_connection_taken_hears_that_the_folder_is_busy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "_PATIENCE_S", 0.1)
    rows = await open_database(tmp_path / "rows.db")
    leave = asyncio.Event()

    async def stay() -> None:
        async with rows.reading() as connection:
            await connection.execute(sa.select(requests))
            await leave.wait()

    staying = [asyncio.create_task(stay()) for _ in range(30)]
    _, pending = await asyncio.wait(staying, timeout=1.0)
    refused = [task.exception() for task in staying if task not in pending]
    assert refused
    assert {getattr(error, "reason", error) for error in refused} == {"STATE_DIR_BUSY"}
    leave.set()
    await asyncio.gather(*pending)
    assert await kept(rows) == []
    await rows.close()


async def test_a_database_that_another_program_holds_whole_is_busy_for_readers_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "_PATIENCE_S", 0.05)
    other = sqlite3.connect(tmp_path / "rows.db", isolation_level=None)
    other.execute("PRAGMA locking_mode=EXCLUSIVE")
    other.execute("CREATE TABLE mine (x)")
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(ServiceError, match="STATE_DIR_BUSY"):
        await open_database(tmp_path / "rows.db")
    other.close()
    await (await open_database(tmp_path / "rows.db")).close()


@pytest.mark.parametrize("name", ["run?", "run#", "run%3F", f"run{NAMEABLE}", "run?uri=true&mode="])
async def test_a_folder_may_have_any_name_and_holds_its_own_rows(tmp_path: Path, name: str) -> None:
    folders = [tmp_path / f"{name}{end}" for end in "ab"]
    for folder in folders:
        folder.mkdir()
        rows = await open_database(folder / "hvp.sqlite3")
        assert await kept(rows) == []
        await keep(rows, "r")
        await rows.close()
        assert (folder / "hvp.sqlite3").is_file()
    assert inside(tmp_path) == set(folders)  # nothing lies beside them under a name cut short
