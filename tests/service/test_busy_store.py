"""Runs whose rows cannot be reached for a while, at any of the moments when they are needed."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncIterator, Callable
from typing import Any, final

import pytest
from hvp_service.app.config import ServerConfig
from hvp_service.app.dependencies import Dependencies, open_dependencies
from hvp_service.calls.names import Name
from hvp_service.calls.paging import PageRequest
from hvp_service.jobs import service as jobs
from hvp_service.jobs.dispatcher import Dispatcher
from hvp_service.jobs.store import Job, JobResult, Lease
from hvp_service.operators.resolver import OperatorRef
from hvp_service.storage import sqlite
from hvp_service.storage.database import Database
from hvp_service.storage.state_dir import StateDir
from hvp_service.storage.troubles import DatabaseBusyError
from hvp_workers.backend import RunProgress

from tests.service.quadratic_backend import QuadraticBackend
from tests.service.world import PROJECT, create_job, make_operator


async def queue(deps: Dependencies, ref: OperatorRef) -> Job:
    """A job with every default."""
    return await create_job(deps, ref)


@final
class BusyOnce:
    """A database whose n-th transaction from now on finds it busy; every other one does its work.

    It takes the place of a store's own, so that whatever a run asks of its rows is counted.
    """

    def __init__(self, real: Database):
        self._real = real
        self.fail_at = 0
        self.calls = 0

    def arm(self, fail_at: int) -> None:
        self.fail_at, self.calls = fail_at, 0

    def _count(self) -> None:
        self.calls += 1
        if self.calls == self.fail_at:
            raise DatabaseBusyError("the test holds it")

    @contextlib.asynccontextmanager
    async def reading(self) -> AsyncIterator[Any]:
        self._count()
        async with self._real.reading() as connection:
            yield connection

    @contextlib.asynccontextmanager
    async def writing(self) -> AsyncIterator[Any]:
        self._count()
        async with self._real.writing() as connection:
            yield connection

    @contextlib.asynccontextmanager
    async def updating(self) -> AsyncIterator[Any]:
        self._count()
        async with self._real.updating() as connection:
            yield connection

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


async def until(deps: Dependencies, wanted: Callable[[Job], bool], name: Name) -> Job:
    """The job as soon as it is as wanted."""
    for _ in range(2000):
        if wanted(job := await deps.jobs.get(name)):
            return job
        await asyncio.sleep(0.01)
    raise AssertionError(f"{job.state}, {job.progress}")


async def end_of(deps: Dependencies, name: Name) -> Job:
    """The job when it has ended, asked of the real rows."""
    while (job := await jobs.wait(deps, name, 10.0)).end_time is None:
        pass
    return job


async def test_a_database_that_is_busy_once_at_any_moment_of_a_run_costs_nothing(
    deps: Dependencies, backend: QuadraticBackend
) -> None:
    ref = await make_operator(deps, n=3)  # few products, few moments
    await deps.dispatcher.stop(1.0)
    busy = BusyOnce(deps.database)
    for store in (deps.jobs, deps.vectors._rows, deps.checkpoints, deps.batches):
        assert isinstance(vars(store)["_database"], Database)
    # The runner has its own way to the same rows; the test looks at them past the fault.
    runner = Dispatcher(
        deps.config,
        _beside(deps.jobs, busy),
        deps.group,
        _operators_beside(deps, busy),
        _vectors_beside(deps, busy),
    )
    runner.start()
    try:
        moments = 0
        while True:
            busy.arm(moments + 1)
            job = await queue(deps, ref)
            runner.notice_work()
            done = await end_of(deps, job.name)
            assert (done.state, done.attempt) == ("SUCCEEDED", 1), (moments, done.error)
            assert done.result is not None
            assert len(done.result.vectors) == 2
            if busy.calls <= moments:
                break
            moments += 1
        assert moments > 10  # a claim, look-ups, each report, the vectors, the end
        assert not backend.resident
    finally:
        await runner.stop(1.0)


def _beside(store: Any, database: Any) -> Any:
    """The same store, its rows reached through another object."""
    twin = object.__new__(type(store))
    vars(twin).update(vars(store) | {"_database": database})
    return twin


def _vectors_beside(deps: Dependencies, database: Any) -> Any:
    twin = object.__new__(type(deps.vectors))
    vars(twin).update(vars(deps.vectors) | {"_rows": _beside(deps.vectors._rows, database)})
    return twin


def _operators_beside(deps: Dependencies, database: Any) -> Any:
    twin = object.__new__(type(deps.operators))
    vars(twin).update(
        vars(deps.operators)
        | {
            "_checkpoints": _beside(deps.checkpoints, database),
            "_batches": _beside(deps.batches, database),
        }
    )
    return twin


async def test_a_lock_held_through_a_run_delays_it_and_ends_nothing(
    config: ServerConfig, state_dir: StateDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = QuadraticBackend()
    deps = await open_dependencies(config, state_dir, backend)
    try:
        ref = await make_operator(deps)
        backend.gate.clear()
        job = await queue(deps, ref)
        await until(deps, lambda found: found.progress is not None, job.name)
        monkeypatch.setattr(sqlite, "_PATIENCE_S", 0.05)
        other = sqlite3.connect(state_dir.database, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        backend.gate.set()
        # Reports fail, and then what follows the last product.
        held = await until(deps, lambda _: backend.num_products == 6, job.name)
        await asyncio.sleep(0.3)
        assert await deps.jobs.get(job.name) == held
        assert held.state == "RUNNING"
        other.execute("ROLLBACK")
        other.close()
        done = await end_of(deps, job.name)
        assert (done.state, done.attempt) == ("SUCCEEDED", 1)
    finally:
        await deps.close()


async def test_progress_that_cannot_be_stored_for_any_reason_does_not_end_a_run(
    deps: Dependencies, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref = await make_operator(deps)
    report, failures = deps.jobs.report, [OSError("no space"), KeyError("anything")]

    async def fail(lease: Lease, progress: RunProgress) -> None:
        if failures:
            raise failures.pop()
        await report(lease, progress)

    monkeypatch.setattr(deps.jobs, "report", fail)
    done = await end_of(deps, (await queue(deps, ref)).name)
    assert (done.state, done.attempt) == ("SUCCEEDED", 1)


async def test_a_result_that_no_row_can_hold_fails_its_job_and_leaves_no_eigenvector(
    deps: Dependencies, backend: QuadraticBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref = await make_operator(deps)
    store = deps.jobs
    finish = store.finish

    async def picky(lease: Lease, end: Any) -> Job:
        if isinstance(end, JobResult):
            raise TypeError("not JSON")
        return await finish(lease, end)

    monkeypatch.setattr(store, "finish", picky)
    done = await end_of(deps, (await queue(deps, ref)).name)
    assert done.error is not None
    assert (done.state, done.error.reason) == ("FAILED", "INTERNAL")
    assert str(done.name) in done.error.message
    assert (await deps.vectors.list_page(PROJECT, PageRequest()))[0] == []
    assert not backend.resident


async def test_a_call_whose_answer_cannot_be_remembered_is_answered_and_has_its_effect_once(
    deps: Dependencies,
) -> None:
    busy = BusyOnce(deps.database)
    request_log = _beside(deps.request_log, busy)
    effects: list[int] = []

    async def respond() -> bytes:
        effects.append(1)
        return b"answer"

    busy.arm(2)  # after the look-up
    assert await request_log.once((PROJECT, "Method", "id"), b"payload", respond) == b"answer"
    assert (busy.calls, effects) == (2, [1])
