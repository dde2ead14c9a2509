"""Transactions on the state folder's database."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
import sqlalchemy as sa
from hvp_service import database
from hvp_service.database import DatabaseBusyError, open_database, requests


async def test_a_write_that_finds_no_turn_says_so_and_the_next_one_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "_PATIENCE_S", 0.05)
    rows = await open_database(tmp_path / "rows.db")
    other = sqlite3.connect(tmp_path / "rows.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(DatabaseBusyError):
        async with rows.writing():
            pass
    async with rows.reading() as connection:  # readers never wait
        assert (await connection.execute(sa.select(requests))).all() == []
    other.execute("ROLLBACK")
    other.close()
    async with rows.writing() as connection:
        await connection.execute(sa.delete(requests))
    await rows.close()
