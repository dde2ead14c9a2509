"""What is removed at start and every hour, and deletions that end half-way."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import hvp_service.batches.store as batch_module
import numpy as np
import pytest
import sqlalchemy as sa
from hvp_service.app.dependencies import Dependencies
from hvp_service.batches.contents import BatchStatistics, read_batch
from hvp_service.calls.errors import ServiceError
from hvp_service.calls.names import Name
from hvp_service.storage.database import requests
from hvp_service.storage.state_dir import StateDir
from safetensors.numpy import save

from tests.service.world import PROJECT, chunks, digest, make_batch, make_checkpoint, upload

DATA = bytes(range(256)) * 100


def blob_name(data: bytes) -> Name:
    return Name(PROJECT, "blobs", digest(data).sha256)


async def test_a_deletion_that_is_not_committed_keeps_the_file(
    deps: Dependencies, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = await upload(deps, DATA)
    writing = deps.database.writing

    @contextlib.asynccontextmanager
    async def failing() -> AsyncIterator[Any]:
        async with writing() as connection:
            yield connection
            raise OSError("no COMMIT")

    monkeypatch.setattr(deps.database, "writing", failing)
    with pytest.raises(OSError, match="no COMMIT"):
        await deps.blobs.delete(blob_name(DATA))
    monkeypatch.undo()
    assert await deps.blobs.find(PROJECT, found.sha256) is not None
    assert deps.blobs.path(found).read_bytes() == DATA


async def test_a_sweep_removes_the_file_of_a_blob_without_a_row_and_no_other(
    deps: Dependencies,
) -> None:
    kept, lost = await upload(deps, DATA), digest(b"lost")
    deps.blobs.path(lost).parent.mkdir(exist_ok=True)
    deps.blobs.path(lost).write_bytes(b"lost")
    pending = await deps.uploads.start(PROJECT, digest(b"pending"))
    deps.blobs.path(pending.expected).parent.mkdir(exist_ok=True)
    deps.blobs.path(pending.expected).write_bytes(b"pending")
    await deps.sweeper.sweep()
    assert deps.blobs.path(kept).exists()
    assert not deps.blobs.path(lost).exists()
    assert deps.blobs.path(pending.expected).exists()  # an upload of it has not ended


async def test_a_batch_whose_blob_is_deleted_while_it_is_read_is_refused(
    deps: Dependencies, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = save({"input_ids": np.arange(8, dtype=np.int64).reshape(2, 4)})
    found = await upload(deps, data)
    loop = asyncio.get_running_loop()

    def read(path: Path) -> BatchStatistics:
        statistics = read_batch(path)
        deletion = deps.blobs.delete(blob_name(data))
        asyncio.run_coroutine_threadsafe(deletion, loop).result(10)
        return statistics

    monkeypatch.setattr(batch_module, "read_batch", read)
    with pytest.raises(ServiceError, match="INPUT_MISSING"):
        await deps.batches.create(PROJECT, found)
    monkeypatch.undo()
    assert (await make_batch(deps)).digest == found


async def test_a_sweep_removes_checkpoint_folders_without_a_row_and_no_other(
    deps: Dependencies, state_dir: StateDir
) -> None:
    checkpoint = await make_checkpoint(deps)
    for name in ("f" * 32, f"{checkpoint.name.id}.building"):
        state_dir.checkpoint(name).mkdir()
        (state_dir.checkpoint(name) / "config.json").write_bytes(b"{}")
    await deps.sweeper.sweep()
    folders = state_dir.checkpoint("x").parent.iterdir()
    assert [folder.name for folder in folders] == [checkpoint.name.id]


async def test_sweeps_come_again_and_drop_expired_uploads_and_old_answers(
    deps: Dependencies, state_dir: StateDir
) -> None:
    await deps.sweeper.stop()
    session = await deps.uploads.start(PROJECT, digest(DATA))
    await deps.uploads.write(chunks(session, DATA[:5000], finish=False))
    deps.uploads._config = deps.config.model_copy(update={"upload_ttl_s": 0.001})
    short = await deps.uploads.start(PROJECT, digest(DATA[:5000]))

    async def answer() -> bytes:
        return b"answer"

    await deps.request_log.once((PROJECT, "Method", "id"), b"payload", answer)
    async with deps.database.writing() as connection:
        await connection.execute(sa.update(requests).values(create_time=0))
    state_dir.upload(short.name.id).write_bytes(b"x")
    deps.sweeper.start(interval_s=0.01)
    await asyncio.sleep(0.3)
    assert not state_dir.upload(short.name.id).exists()
    assert state_dir.upload(session.name.id).exists()
    async with deps.database.reading() as connection:
        assert (await connection.execute(sa.select(requests))).all() == []


async def test_a_step_that_fails_keeps_no_other_from_being_swept(
    deps: Dependencies, state_dir: StateDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail() -> None:
        raise OSError("the disk does not answer")

    monkeypatch.setattr(deps.uploads, "expire", fail)
    state_dir.checkpoint("f" * 32).mkdir()
    await deps.sweeper.sweep()
    assert not state_dir.checkpoint("f" * 32).exists()
