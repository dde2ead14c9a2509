"""What is deleted leaves the disk, and what nobody may rely on any more goes by itself."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import numpy as np
import pytest
from hvp_client import Client, FailedPreconditionError, NotFoundError
from hvp_service.blob_store import BlobStore
from hvp_service.config import ServerConfig
from hvp_service.dependencies import Dependencies, open_dependencies
from hvp_service.errors import ServiceError
from hvp_service.handlers import checkpoints
from hvp_service.paging import Pager
from hvp_service.state_dir import StateDir
from hvp_service.transport import start_transport
from safetensors.numpy import save

from tests.service.quadratic_backend import QuadraticBackend
from tests.service.world import (
    CONFIG,
    PROJECT,
    make_batch,
    make_checkpoint,
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
            for _ in range(20):
                checkpoint = client.upload_checkpoint(folder)
                assert client.upload_checkpoint(folder) == checkpoint  # told that all is here
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
