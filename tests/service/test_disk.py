"""What is deleted leaves the disk, and what nobody may rely on any more goes by itself."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa
from hvp_client import Client, FailedPreconditionError, NotFoundError
from hvp_service.app.config import ServerConfig
from hvp_service.app.dependencies import Dependencies, open_dependencies
from hvp_service.app.transport import start_transport
from hvp_service.batches import service as batches
from hvp_service.blobs.store import BlobStore
from hvp_service.calls.errors import ServiceError
from hvp_service.calls.names import Name, parse
from hvp_service.calls.paging import Pager
from hvp_service.checkpoints import service as checkpoints
from hvp_service.jobs import service as jobs
from hvp_service.jobs.store import JobEvent
from hvp_service.operators import service as operators
from hvp_service.storage.database import job_events
from hvp_service.storage.database import jobs as job_rows
from hvp_service.storage.state_dir import StateDir
from hvp_service.vectors import service as vectors
from safetensors.numpy import save

from tests.service.quadratic_backend import QuadraticBackend
from tests.service.world import (
    CONFIG,
    PROJECT,
    create_job,
    make_batch,
    make_checkpoint,
    make_operator,
    quadratic,
    upload,
)

MEGABYTE = 10**6


def size_on_disk(folder: Path) -> int:
    """Bytes, each file once however many names it has."""
    seen = {
        (status.st_dev, status.st_ino): 512 * status.st_blocks
        for status in (path.lstat() for path in folder.rglob("*"))
    }
    return sum(seen.values())


async def test_a_checkpoint_uploaded_and_deleted_twenty_times_leaves_the_folder_as_large_as_before(
    deps: Dependencies, config: ServerConfig, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_bytes(CONFIG)
    (folder / "model.safetensors").write_bytes(save(quadratic(400)))  # 1.3 MB
    transport = await start_transport(deps)
    before = size_on_disk(config.state_dir)

    def work() -> None:
        ids = np.arange(8).reshape(2, 4)
        with Client(transport.address) as client:
            for number in range(20):
                checkpoint = client.upload_checkpoint(folder)
                if number % 5 == 0:  # told that all is here
                    assert client.upload_checkpoint(folder) == checkpoint
                batch = client.upload_batch({"input_ids": ids})
                assert size_on_disk(config.state_dir) > before + MEGABYTE
                client.delete_checkpoint(checkpoint.name)
                client.delete_batch(batch.name)

    await asyncio.to_thread(work)
    await transport.stop(1.0)
    assert size_on_disk(config.state_dir) < before + MEGABYTE
    assert not list((config.state_dir / "blobs").iterdir())
    assert not list((config.state_dir / "checkpoints").iterdir())


async def test_files_that_others_are_made_of_stay(deps: Dependencies) -> None:
    one, other = await make_checkpoint(deps, seed=0), await make_checkpoint(deps, seed=1)
    config, *_ = [file.digest for file in one.files if file.path == "config.json"]
    await checkpoints.delete_checkpoint(deps, one.name)
    assert deps.blobs.path(config).exists()
    assert {file.digest for file in one.files if not deps.blobs.path(file.digest).exists()} == {
        file.digest for file in one.files
    } - {config}
    await checkpoints.delete_checkpoint(deps, other.name)
    assert not deps.blobs.path(config).exists()


async def test_a_file_of_two_projects_stays_for_the_other(deps: Dependencies) -> None:
    mine = await make_checkpoint(deps)
    for file in mine.files:
        assert (await deps.uploads.start("other", file.digest)).blob is None
    async with deps.database.writing() as connection:
        for file in mine.files:
            await deps.blobs.register(connection, "other", file.digest)
    theirs = await deps.checkpoints.create("other", mine.files)
    await checkpoints.delete_checkpoint(deps, mine.name)
    assert all(deps.blobs.path(file.digest).exists() for file in theirs.files)
    assert (await deps.checkpoints.get(theirs.name)).files == mine.files


async def test_what_a_call_works_with_is_deleted_after_it(
    deps: Dependencies, backend: QuadraticBackend, state_dir: StateDir
) -> None:
    ref = await make_operator(deps)
    checkpoint, batch = parse(ref.checkpoint, "checkpoints"), parse(ref.data_batch, "dataBatches")
    theta = await vectors.create(
        deps, PROJECT, ref.checkpoint, "float64", vectors.ParametersSource()
    )
    backend.gate.clear()
    call = asyncio.create_task(operators.apply(deps, ref, [str(theta.name)]))
    await asyncio.sleep(0.1)
    await batches.delete_batch(deps, batch)
    await checkpoints.delete_checkpoint(deps, checkpoint)
    assert state_dir.checkpoint(checkpoint.id).is_dir()  # the ranks have yet to read it
    assert state_dir.blob(batch.id).exists()
    backend.gate.set()
    with pytest.raises(ServiceError, match="deleted meanwhile"):
        await call
    for _ in range(200):
        if not (state_dir.checkpoint(checkpoint.id).exists() or backend.resident):
            break
        await asyncio.sleep(0.05)
    assert not state_dir.checkpoint(checkpoint.id).exists()
    assert not list(state_dir.blob("xx").parent.parent.iterdir())
    assert not backend.resident


async def test_a_caller_who_was_told_that_a_file_is_here_still_finds_it(
    deps: Dependencies,
) -> None:
    checkpoint = await make_checkpoint(deps)
    digests = [file.digest for file in checkpoint.files]
    assert await deps.blobs.missing(PROJECT, digests) == []  # so the caller sends nothing
    await checkpoints.delete_checkpoint(deps, checkpoint.name)
    await deps.sweeper.sweep()
    again = await deps.checkpoints.create(PROJECT, checkpoint.files)
    await checkpoints.delete_checkpoint(deps, again.name)
    assert not any(deps.blobs.path(found).exists() for found in digests)


async def test_a_sweep_collects_blobs_that_nothing_is_made_of_after_the_grace(
    deps: Dependencies, state_dir: StateDir
) -> None:
    batch = await make_batch(deps)
    lonely = await upload(deps, os.urandom(100))
    await deps.sweeper.sweep()
    assert await deps.blobs.find(PROJECT, lonely.sha256) is not None
    hasty = BlobStore(deps.database, state_dir, Pager(b""), grace_s=0.0)
    await asyncio.sleep(0.01)
    await hasty.collect()
    assert await deps.blobs.find(PROJECT, lonely.sha256) is None
    assert not deps.blobs.path(lonely).exists()
    assert deps.blobs.path(batch.digest).exists()


async def test_what_is_made_of_a_blob_that_was_collected_meanwhile_is_refused(
    deps: Dependencies, state_dir: StateDir
) -> None:
    data = save({"input_ids": np.arange(8, dtype=np.int64).reshape(2, 4)})
    found = await upload(deps, data)
    await asyncio.sleep(0.01)
    await BlobStore(deps.database, state_dir, Pager(b""), grace_s=0.0).collect()
    with pytest.raises(ServiceError, match="INPUT_MISSING"):
        await deps.batches.create(PROJECT, found)


async def test_the_sdk_lists_blobs_and_deletes_those_that_nothing_is_made_of(
    deps: Dependencies,
) -> None:
    batch, lonely = await make_batch(deps), await upload(deps, b"bytes")
    transport = await start_transport(deps)

    def work() -> None:
        with Client(transport.address) as client:
            used, free = client.blobs()
            assert [used.size_bytes, free.size_bytes] == [batch.digest.size_bytes, 5]
            assert free.name.endswith(lonely.sha256)
            with pytest.raises(FailedPreconditionError, match="RESOURCE_IN_USE"):
                client.delete_blob(used.name)
            client.delete_blob(free.name)
            assert client.blobs() == [used]
            with pytest.raises(NotFoundError):
                client.delete_blob(free.name)

    await asyncio.to_thread(work)
    await transport.stop(1.0)
    assert not deps.blobs.path(lonely).exists()


async def test_blobs_that_an_older_server_left_go_with_the_first_sweep(
    config: ServerConfig, state_dir: StateDir
) -> None:
    hasty = config.model_copy(update={"blob_grace_s": 0.0})
    deps = await open_dependencies(config, state_dir, QuadraticBackend())
    left = await upload(deps, b"left")
    await deps.close()
    await asyncio.sleep(0.01)
    again = await open_dependencies(hasty, state_dir, QuadraticBackend())
    assert not again.blobs.path(left).exists()
    await again.close()


async def ended_job(deps: Dependencies) -> tuple[Name, list[Name]]:
    """A job with two eigenvectors."""
    ref = await make_operator(deps)
    name = Name(PROJECT, "jobs", jobs.job_id(PROJECT, ""))
    await create_job(deps, ref, name=name)
    job = await jobs.wait(deps, name, 30.0)
    assert job.result is not None
    return name, [parse(vector, "vectors") for vector in job.result.vectors]


async def test_the_eigenvectors_of_a_job_go_with_it_unless_they_are_kept(
    deps: Dependencies, state_dir: StateDir
) -> None:
    name, (lost, kept) = await ended_job(deps)
    await vectors.keep(deps, kept)
    await jobs.delete(deps, name)
    with pytest.raises(ServiceError, match="RESOURCE_NOT_FOUND"):
        await deps.vectors.get(lost)
    assert (await deps.vectors.get(kept)).durable
    assert [path.stem for path in state_dir.vector("x").parent.iterdir()] == [kept.id]


async def test_jobs_are_forgotten_when_they_ended_long_ago(
    deps: Dependencies, state_dir: StateDir
) -> None:
    old, _ = await ended_job(deps)
    async with deps.database.writing() as connection:
        await connection.execute(sa.update(job_rows).values(end_time=0))
    young, _ = await ended_job(deps)
    await deps.sweeper.sweep()
    with pytest.raises(ServiceError, match="RESOURCE_NOT_FOUND"):
        await deps.jobs.get(old)
    assert (await deps.jobs.get(young)).state == "SUCCEEDED"
    left = [path.stem for path in state_dir.vector("x").parent.iterdir()]
    assert len(left) == 2
    assert all(stem.startswith(young.id) for stem in left)
    async with deps.database.reading() as connection:
        events = set((await connection.scalars(sa.select(job_events.c.job_id))).all())
    assert events == {young.id}


async def test_the_room_of_forgotten_events_is_given_back_to_the_disk(
    deps: Dependencies, config: ServerConfig
) -> None:
    name, _ = await ended_job(deps)
    async with deps.database.writing() as connection:
        await connection.execute(
            job_events.insert(),
            [
                {
                    "project": PROJECT,
                    "job_id": name.id,
                    "sequence": number,
                    "time": 0,
                    "body": {"kind": "x" * 1000},
                }
                for number in range(1000, 5000)
            ],
        )
        await connection.execute(sa.update(job_rows).values(end_time=0))
    before = size_on_disk(config.state_dir)
    await deps.sweeper.sweep()
    for _ in range(3):  # a later transaction writes the log back and cuts it
        await deps.database.shrink()
        await make_batch(deps)
    assert size_on_disk(config.state_dir) < before - 3 * MEGABYTE


@pytest.mark.slow
async def test_a_watch_of_a_hundred_thousand_events_comes_in_pages(
    deps: Dependencies, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, _ = await ended_job(deps)
    count = 100_000
    async with deps.database.writing() as connection:
        first = (await connection.execute(sa.select(job_events).limit(1))).one()
        last = (
            await connection.execute(
                sa.select(job_events).order_by(job_events.c.sequence.desc()).limit(1)
            )
        ).one()
        await connection.execute(sa.delete(job_events))
        await connection.execute(
            job_events.insert(),
            [
                {**first._asdict(), "sequence": number}
                if number < count
                else {**last._asdict(), "sequence": number}
                for number in range(1, count + 1)
            ],
        )
        await connection.execute(sa.update(job_rows).values(last_sequence=count))
    sizes = []
    events_after = deps.jobs.events_after

    async def watched(name: Name, sequence: int, timeout_s: float) -> list[JobEvent]:
        page = await events_after(name, sequence, timeout_s)
        sizes.append(len(page))
        return page

    monkeypatch.setattr(deps.jobs, "events_after", watched)
    seen = 0
    async for event in jobs.watch(deps, name, 0):
        assert event is not None
        seen += 1
        assert event.sequence == seen
    assert seen == count
    assert max(sizes) <= 1000
