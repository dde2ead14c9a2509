"""Two servers on one database and one folder: what each may rely on while the other works."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any, final

import pytest
import sqlalchemy as sa
from hvp_service.app.config import ServerConfig
from hvp_service.app.dependencies import Dependencies, open_dependencies
from hvp_service.calls.errors import ServiceError
from hvp_service.calls.names import Name, parse
from hvp_service.calls.paging import Pager, PageRequest
from hvp_service.jobs import service as jobs
from hvp_service.jobs.sql_store import SqlJobStore
from hvp_service.jobs.store import Job, JobStore, Lease, StaleLeaseError, StateChange
from hvp_service.operators import service as operators
from hvp_service.storage import database as rows
from hvp_service.storage.database import Database, open_database
from hvp_service.storage.state_dir import StateDirectoryBusyError, shared_use, sole_use
from hvp_service.storage.troubles import DatabaseRefusedError
from hvp_service.vectors import service as vectors
from pydantic import SecretStr

from tests.modules.postgres import Server
from tests.service.quadratic_backend import QuadraticBackend
from tests.service.test_job_store import ERROR, PROGRESS, RESULT, job
from tests.service.test_uploads import DATA, read
from tests.service.world import PROJECT, chunks, create_job, digest, make_operator

LEASE_S = 60.0


@final
class Gated:
    """A database whose transactions of `updating` wait before they end."""

    def __init__(self, real: Database):
        self._real = real
        self.inside = asyncio.Event()
        self.leave = asyncio.Event()

    @contextlib.asynccontextmanager
    async def updating(self) -> AsyncIterator[Any]:
        async with self._real.updating() as connection:
            yield connection
            self.inside.set()
            await self.leave.wait()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


@pytest.fixture
async def databases(where: Path | SecretStr) -> AsyncIterator[list[Database]]:
    """The same database, opened by two servers."""
    opened = [await open_database(where) for _ in range(2)]
    yield opened
    for database in opened:
        await database.close()


def store(database: Any, owner: str, lease_s: float = LEASE_S) -> JobStore:
    return SqlJobStore(database, Pager(b"key"), owner=owner, lease_s=lease_s)


@pytest.fixture
def stores(databases: list[Database]) -> list[JobStore]:
    return [store(database, f"server {number}") for number, database in enumerate(databases)]


async def run_out(database: Database) -> None:
    """Let the lease of every job run out."""
    async with database.updating() as connection:
        await connection.execute(sa.update(rows.jobs).values(lease_expire=1))


async def claimed_by(store: JobStore) -> Job:
    claimed = await store.claim()
    assert claimed is not None
    return claimed


async def test_many_claims_by_two_servers_give_each_job_to_one(stores: list[JobStore]) -> None:
    names = [f"j{number}" for number in range(12)]
    for number, name in enumerate(names):
        await stores[number % 2].create(job(name, time=number), 100)

    async def work(store: JobStore) -> list[tuple[str, int]]:
        done = []
        while (claimed := await store.claim()) is not None:
            done.append((claimed.name.id, claimed.attempt))
            await store.report(claimed.lease, PROGRESS)
            await store.finish(claimed.lease, RESULT)
        return done

    done = await asyncio.gather(*(work(store) for store in stores * 3))
    assert sorted(name for some in done for name, _ in some) == sorted(names)
    assert {attempt for some in done for _, attempt in some} == {1}
    for name in names:
        events = await stores[0].events_after(Name("p", "jobs", name), 0, 0)
        assert [event.sequence for event in events] == [1, 2, 3, 4]


WRITES: dict[str, Callable[[JobStore, Lease], Coroutine[Any, Any, Any]]] = {
    "renew": lambda store, lease: store.renew(lease),
    "report": lambda store, lease: store.report(lease, PROGRESS),
    "finish": lambda store, lease: store.finish(lease, RESULT),
    "fail": lambda store, lease: store.finish(lease, ERROR),
    "give_back": lambda store, lease: store.give_back(lease),
}


@pytest.mark.parametrize("write", WRITES)
async def test_a_runner_whose_job_is_being_taken_over_changes_nothing(
    databases: list[Database], write: str
) -> None:
    old = store(databases[0], "old")
    await old.create(job(), 10)
    first = await claimed_by(old)
    await run_out(databases[0])
    gated = Gated(databases[1])
    taking = asyncio.create_task(store(gated, "new").claim())  # the row is taken, not committed
    await gated.inside.wait()
    writing = asyncio.create_task(WRITES[write](old, first.lease))
    await asyncio.sleep(0.05)
    assert not writing.done()
    gated.leave.set()
    second = await taking
    assert second is not None
    with pytest.raises(StaleLeaseError):
        await writing
    found = await old.get(first.name)
    assert (found.state, found.attempt, found.result) == ("RUNNING", 2, None)
    assert (await store(databases[1], "new").finish(second.lease, RESULT)).result == RESULT


async def test_a_job_whose_runner_writes_at_the_last_moment_is_not_taken_over(
    databases: list[Database],
) -> None:
    await store(databases[0], "old").create(job(), 10)
    first = await claimed_by(store(databases[0], "old"))
    await run_out(databases[0])
    gated = Gated(databases[0])
    reporting = asyncio.create_task(store(gated, "old").report(first.lease, PROGRESS))
    await gated.inside.wait()
    taking = asyncio.create_task(store(databases[1], "new").claim())
    await asyncio.sleep(0.05)
    gated.leave.set()
    await reporting
    assert await taking is None
    assert await store(databases[1], "new").claim() is None
    assert (await store(databases[0], "old").finish(first.lease, RESULT)).attempt == 1


async def test_a_job_that_two_servers_are_asked_for_at_once_is_made_once(
    stores: list[JobStore],
) -> None:
    made = await asyncio.gather(*(store.create(job(), 100) for store in stores * 4))
    assert len({each.last_sequence for each in made}) == 1
    assert len(await stores[0].events_after(made[0].name, 0, 0)) == 1


async def test_a_queue_of_two_servers_has_one_length(stores: list[JobStore]) -> None:
    asked = [stores[n % 2].create(job(f"j{n}"), 3) for n in range(8)]
    outcomes = await asyncio.gather(*asked, return_exceptions=True)
    assert [getattr(each, "reason", "") for each in outcomes].count("QUEUE_FULL") == 5


@pytest.fixture
async def pair(
    config: ServerConfig, postgres: Server
) -> AsyncIterator[tuple[list[Dependencies], list[QuadraticBackend]]]:
    """Two whole servers without sockets, and their ranks."""
    config = config.model_copy(
        update={"database_url": SecretStr(await postgres.emptied()), "lease_s": 30.0}
    )
    backends = [QuadraticBackend(), QuadraticBackend()]
    async with contextlib.AsyncExitStack() as stack:
        servers = []
        for backend in backends:
            state_dir = stack.enter_context(shared_use(config.state_dir))
            deps = await open_dependencies(config, state_dir, backend)
            stack.push_async_callback(deps.close)
            servers.append(deps)
        yield servers, backends


Pair = tuple[list[Dependencies], list[QuadraticBackend]]


async def idle(deps: Dependencies) -> None:
    """Let a server run no jobs."""
    await deps.dispatcher.stop(1.0)


async def until(
    deps: Dependencies, name: Name, state: str, also: Callable[[Job], bool] = lambda _: True
) -> Job:
    for _ in range(1000):
        found = await deps.jobs.get(name)
        if found.state == state and also(found):
            return found
        await asyncio.sleep(0.01)
    raise AssertionError(f"{found.state}, not {state}: {found}")


async def test_a_job_is_run_followed_and_waited_for_through_any_server(pair: Pair) -> None:
    (first, second), backends = pair
    await idle(first)
    ref = await make_operator(first)
    queued = await create_job(first, ref)  # and the other one hears of it
    watched = [event async for event in jobs.watch(first, queued.name, 0) if event is not None]
    assert isinstance(watched[-1].body, StateChange)
    assert watched[-1].body.state == "SUCCEEDED"
    assert [event.sequence for event in watched] == list(range(1, len(watched) + 1))
    done = await jobs.wait(first, queued.name, 10.0)
    assert done == await jobs.wait(second, queued.name, 10.0)
    assert done.result is not None
    assert (backends[0].num_products, backends[1].num_products > 0) == (0, True)
    for deps in (first, second):  # the vectors lie in the folder of both
        (name, _) = done.result.vectors
        assert await vectors.inner_products(deps, [(name, name)]) == [pytest.approx(1.0)]


async def test_a_job_is_cancelled_through_a_server_that_does_not_run_it(pair: Pair) -> None:
    (first, second), (backend, _) = pair
    await idle(second)
    backend.gate.clear()
    running = await create_job(first, await make_operator(first))
    await until(second, running.name, "RUNNING")
    assert (await jobs.cancel(second, running.name)).state == "CANCELLING"
    waiting = asyncio.create_task(jobs.wait(second, running.name, 30.0))
    backend.gate.set()
    assert (await waiting).state == "CANCELLED"
    assert backend.num_products < 6
    assert (await second.vectors.list_page(PROJECT, PageRequest()))[0] == []


async def test_a_runner_that_was_away_leaves_what_the_next_attempt_has_made(pair: Pair) -> None:
    (first, second), (backend, other) = pair
    backend.gate.clear()
    await idle(second)
    ref = await make_operator(first)
    running = await create_job(first, ref)
    await until(first, running.name, "RUNNING", lambda found: found.progress is not None)
    await run_out(first.database)
    again = type(second.dispatcher)(
        second.config, second.jobs, second.group, second.operators, second.vectors
    )
    again.start()
    try:
        done = await until(second, running.name, "SUCCEEDED")
        assert done.attempt == 2
        assert done.result is not None
        backend.gate.set()  # the first runner goes on, and finds that it is not its job any more
        for _ in range(500):
            if not backend.resident and first.dispatcher._running is None:
                break
            await asyncio.sleep(0.01)
        assert await first.jobs.get(running.name) == done
        left, _ = await first.vectors.list_page(PROJECT, PageRequest())
        assert {str(vector.name) for vector in left} == set(done.result.vectors)
        files = {path.stem for path in first.state_dir.vector("x").parent.iterdir()}
        assert files == {parse(name, "vectors").id for name in done.result.vectors}
        assert other.num_products > 0
        for value, name in zip((1.0, 6.0), done.result.vectors, strict=True):
            (product,) = await operators.apply(first, ref, [name])
            assert await vectors.inner_products(first, [(name, str(product.name))]) == [
                pytest.approx(value)
            ]
    finally:
        await again.stop(1.0)


async def test_a_product_that_a_job_names_reaches_the_ranks_of_the_server_that_runs_it(
    pair: Pair,
) -> None:
    (first, second), (_, other) = pair
    await idle(first)
    ref = await make_operator(first)
    seed = vectors.SeededSource(seed=1, distribution="DISTRIBUTION_GAUSSIAN")
    made = await vectors.create(first, PROJECT, ref.checkpoint, "float64", seed)
    (product,) = await operators.apply(first, ref, [str(made.name)])
    asked = await create_job(first, ref, operation="solve", b=(str(product.name),), damping=1.0)
    done = await jobs.wait(second, asked.name, 30.0)
    assert done.state == "SUCCEEDED", done.error
    assert other.asked


async def test_a_session_that_a_call_of_one_server_uses_is_not_ended_by_another(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    (first, second), _ = pair
    monkeypatch.setattr("hvp_service.sessions.store.MIN_TTL_S", 0.4)
    session = await first.sessions.create(PROJECT, 0.4)
    async with first.sessions.using(PROJECT, str(session.name)):
        await asyncio.sleep(1.0)
        await second.sessions.expire()
        await first.sessions.renew(session.name)
    await asyncio.sleep(0.5)
    await second.sessions.expire()
    with pytest.raises(ServiceError, match="SESSION_EXPIRED"):
        await first.sessions.renew(session.name)


async def test_a_vector_that_is_deleted_at_one_server_leaves_the_ranks_of_the_other(
    pair: Pair,
) -> None:
    (first, second), (backend, _) = pair
    ref = await make_operator(first)
    seed = vectors.SeededSource(seed=1, distribution="DISTRIBUTION_GAUSSIAN")
    made = await vectors.create(first, PROJECT, ref.checkpoint, "float64", seed)
    await operators.apply(first, ref, [str(made.name)])
    assert made.name.id in backend.resident
    await second.vectors.delete(made.name)
    await first.vectors.collect()
    for _ in range(200):
        if made.name.id not in backend.resident:
            break
        await asyncio.sleep(0.01)
    assert made.name.id not in backend.resident


def once(deps: Dependencies, payload: bytes, respond: Any) -> Any:
    return deps.request_log.once((PROJECT, "Method", "id"), payload, respond)


async def test_the_same_call_at_two_servers_has_one_effect_and_one_answer(pair: Pair) -> None:
    servers, _ = pair
    effects: list[int] = []
    gate = asyncio.Event()

    async def respond() -> bytes:
        effects.append(1)
        await gate.wait()
        return b"answer %d" % len(effects)

    calls = [asyncio.create_task(once(deps, b"same", respond)) for deps in servers * 3]
    for _ in range(200):
        if effects:
            break
        await asyncio.sleep(0.01)
    with pytest.raises(ServiceError, match="REQUEST_ID_REUSED"):
        await once(servers[0], b"other", respond)
    with pytest.raises(ServiceError, match="REQUEST_ID_REUSED"):
        await once(servers[1], b"other", respond)
    with pytest.raises(ServiceError, match="REQUEST_ID_INVALID"):  # no database keeps such a text
        await servers[0].request_log.once((PROJECT, "Method", "i\0d"), b"other", respond)
    gate.set()
    assert await asyncio.gather(*calls) == [b"answer 1"] * 6
    assert await once(servers[1], b"same", respond) == b"answer 1"
    assert effects == [1]


async def test_a_call_that_failed_or_whose_server_died_is_done_by_the_next_one(pair: Pair) -> None:
    (first, second), _ = pair
    tries: list[str] = []

    def respond(name: str, error: Exception | None = None) -> Any:
        async def work() -> bytes:
            tries.append(name)
            if error:
                raise error
            return name.encode()

        return work

    with pytest.raises(ServiceError, match="QUEUE_FULL"):
        await once(first, b"p", respond("failed", ServiceError("QUEUE_FULL", "full")))
    never = asyncio.Event()
    dead = asyncio.create_task(once(first, b"p", never.wait))
    for _ in range(200):
        async with first.database.reading() as connection:
            if (await connection.execute(sa.select(rows.requests))).first() is not None:
                break
        await asyncio.sleep(0.01)
    waiting = asyncio.create_task(once(second, b"p", respond("next")))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    async with first.database.updating() as connection:
        await connection.execute(sa.update(rows.requests).values(lease_expire=1))
    assert await waiting == b"next"
    dead.cancel()  # and takes nothing of the answer with it
    await asyncio.wait([dead])
    assert await once(first, b"p", respond("later")) == b"next"
    assert tries == ["failed", "next"]


async def test_the_newer_stream_of_an_upload_wins_on_whatever_server_it_is(pair: Pair) -> None:
    (first, second), _ = pair
    upload = await first.uploads.start(PROJECT, digest(DATA))
    sent, go_on = asyncio.Event(), asyncio.Event()

    async def older() -> AsyncIterator[Any]:
        async for chunk in chunks(upload, b"X" * len(DATA)):  # other bytes at that
            yield chunk
            if chunk.write_offset == 8000:
                sent.set()
                await go_on.wait()

    writing = asyncio.create_task(first.uploads.write(older()))
    await sent.wait()
    # One that asks for the same bytes now is not sent into the other one's way.
    assert (await second.uploads.start(PROJECT, digest(DATA))).name != upload.name
    async with first.database.updating() as connection:
        await connection.execute(sa.update(rows.uploads).values(committed_size=0))
    done = await second.uploads.write(chunks(upload, DATA))
    go_on.set()
    with pytest.raises(ServiceError, match="UPLOAD_SUPERSEDED"):
        await writing
    assert done.blob is not None
    assert await read(first, done.blob.digest.sha256) == DATA
    assert await read(second, done.blob.digest.sha256) == DATA


async def test_an_upload_goes_on_at_another_server_and_is_given_up_there(pair: Pair) -> None:
    (first, second), _ = pair
    upload = await first.uploads.start(PROJECT, digest(DATA))
    half = DATA[:12000]
    await first.uploads.write(chunks(upload, half, finish=False))
    found = await second.uploads.get(upload.name)
    assert found.committed_size == len(half)
    rest = chunks(upload, DATA, start=len(half))
    assert (await second.uploads.write(rest)).blob is not None
    other = await first.uploads.start(PROJECT, digest(DATA[1:]))
    await first.uploads.write(chunks(other, DATA[1:5000], finish=False))
    await second.uploads.cancel(other.name)
    with pytest.raises(ServiceError, match="RESOURCE_NOT_FOUND"):
        await first.uploads.get(other.name)


async def test_two_servers_make_one_checkpoint_of_the_same_files_at_once(pair: Pair) -> None:
    servers, _ = pair
    made = await asyncio.gather(*(make_operator(deps) for deps in servers))
    assert made[0] == made[1]


async def test_a_folder_without_the_databases_files_is_refused(pair: Pair, tmp_path: Path) -> None:
    (first, _), _ = pair
    refused = pytest.raises(DatabaseRefusedError, match="same --state-dir")
    with shared_use(tmp_path / "other") as other, refused:
        await open_dependencies(first.config, other, QuadraticBackend())


def test_a_folder_is_of_one_server_or_of_those_of_a_database(tmp_path: Path) -> None:
    with shared_use(tmp_path) as one, shared_use(tmp_path) as two:
        assert one.root == two.root
        assert one.alone_in != two.alone_in
        assert one.identity() == two.identity()
        with pytest.raises(StateDirectoryBusyError, match="--database-url"), sole_use(tmp_path):
            pass
    with sole_use(tmp_path), pytest.raises(StateDirectoryBusyError), shared_use(tmp_path):
        pass
    with shared_use(tmp_path) as again:
        assert again.alone_in == one.alone_in  # whose notes tell what the dead server left
