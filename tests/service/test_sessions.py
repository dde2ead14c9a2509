"""Vectors go with the client they were made for, and none goes under a running product."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa
from hvp_client import AsyncClient, NotFoundError, Timeout
from hvp_service.app import transport
from hvp_service.app.config import ServerConfig
from hvp_service.app.dependencies import Dependencies, open_dependencies
from hvp_service.app.transport import start_transport
from hvp_service.calls.errors import ServiceError
from hvp_service.calls.names import parse
from hvp_service.calls.paging import PageRequest
from hvp_service.operators import service as operators
from hvp_service.operators.resolver import OperatorRef
from hvp_service.sessions.store import MIN_TTL_S
from hvp_service.storage import database
from hvp_service.storage.database import open_database
from hvp_service.storage.state_dir import StateDir
from hvp_service.storage.troubles import SchemaVersionError
from hvp_service.vectors import service as vectors
from hvp_service.vectors import transfer
from hvp_service.vectors.rows import Vector
from hvp_service.vectors.service import SeededSource

from tests.service.quadratic_backend import QuadraticBackend
from tests.service.world import PROJECT, make_operator, quadratic, upload

GAUSSIAN = SeededSource(seed=3, distribution="DISTRIBUTION_GAUSSIAN")


@pytest.fixture
async def address(deps: Dependencies) -> AsyncIterator[str]:
    server = await start_transport(deps)
    yield server.address
    await server.stop(1.0)


async def make(deps: Dependencies, ref: OperatorRef, session: str = "") -> Vector:
    return await vectors.create(deps, PROJECT, ref.checkpoint, ref.dtype, GAUSSIAN, session)


async def listed(deps: Dependencies) -> list[str]:
    return [str(vector.name) for vector in await _vectors(deps)]


async def becomes(true: Callable[[], Awaitable[bool]]) -> None:
    """Wait for something that happens soon; far longer than it may take."""
    for _ in range(600):
        if await true():
            return
        await asyncio.sleep(0.05)
    raise AssertionError("it did not happen")


async def refusal(work: Awaitable[object]) -> ServiceError:
    with pytest.raises(ServiceError) as caught:
        await work
    return caught.value


async def test_a_with_block_run_twenty_times_leaves_nothing_on_the_ranks(
    deps: Dependencies, backend: QuadraticBackend, address: str
) -> None:
    ref = await make_operator(deps)
    alive = []
    for _ in range(20):
        async with AsyncClient(address) as client:
            H = await client.operator(ref.checkpoint, ref.data_batch, dtype="float64")
            g = await H.gradient()
            v = await H.random_vector(seed=1)
            w = await (H @ v)
            u = await (await H.vector(np.ones(6)) + w)
            alive += [g, v, w, u]  # handles that outlive the block, as those of a script do
    await becomes(lambda: _is(not backend.resident))
    assert await listed(deps) == []
    assert not list(deps.state_dir.vector("x").parent.iterdir())


async def _is(value: bool) -> bool:
    return value


async def test_a_client_that_is_silent_loses_its_vectors_and_makes_new_ones_in_another_session(
    deps: Dependencies, backend: QuadraticBackend, address: str
) -> None:
    ref = await make_operator(deps)
    async with AsyncClient(address, timeout=Timeout(lease_s=1.5)) as client:
        H = await client.operator(ref.checkpoint, ref.data_batch, dtype="float64")
        v = await H.random_vector(seed=1)
        first = await client._session.lease.name()
        await asyncio.sleep(2.0)
        assert await v.norm() > 0  # renewed all the time
        renewal = client._session.lease._renewal
        assert renewal is not None
        renewal.cancel()
        await becomes(lambda: _is(not backend.resident))
        with pytest.raises(NotFoundError, match="Make it again"):
            await v.norm()
        u = await H.random_vector(seed=2)
        assert await client._session.lease.name() != first
        assert await listed(deps) == [u.name]
    assert await listed(deps) == []


async def test_a_client_that_is_forgotten_without_a_close_loses_its_session(
    deps: Dependencies, address: str
) -> None:
    ref = await make_operator(deps)
    client = AsyncClient(address, timeout=Timeout(lease_s=MIN_TTL_S))
    H = await client.operator(ref.checkpoint, ref.data_batch, dtype="float64")
    name = (await H.random_vector(seed=1)).name
    assert await listed(deps) == [name]
    wire = client._session.wire
    del client, H
    gc.collect()
    await becomes(lambda: _empty(deps))
    await wire.close()


async def test_a_client_of_a_server_without_sessions_frees_what_it_no_longer_refers_to(
    deps: Dependencies, backend: QuadraticBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = tuple(entry for entry in transport._SERVICES if entry[1] != "SessionService")
    monkeypatch.setattr(transport, "_SERVICES", older)
    server = await start_transport(deps)
    ref = await make_operator(deps)
    async with AsyncClient(server.address) as client:
        H = await client.operator(ref.checkpoint, ref.data_batch, dtype="float64")
        v = await H.random_vector(seed=1)
        w = await (H @ v)
        assert {vector.session for vector in (await _vectors(deps))} == {None}
        del v
        gc.collect()
    assert await listed(deps) == [w.name]
    await server.stop(1.0)


async def _vectors(deps: Dependencies) -> list[Vector]:
    return (await deps.vectors.list_page(PROJECT, PageRequest()))[0]


async def _empty(deps: Dependencies) -> bool:
    return not await listed(deps)


async def test_a_kept_vector_outlives_its_client_and_the_server(
    deps: Dependencies, config: ServerConfig, state_dir: StateDir, address: str
) -> None:
    ref = await make_operator(deps)
    async with AsyncClient(address) as client:
        H = await client.operator(ref.checkpoint, ref.data_batch, dtype="float64")
        v = await H.random_vector(seed=1, keep=True)
        w = await (H @ v)
        assert not w.durable
        await w.keep()
        values = await v.numpy()
        names = [v.name, w.name]
        del v, w
        gc.collect()
        await H.zeros()  # sends the deletes that are due
    assert sorted(await listed(deps)) == sorted(names)
    await deps.close()
    again = await open_dependencies(config, state_dir, QuadraticBackend())
    try:
        for name, wanted in zip(names, (values, quadratic()["A"] @ values), strict=True):
            vector = await again.vectors.get(parse(name, "vectors"))
            pieces = [p async for p in transfer.read(again, vector.name, 0, 0)]
            np.testing.assert_allclose(np.frombuffer(b"".join(p.data for p in pieces)), wanted)
            await again.vectors.delete(vector.name)
        assert not list(state_dir.vector("x").parent.iterdir())
    finally:
        await again.close()


async def test_a_product_under_way_keeps_its_vectors_and_its_session(
    deps: Dependencies, backend: QuadraticBackend
) -> None:
    ref = await make_operator(deps)
    session = await deps.sessions.create(PROJECT, MIN_TTL_S)
    vector = await make(deps, ref, str(session.name))
    backend.gate.clear()
    call = asyncio.create_task(operators.apply(deps, ref, [str(vector.name)], str(session.name)))
    await asyncio.sleep(2 * MIN_TTL_S)  # nothing is heard of the client but this call
    await deps.sessions.expire()
    assert vector.name.id in backend.resident
    backend.gate.set()
    (product,) = await call
    assert {vector.name.id, product.name.id} <= set(backend.resident)
    await becomes(lambda: _is(not backend.resident))


async def test_a_session_that_ends_under_a_product_frees_its_vectors_after_it(
    deps: Dependencies, backend: QuadraticBackend
) -> None:
    ref = await make_operator(deps)
    session = await deps.sessions.create(PROJECT, None)
    theirs = await make(deps, ref, str(session.name))
    backend.gate.clear()
    call = asyncio.create_task(operators.apply(deps, ref, [str(theirs.name)]))
    doomed = asyncio.create_task(operators.apply(deps, ref, [str(theirs.name)], str(session.name)))
    await asyncio.sleep(0.1)
    await deps.sessions.end(session.name)
    assert (await refusal(deps.vectors.get(theirs.name))).reason == "RESOURCE_NOT_FOUND"
    assert theirs.name.id in backend.resident
    backend.gate.set()
    (ours,) = await call
    assert (await refusal(doomed)).reason == "SESSION_EXPIRED"
    await becomes(lambda: _is(set(backend.resident) == {ours.name.id}))
    assert await listed(deps) == [str(ours.name)]


async def test_a_vector_deleted_under_a_product_leaves_nothing_behind_it(
    deps: Dependencies, backend: QuadraticBackend
) -> None:
    ref = await make_operator(deps)
    vector = await vectors.create(
        deps, PROJECT, ref.checkpoint, "float64", await upload(deps, np.ones(6).tobytes())
    )
    backend.gate.clear()
    call = asyncio.create_task(operators.apply(deps, ref, [str(vector.name)]))
    await asyncio.sleep(0.1)
    await deps.vectors.delete(vector.name)
    assert deps.vectors.file(vector).exists()  # the ranks may need it once more
    backend.gate.set()
    (product,) = await call
    await becomes(lambda: _is(set(backend.resident) == {product.name.id}))
    assert not deps.vectors.file(vector).exists()


async def test_a_vector_without_a_session_goes_when_nobody_has_used_it_for_long(
    config: ServerConfig, state_dir: StateDir
) -> None:
    backend = QuadraticBackend()
    short = config.model_copy(update={"vector_ttl_s": 1.0})
    deps = await open_dependencies(short, state_dir, backend)
    try:
        ref = await make_operator(deps)
        used, unused = await make(deps, ref), await make(deps, ref)
        assert used.lifetime.expire_time is not None
        kept = await make(deps, ref)
        await vectors.keep(deps, kept.name)
        for _ in range(10):
            await vectors.inner_products(deps, [(str(used.name), str(used.name))])
            await asyncio.sleep(0.1)
        await deps.sessions.expire()
        assert await listed(deps) == [str(used.name), str(kept.name)]
        assert unused.name.id not in backend.resident
        await asyncio.sleep(1.1)
        await deps.sessions.expire()
        await becomes(lambda: _is(set(backend.resident) == {kept.name.id}))
    finally:
        await deps.close()


async def test_a_server_that_was_stopped_blames_nobody_for_the_silence(
    deps: Dependencies, config: ServerConfig, state_dir: StateDir
) -> None:
    ref = await make_operator(deps)
    session = await deps.sessions.create(PROJECT, 1.5)
    await asyncio.sleep(0.1)
    vector = await make(deps, ref, str(session.name))
    time.sleep(3.0)  # noqa: ASYNC251  the whole process stands still
    await asyncio.sleep(0.2)
    await deps.sessions.renew(session.name)
    assert await listed(deps) == [str(vector.name)]
    await deps.reaper.stop()
    async with deps.database.writing() as connection:  # as after a night without a server
        await connection.execute(sa.update(database.sessions).values(expire_time=0))
    await deps.close()
    again = await open_dependencies(config, state_dir, QuadraticBackend())
    try:
        await again.sessions.renew(session.name)
        assert await listed(again) == [str(vector.name)]
    finally:
        await again.close()


async def test_sessions_that_are_not_there_are_refused_and_may_be_ended_twice(
    deps: Dependencies, backend: QuadraticBackend
) -> None:
    ref = await make_operator(deps)
    session = await deps.sessions.create(PROJECT, 1e9)
    assert session.ttl_us == int(deps.config.max_session_ttl_s * 1e6)
    name = str(session.name)
    for _ in range(2):
        await deps.sessions.end(session.name)
    strange = str(session.name).replace(PROJECT, "other")
    vector = await make(deps, ref)
    for work, reason in [
        (deps.sessions.renew(session.name), "SESSION_EXPIRED"),
        (make(deps, ref, name), "SESSION_EXPIRED"),
        (operators.compute_gradient(deps, ref, name), "SESSION_EXPIRED"),
        (operators.apply(deps, ref, [str(vector.name)], name), "SESSION_EXPIRED"),
        (make(deps, ref, strange), "RESOURCE_NOT_FOUND"),
        (make(deps, ref, "nonsense"), "RESOURCE_NOT_FOUND"),
        (deps.sessions.create(PROJECT, 0.0), "TTL_INVALID"),
    ]:
        assert (await refusal(work)).reason == reason
    assert set(backend.resident) == {vector.name.id}


async def test_the_folder_of_an_older_server_opens_and_its_vectors_stay(
    config: ServerConfig, state_dir: StateDir
) -> None:
    added = {
        **{
            "requests": ("owner", "lease_expire"),
            "uploads": ("busy_until",),
            "server": ("folder",),
        },
        "vectors": ("session", "expire_time", "kept"),
        "blobs": ("mention_time",),
    }
    deps = await open_dependencies(config, state_dir, QuadraticBackend())
    vector = await make(deps, await make_operator(deps))
    await deps.vectors.retain(vector)
    async with deps.database.writing() as connection:
        await connection.execute(sa.text("DROP TABLE alembic_version"))  # it came later
        await connection.execute(sa.text("DROP TABLE sessions"))
        for table, columns in added.items():
            for column in columns:
                await connection.execute(sa.text(f"ALTER TABLE {table} DROP COLUMN {column}"))
    await deps.close()
    again = await open_dependencies(config, state_dir, QuadraticBackend())
    try:
        found = await again.vectors.get(vector.name)
        assert (found.lifetime.session, found.lifetime.expire_time) == ("", None)
        await make(again, await make_operator(again))
    finally:
        await again.close()


async def test_the_folder_of_a_newer_format_is_refused(tmp_path: Path) -> None:
    rows = await open_database(tmp_path / "rows.db")
    async with rows.writing() as connection:
        await connection.execute(sa.text("DROP TABLE alembic_version"))
        await connection.execute(sa.update(database.server).values(schema_version=99))
    await rows.close()
    with pytest.raises(SchemaVersionError, match="use the server that wrote it"):
        await open_database(tmp_path / "rows.db")
