from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa
from hvp_service.app.config import ServerConfig
from hvp_service.app.dependencies import Dependencies, open_dependencies
from hvp_service.blobs import service as blobs
from hvp_service.calls.errors import ServiceError
from hvp_service.calls.names import Name, parse
from hvp_service.calls.paging import PageRequest
from hvp_service.storage import database
from hvp_service.storage.state_dir import StateDir, sync_folder
from hvp_service.uploads.chunks import Chunk
from hvp_service.uploads.file import UploadFile
from hvp_service.uploads.rows import Upload
from hvp_service.uploads.store import UploadStore

from tests.service.quadratic_backend import QuadraticBackend
from tests.service.world import PROJECT, chunks, digest, make_batch, upload

DATA = bytes(range(256)) * 100  # 25 600 bytes, of which 4000 are committed at a time


async def start(deps: Dependencies, data: bytes = DATA) -> Upload:
    return await deps.uploads.start(PROJECT, digest(data))


async def read(deps: Dependencies, sha256: str) -> bytes:
    pieces = [p async for p in blobs.download(deps, Name(PROJECT, "blobs", sha256), 0, 0)]
    return b"".join(piece.data for piece in pieces)


async def reason(work: object) -> str:
    with pytest.raises(ServiceError) as caught:
        await work  # type: ignore[misc]
    return caught.value.reason


async def test_an_upload_becomes_a_blob_with_the_same_bytes(deps: Dependencies) -> None:
    session = await start(deps)
    done = await deps.uploads.write(chunks(session, DATA))
    assert done.state == "FINISHED"
    assert done.blob is not None
    assert done.committed_size == len(DATA)
    assert await read(deps, done.blob.digest.sha256) == DATA


async def test_an_empty_blob_can_be_uploaded(deps: Dependencies) -> None:
    session = await start(deps, b"")
    done = await deps.uploads.write(chunks(session, b""))
    assert done.blob is not None
    assert await read(deps, done.blob.digest.sha256) == b""


async def test_a_blob_that_is_there_needs_no_bytes(deps: Dependencies) -> None:
    await upload(deps, DATA)
    session = await start(deps)
    assert session.blob is not None
    assert session.committed_size == len(DATA)


async def test_a_stream_that_ends_early_leaves_a_session_that_resumes(deps: Dependencies) -> None:
    session = await start(deps)
    paused = await deps.uploads.write(chunks(session, DATA[:9000], finish=False))
    assert paused.committed_size == 9000
    done = await deps.uploads.write(chunks(session, DATA, start=9000))
    assert done.blob is not None
    assert await read(deps, done.blob.digest.sha256) == DATA


async def test_a_stream_that_breaks_keeps_every_byte_that_came(deps: Dependencies) -> None:
    session = await start(deps)
    arrived = asyncio.Event()

    async def broken() -> AsyncIterator[Chunk]:
        async for chunk in chunks(session, DATA[:7000], finish=False):
            yield chunk
        arrived.set()
        await asyncio.sleep(60)

    writing = asyncio.create_task(deps.uploads.write(broken()))
    await arrived.wait()
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing
    assert (await deps.uploads.get(session.name)).committed_size == 7000
    done = await deps.uploads.write(chunks(session, DATA, start=5000))  # an overlap is skipped
    assert done.blob is not None
    assert await read(deps, done.blob.digest.sha256) == DATA


async def test_an_upload_resumes_after_a_restart_of_the_server(
    deps: Dependencies, config: ServerConfig, state_dir: StateDir
) -> None:
    session = await start(deps)
    await deps.uploads.write(chunks(session, DATA[:9000], finish=False))
    await deps.close()
    again = await open_dependencies(config, state_dir, QuadraticBackend())
    try:
        resumed = await again.uploads.get(session.name)
        assert resumed.committed_size == 9000
        done = await again.uploads.write(chunks(session, DATA, start=9000))
        assert done.state == "FINISHED"
    finally:
        await again.close()


def fresh(deps: Dependencies, state_dir: StateDir) -> UploadStore:
    """The uploads as a server sees them that starts on the same folder."""
    return UploadStore(deps.database, state_dir, deps.blobs, deps.config)


async def test_a_client_that_leaves_while_its_upload_ends_still_gets_the_blob(
    deps: Dependencies, state_dir: StateDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = await start(deps)
    moved = asyncio.Event()
    loop = asyncio.get_running_loop()

    def slow_sync(folder: Path) -> None:
        if state_dir.blob(session.expected.sha256).exists():
            loop.call_soon_threadsafe(moved.set)
        time.sleep(0.1)
        sync_folder(folder)

    monkeypatch.setattr("hvp_service.blobs.store.sync_folder", slow_sync)
    writing = asyncio.create_task(deps.uploads.write(chunks(session, DATA)))
    await moved.wait()
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing
    done = await deps.uploads.write(chunks(session, DATA))
    assert done.blob is not None
    assert await read(deps, done.blob.digest.sha256) == DATA


async def leave_moved_and_open(deps: Dependencies, session: Upload) -> None:
    """End an upload up to the move of its file: the row that says so fails."""
    await deps.uploads.write(chunks(session, DATA[:9000], finish=False))
    with pytest.MonkeyPatch.context() as patch:

        async def fail(*_: object) -> None:
            raise OSError("no COMMIT")

        patch.setattr(deps.blobs, "_insert", fail)
        with pytest.raises(OSError, match="no COMMIT"):
            await deps.uploads.write(chunks(session, DATA, start=9000))
    found = await deps.uploads.get(session.name)
    assert found.state == "OPEN"
    assert found.committed_size >= 9000


@pytest.mark.parametrize("crash", [False, True])
async def test_an_upload_whose_file_was_moved_and_whose_row_was_not_written_ends_as_the_blob(
    deps: Dependencies, state_dir: StateDir, crash: bool
) -> None:
    session = await start(deps)
    await leave_moved_and_open(deps, session)
    uploads = fresh(deps, state_dir) if crash else deps.uploads
    done = await uploads.write(chunks(session, DATA, start=9000))
    assert done.state == "FINISHED"
    assert await read(deps, digest(DATA).sha256) == DATA


async def test_a_start_settles_an_upload_whose_file_was_moved(
    deps: Dependencies, state_dir: StateDir
) -> None:
    session = await start(deps)
    await leave_moved_and_open(deps, session)
    await fresh(deps, state_dir).expire()
    assert (await deps.uploads.get(session.name)).state == "FINISHED"
    assert await read(deps, digest(DATA).sha256) == DATA


@pytest.mark.parametrize("crash", [False, True])
@pytest.mark.parametrize("damage", ["gone", "short"])
async def test_an_upload_that_has_lost_bytes_begins_again_and_is_never_filled_with_zeros(
    deps: Dependencies, state_dir: StateDir, crash: bool, damage: str
) -> None:
    session = await start(deps)
    await deps.uploads.write(chunks(session, DATA[:9000], finish=False))
    file = state_dir.upload(session.name.id)
    if damage == "gone":
        file.unlink()
    else:
        os.truncate(file, 8999)
    uploads = fresh(deps, state_dir) if crash else deps.uploads
    assert await reason(uploads.write(chunks(session, DATA, start=9000))) == "WRITE_OFFSET_GAP"
    assert (await uploads.get(session.name)).committed_size == 0
    done = await uploads.write(chunks(session, DATA))
    assert done.state == "FINISHED"
    assert await read(deps, digest(DATA).sha256) == DATA


async def test_bytes_that_vanish_under_a_stream_are_an_error(
    deps: Dependencies, state_dir: StateDir
) -> None:
    session = await start(deps)

    async def robbed() -> AsyncIterator[Chunk]:
        async for chunk in chunks(session, DATA):
            if chunk.finish:
                os.truncate(state_dir.upload(session.name.id), 10)
            yield chunk

    with pytest.raises(OSError, match="ends at byte"):
        await deps.uploads.write(robbed())
    assert not state_dir.blob(digest(DATA).sha256).exists()


async def test_a_client_that_leaves_while_a_chunk_is_written_keeps_the_hash_right(
    deps: Dependencies, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = await start(deps)
    began = asyncio.Event()
    loop = asyncio.get_running_loop()
    append = UploadFile.append

    def slow(self: UploadFile, data: bytes, crc32c: int, skip: int) -> None:
        loop.call_soon_threadsafe(began.set)
        time.sleep(0.1)
        append(self, data, crc32c, skip)

    monkeypatch.setattr(UploadFile, "append", slow)
    writing = asyncio.create_task(deps.uploads.write(chunks(session, DATA)))
    await began.wait()
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing
    monkeypatch.undo()
    committed = (await deps.uploads.get(session.name)).committed_size
    assert committed == 1000
    done = await deps.uploads.write(chunks(session, DATA, start=committed))
    assert done.blob is not None


async def test_starting_again_goes_on_with_the_session_that_nobody_writes_to(
    deps: Dependencies, state_dir: StateDir
) -> None:
    session = await start(deps)
    await deps.uploads.write(chunks(session, DATA[:9000], finish=False))
    again = await start(deps)
    assert again.name == session.name
    assert again.committed_size == 9000
    assert (await fresh(deps, state_dir).start(PROJECT, digest(DATA))).name == session.name
    assert (await deps.uploads.start("other", digest(DATA))).name != session.name


async def test_two_callers_with_the_same_bytes_get_a_session_each(deps: Dependencies) -> None:
    first, second = await start(deps), await start(deps)
    assert first.name != second.name
    hold = asyncio.Event()

    async def held() -> AsyncIterator[Chunk]:
        async for chunk in chunks(first, DATA):
            yield chunk
            await hold.wait()

    writing = asyncio.create_task(deps.uploads.write(held()))
    await asyncio.sleep(0.05)
    assert (await start(deps)).name not in (first.name, second.name)
    hold.set()
    assert (await writing).state == "FINISHED"


async def test_a_session_that_was_given_up_leaves_its_room_to_the_next_try(
    deps: Dependencies, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(deps.state_dir.root)._replace(free=len(DATA) * 3 // 2)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    session = await start(deps)
    assert (await start(deps)).name == session.name
    other = bytes(len(DATA))
    assert await reason(start(deps, other)) == "DISK_FULL"
    async with deps.database.writing() as connection:
        await connection.execute(sa.update(database.uploads).values(expire_time=0))
    assert (await start(deps, other)).state == "OPEN"


async def test_room_for_an_upload_from_which_nothing_comes_is_given_to_others_after_minutes(
    deps: Dependencies, config: ServerConfig, state_dir: StateDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = 2 * len(DATA)
    usage = shutil.disk_usage(deps.state_dir.root)._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    short = config.model_copy(update={"upload_silence_s": 0.3})
    uploads = UploadStore(deps.database, state_dir, deps.blobs, short)
    silent = await uploads.start("grabber", replace(digest(b"huge"), size_bytes=int(0.9 * free)))
    with pytest.raises(ServiceError, match="loses its room") as caught:
        await uploads.start(PROJECT, digest(DATA))
    assert caught.value.reason == "DISK_FULL"
    assert caught.value.retry_after_s is not None
    assert caught.value.retry_after_s <= 0.3
    await asyncio.sleep(0.4)
    session = await uploads.start(PROJECT, digest(DATA))
    assert await reason(uploads.write(chunks(silent, DATA))) == "DISK_FULL"  # it comes too late
    assert (await uploads.write(chunks(session, DATA))).state == "FINISHED"
    await asyncio.sleep(0.4)
    late = await uploads.write(chunks(silent, DATA[:1000], finish=False))
    assert late.committed_size == 1000


async def test_an_upload_keeps_its_room_while_bytes_of_it_come(
    deps: Dependencies, config: ServerConfig, state_dir: StateDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(deps.state_dir.root)._replace(free=len(DATA) * 3 // 2)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    short = config.model_copy(update={"upload_silence_s": 0.5})
    uploads = UploadStore(deps.database, state_dir, deps.blobs, short)
    session = await uploads.start(PROJECT, digest(DATA))

    async def slow() -> AsyncIterator[Chunk]:
        async for chunk in chunks(session, DATA, size=6400):
            yield chunk
            await asyncio.sleep(0.25)

    writing = asyncio.create_task(uploads.write(slow()))
    await asyncio.sleep(0.7)
    most = replace(digest(b"most"), size_bytes=usage.free * 9 // 10)
    assert await reason(uploads.start("other", most)) == "DISK_FULL"
    assert (await writing).state == "FINISHED"
    assert (await uploads.start("other", most)).state == "OPEN"


async def test_one_project_cannot_have_all_the_room(
    deps: Dependencies, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(deps.state_dir.root)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    whole, most, little = (replace(digest(b"%d" % n), size_bytes=n) for n in (1000, 900, 100))
    with pytest.raises(ServiceError, match="90% of what is free"):
        await deps.uploads.start(PROJECT, whole)
    await deps.uploads.start(PROJECT, most)
    assert await reason(deps.uploads.start(PROJECT, little)) == "DISK_FULL"
    assert (await deps.uploads.start("other", replace(little, size_bytes=90))).state == "OPEN"


async def test_an_expired_upload_is_dropped_at_the_next_start(
    deps: Dependencies, config: ServerConfig, state_dir: StateDir
) -> None:
    hasty = config.model_copy(update={"upload_ttl_s": 0.01})
    uploads = UploadStore(deps.database, state_dir, deps.blobs, hasty)
    session = await uploads.start(PROJECT, digest(DATA))
    state_dir.upload(session.name.id).write_bytes(DATA[:5000])
    await asyncio.sleep(0.02)
    assert await reason(uploads.get(session.name)) == "RESOURCE_NOT_FOUND"
    assert state_dir.upload(session.name.id).exists()
    await uploads.expire()
    assert not state_dir.upload(session.name.id).exists()


async def test_a_damaged_chunk_is_refused_and_what_came_before_is_kept(deps: Dependencies) -> None:
    session = await start(deps)

    async def damaged() -> AsyncIterator[Chunk]:
        async for chunk in chunks(session, DATA):
            yield replace(chunk, crc32c=1) if chunk.write_offset == 5000 else chunk

    assert await reason(deps.uploads.write(damaged())) == "CHUNK_CHECKSUM_MISMATCH"
    assert (await deps.uploads.get(session.name)).committed_size == 5000
    done = await deps.uploads.write(chunks(session, DATA, start=5000))
    assert done.state == "FINISHED"


@pytest.mark.parametrize("offset", [1, 4000, -1])
async def test_a_gap_at_the_start_of_a_stream_is_refused(deps: Dependencies, offset: int) -> None:
    session = await start(deps)
    stream = chunks(session, DATA, start=offset)
    assert await reason(deps.uploads.write(stream)) == "WRITE_OFFSET_GAP"


async def test_a_gap_in_the_middle_is_refused(deps: Dependencies) -> None:
    session = await start(deps)

    async def leaky() -> AsyncIterator[Chunk]:
        async for chunk in chunks(session, DATA):
            if chunk.write_offset != 3000:
                yield chunk

    assert await reason(deps.uploads.write(leaky())) == "WRITE_OFFSET_GAP"
    assert (await deps.uploads.get(session.name)).committed_size == 3000


async def test_bytes_with_another_digest_end_the_session(
    deps: Dependencies, state_dir: StateDir
) -> None:
    session = await start(deps)
    stream = chunks(session, DATA[:-1] + b"!")
    assert await reason(deps.uploads.write(stream)) == "BLOB_DIGEST_MISMATCH"
    assert await reason(deps.uploads.get(session.name)) == "RESOURCE_NOT_FOUND"
    assert not list(state_dir.upload("x").parent.iterdir())


async def test_too_few_bytes_end_the_session(deps: Dependencies) -> None:
    session = await start(deps)
    stream = chunks(session, DATA[:-1])
    assert await reason(deps.uploads.write(stream)) == "BLOB_DIGEST_MISMATCH"


async def test_more_bytes_than_announced_are_refused(deps: Dependencies) -> None:
    session = await start(deps)
    stream = chunks(session, DATA + b"more")
    assert await reason(deps.uploads.write(stream)) == "SIZE_EXCEEDED"


async def test_a_chunk_beyond_the_limit_is_refused(deps: Dependencies) -> None:
    data = bytes(deps.config.max_chunk_bytes + 1)
    session = await start(deps, data)
    stream = chunks(session, data, size=len(data))
    assert await reason(deps.uploads.write(stream)) == "CHUNK_TOO_LARGE"


async def test_the_newer_of_two_streams_wins(deps: Dependencies) -> None:
    session = await start(deps)
    go_on = asyncio.Event()

    async def slow() -> AsyncIterator[Chunk]:
        async for chunk in chunks(session, DATA):
            if chunk.write_offset == 6000:
                go_on.set()
                await asyncio.sleep(0.2)
            yield chunk

    older = asyncio.create_task(deps.uploads.write(slow()))
    await go_on.wait()
    committed = (await deps.uploads.get(session.name)).committed_size
    newer = await deps.uploads.write(chunks(session, DATA, start=committed))
    assert newer.writer_epoch == 2
    assert newer.blob is not None
    assert await reason(older) == "UPLOAD_SUPERSEDED"
    assert await read(deps, newer.blob.digest.sha256) == DATA


async def test_finishing_twice_answers_the_same_blob(deps: Dependencies) -> None:
    session = await start(deps)
    first = await deps.uploads.write(chunks(session, DATA))
    second = await deps.uploads.write(chunks(session, DATA))
    assert first.blob == second.blob


async def test_cancelling_an_upload_twice_is_no_error(
    deps: Dependencies, state_dir: StateDir
) -> None:
    session = await start(deps)
    await deps.uploads.write(chunks(session, DATA[:5000], finish=False))
    await deps.uploads.cancel(session.name)
    await deps.uploads.cancel(session.name)
    assert await reason(deps.uploads.get(session.name)) == "RESOURCE_NOT_FOUND"
    assert not state_dir.upload(session.name.id).exists()
    unknown = Name(PROJECT, "uploads", "nothing")
    assert await reason(deps.uploads.cancel(unknown)) == "RESOURCE_NOT_FOUND"


async def test_an_upload_without_room_is_refused(deps: Dependencies) -> None:
    huge = replace(digest(DATA), size_bytes=1 << 60)
    assert await reason(deps.uploads.start(PROJECT, huge)) == "DISK_FULL"


async def test_announcements_that_cannot_be_are_refused(deps: Dependencies) -> None:
    upper = replace(digest(DATA), sha256=digest(DATA).sha256.upper())
    assert await reason(deps.uploads.start(PROJECT, upper)) == "DIGEST_MALFORMED"
    negative = replace(digest(DATA), size_bytes=-1)
    assert await reason(deps.uploads.start(PROJECT, negative)) == "SIZE_INVALID"


async def test_missing_blobs_are_named_in_the_order_asked(deps: Dependencies) -> None:
    here, away = digest(DATA), digest(b"away")
    await upload(deps, DATA)
    assert await deps.blobs.missing(PROJECT, [away, here, away]) == [away, away]
    assert await deps.blobs.missing("other", [here]) == [here]


async def test_ranges_of_a_blob_are_streamed_and_others_refused(deps: Dependencies) -> None:
    sha256 = (await upload(deps, DATA)).sha256
    name = Name(PROJECT, "blobs", sha256)
    pieces = [piece async for piece in blobs.download(deps, name, 100, 50)]
    assert b"".join(piece.data for piece in pieces) == DATA[100:150]
    for offset, limit in [(0, len(DATA) + 1), (len(DATA) + 1, 0), (-1, 0), (0, -1)]:
        stream = blobs.download(deps, name, offset, limit)
        assert await reason(anext(stream)) == "READ_RANGE_INVALID"


async def test_a_blob_in_use_stays(deps: Dependencies) -> None:
    batch = await make_batch(deps)
    name = Name(PROJECT, "blobs", batch.digest.sha256)
    assert await reason(deps.blobs.delete(name)) == "RESOURCE_IN_USE"
    await deps.batches.delete(batch.name)
    await deps.blobs.delete(name)
    assert await reason(deps.blobs.get(name)) == "RESOURCE_NOT_FOUND"
    assert not deps.blobs.path(batch.digest).exists()


async def test_lists_go_through_every_blob_once(deps: Dependencies) -> None:
    for number in range(5):
        await upload(deps, bytes([number]))
    seen, token = [], ""
    while True:
        found, token = await deps.blobs.list_page(PROJECT, PageRequest(size=2, token=token))
        seen += [blob.digest for blob in found]
        if not token:
            break
    assert seen == [digest(bytes([number])) for number in range(5)]


async def test_page_tokens_of_others_are_refused(deps: Dependencies) -> None:
    for number in range(3):
        await upload(deps, bytes([number]))
    _, token = await deps.blobs.list_page(PROJECT, PageRequest(size=1))
    for forged in ("x", token[:-8] + "AAAAAAA="):
        page = PageRequest(token=forged)
        assert await reason(deps.blobs.list_page(PROJECT, page)) == "PAGE_TOKEN_INVALID"
    elsewhere = deps.blobs.list_page("other", PageRequest(token=token))
    assert await reason(elsewhere) == "PAGE_TOKEN_INVALID"
    negative = deps.blobs.list_page(PROJECT, PageRequest(size=-1))
    assert await reason(negative) == "PAGE_SIZE_INVALID"


@pytest.mark.parametrize("name", ["", "x", "projects/default/jobs/1", "projects/A/uploads/1"])
async def test_names_that_cannot_be_are_not_found(name: str) -> None:
    with pytest.raises(ServiceError, match="RESOURCE_NOT_FOUND"):
        parse(name, "uploads")
