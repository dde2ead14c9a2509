"""The contract of job stores, kept by every implementation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import sqlalchemy as sa
from hvp_operations.checking import Seed
from hvp_operations.eigsh import EigshProgress, EigshResult, EigshSpec
from hvp_service.calls.errors import ServiceError
from hvp_service.calls.names import Name
from hvp_service.calls.paging import Pager, PageRequest
from hvp_service.jobs.sql_store import SqlJobStore
from hvp_service.jobs.store import (
    Job,
    JobError,
    JobEvent,
    JobResult,
    JobSpec,
    JobState,
    JobStore,
    StaleLeaseError,
    StateChange,
)
from hvp_service.operators.resolver import OperatorRef
from hvp_service.storage.clock import now_us
from hvp_service.storage.database import jobs, open_database
from hvp_workers.backend import RunProgress
from pydantic import SecretStr

SPEC = JobSpec(
    operation="eigsh",
    operator=OperatorRef(checkpoint="c", data_batch="b", kind="KIND_HESSIAN", dtype="float32"),
    spec=EigshSpec(k=2, which="BE", tol=1e-3, seed=Seed(2**64 - 1)),
)
PROGRESS = RunProgress(
    operation="eigsh",
    stage="iterating",
    num_products=3,
    max_products=9,
    detail=EigshProgress(ritz_values=(1.0, 2.5)),
)
ERROR = JobError(code=13, reason="INTERNAL", message="no", metadata={"a": "b"})
RESULT = JobResult(
    result=EigshResult(
        eigenvalues=(1.0, 2.0),
        residuals=(0.0, 1e-9),
        num_products=9,
        outcome="CONVERGED",
        symmetry_defect=0.0,
        ritz_values=(1.0,),
        ritz_weights=(1.0,),
        loss=3.0,
        provenance={"seed": "1"},
    ),
    vectors=("v1", "v2"),
    num_elements=5,
    vector_time=7,
)

Open = Callable[[str, float], JobStore]


@pytest.fixture
async def open_store(where: Path | SecretStr) -> AsyncIterator[Open]:
    """Opens the same store as another server, with its name and lease."""
    database = await open_database(where)
    pager = Pager(database.page_token_key)
    yield lambda owner, lease_s: SqlJobStore(database, pager, owner=owner, lease_s=lease_s)
    await database.close()


@pytest.fixture
def store(open_store: Open) -> JobStore:
    return open_store("first", 60.0)


def job(identifier: str = "j1", project: str = "p", time: int | None = None) -> Job:
    return Job(
        name=Name(project, "jobs", identifier),
        spec=SPEC,
        labels={"who": "me"},
        max_attempts=2,
        create_time=now_us() if time is None else time,
    )


async def queue(store: JobStore, *identifiers: str) -> list[Job]:
    return [
        await store.create(job(identifier, time=index), 100)
        for index, identifier in enumerate(identifiers)
    ]


async def claim(store: JobStore) -> Job:
    claimed = await store.claim()
    assert claimed is not None
    return claimed


async def expire(where: Path | SecretStr) -> None:
    """Let every lease run out."""
    database = await open_database(where)
    async with database.updating() as connection:
        await connection.execute(sa.update(jobs).values(lease_expire=1))
    await database.close()


async def states(store: JobStore, name: Name) -> list[str]:
    events = await store.events_after(name, 0, 0)
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    return [event.body.state for event in events if isinstance(event.body, StateChange)]


async def test_a_job_comes_back_as_it_was_put_in(store: JobStore) -> None:
    (made,) = await queue(store, "j1")
    assert made.state == "QUEUED"
    assert made == await store.get(made.name)
    assert made.spec == SPEC
    assert made.labels == {"who": "me"}


async def test_creating_a_job_twice_makes_one(store: JobStore) -> None:
    (made,) = await queue(store, "j1")
    other = replace(SPEC, spec=EigshSpec(k=1))
    assert await store.create(replace(job("j1"), spec=other), 100) == made
    assert await states(store, made.name) == ["QUEUED"]


async def test_a_full_queue_refuses(store: JobStore) -> None:
    await store.create(job("j1"), 1)
    with pytest.raises(ServiceError, match="QUEUE_FULL"):
        await store.create(job("j2"), 1)


async def test_jobs_are_claimed_oldest_first_and_once(store: JobStore) -> None:
    await queue(store, "b", "a")
    claims = await asyncio.gather(*(store.claim() for _ in range(4)))
    assert sorted(c.name.id for c in claims if c) == ["a", "b"]
    assert [c.attempt for c in claims if c] == [1, 1]
    assert next(c.name.id for c in claims if c) == "b"


async def test_a_finished_job_holds_its_result(store: JobStore) -> None:
    await queue(store, "j1")
    claimed = await claim(store)
    await store.report(claimed.lease, PROGRESS)
    done = await store.finish(claimed.lease, RESULT)
    assert (done.state, done.result, done.progress) == ("SUCCEEDED", RESULT, PROGRESS)
    assert done.end_time is not None
    assert await states(store, done.name) == ["QUEUED", "RUNNING", "SUCCEEDED"]
    events = await store.events_after(done.name, 0, 0)
    assert [event.body for event in events if isinstance(event.body, RunProgress)] == [PROGRESS]
    assert await store.events_after(done.name, 3, 0) == events[3:]


async def test_a_failed_job_holds_its_error_and_so_does_the_event(store: JobStore) -> None:
    await queue(store, "j1")
    done = await store.finish((await claim(store)).lease, ERROR)
    assert (done.state, done.error) == ("FAILED", ERROR)
    last = (await store.events_after(done.name, 0, 0))[-1].body
    assert last == StateChange(state="FAILED", attempt=1, error=ERROR)


async def test_a_final_state_never_changes(store: JobStore) -> None:
    await queue(store, "j1")
    claimed = await claim(store)
    done = await store.finish(claimed.lease, RESULT)
    for write in (
        store.report(claimed.lease, PROGRESS),
        store.renew(claimed.lease),
        store.finish(claimed.lease, None),
        store.give_back(claimed.lease),
    ):
        with pytest.raises(StaleLeaseError):
            await write
    assert await store.cancel(done.name) == done
    assert await store.recover() == []
    assert await store.claim() is None
    assert await store.get(done.name) == done


async def test_an_older_attempt_cannot_write(store: JobStore) -> None:
    await queue(store, "j1")
    first = await claim(store)
    await store.give_back(first.lease)
    second = await claim(store)
    assert (first.attempt, second.attempt) == (1, 2)
    with pytest.raises(StaleLeaseError):
        await store.report(first.lease, PROGRESS)
    await store.report(second.lease, PROGRESS)


async def test_another_servers_attempt_cannot_be_written(open_store: Open) -> None:
    first, second = open_store("first", 60.0), open_store("second", 60.0)
    await queue(first, "j1")
    claimed = await claim(first)
    with pytest.raises(StaleLeaseError):
        await second.report(claimed.lease, PROGRESS)


async def test_a_lease_that_ran_out_may_be_claimed_and_a_renewed_one_not(
    store: JobStore, where: Path | SecretStr
) -> None:
    await queue(store, "j1")
    first = await claim(store)
    await expire(where)
    second = await claim(store)
    assert second.attempt == 2
    with pytest.raises(StaleLeaseError):
        await store.renew(first.lease)
    await expire(where)
    await store.renew(second.lease)
    assert await store.claim() is None


async def test_a_lease_runs_out_by_itself(open_store: Open) -> None:
    hasty = open_store("first", 0.05)
    await queue(hasty, "j1")
    await claim(hasty)
    await asyncio.sleep(0.06)
    assert (await claim(hasty)).attempt == 2


async def test_a_list_leaves_results_out(store: JobStore) -> None:
    await queue(store, "j1")
    done = await store.finish((await claim(store)).lease, RESULT)
    (listed,), _ = await store.list_page("p", [], PageRequest())
    assert done.result == RESULT
    assert listed == replace(done, result=None)


async def test_a_list_leaves_the_arrays_of_progress_out(store: JobStore) -> None:
    await queue(store, "j1")
    claimed = await claim(store)
    await store.report(claimed.lease, PROGRESS)
    (listed,), _ = await store.list_page("p", [], PageRequest())
    assert (await store.get(claimed.name)).progress == PROGRESS
    assert listed.progress == replace(PROGRESS, detail=None)


async def test_a_lease_that_ran_out_is_settled_like_the_job_of_a_dead_server(
    store: JobStore, where: Path | SecretStr
) -> None:
    await queue(store, "spent", "stopping")
    for _ in range(2):
        spent = await claim(store)
        stopping = await claim(store)
        assert (spent.name.id, stopping.name.id) == ("spent", "stopping")
        if spent.attempt < spent.max_attempts:
            await store.give_back(spent.lease)
            await store.give_back(stopping.lease)
    await store.cancel(stopping.name)
    await expire(where)
    assert await store.claim() is None
    failed = await store.get(spent.name)
    assert failed.state == "FAILED"
    assert failed.error is not None
    assert failed.error.reason == "ATTEMPTS_EXHAUSTED"
    assert (await store.get(stopping.name)).state == "CANCELLED"


async def test_a_queued_job_is_cancelled_at_once(store: JobStore) -> None:
    (made,) = await queue(store, "j1")
    assert (await store.cancel(made.name)).state == "CANCELLED"
    assert (await store.cancel(made.name)).state == "CANCELLED"
    assert await states(store, made.name) == ["QUEUED", "CANCELLED"]
    assert await store.claim() is None


async def test_a_running_job_is_cancelled_by_its_runner(store: JobStore) -> None:
    await queue(store, "j1")
    claimed = await claim(store)
    assert (await store.cancel(claimed.name)).state == "CANCELLING"
    assert (await store.cancel(claimed.name)).state == "CANCELLING"
    await store.report(claimed.lease, PROGRESS)
    assert (await store.finish(claimed.lease, None)).state == "CANCELLED"
    assert await states(store, claimed.name) == ["QUEUED", "RUNNING", "CANCELLING", "CANCELLED"]


async def test_a_job_given_back_while_it_is_cancelled_is_cancelled(store: JobStore) -> None:
    await queue(store, "j1")
    claimed = await claim(store)
    await store.cancel(claimed.name)
    assert (await store.give_back(claimed.lease)).state == "CANCELLED"


async def test_a_job_given_back_keeps_its_place(store: JobStore) -> None:
    await queue(store, "j1", "j2")
    await store.give_back((await claim(store)).lease)
    assert (await claim(store)).name.id == "j1"


async def test_an_attempt_that_is_cut_short_does_not_count_and_cannot_write_any_more(
    open_store: Open,
) -> None:
    for number in range(5):
        server = open_store(f"server {number}", 60.0)
        if number == 0:
            await queue(server, "j1")
        claimed = await claim(server)
        assert claimed.attempt == 1
        given_back = await server.give_back(claimed.lease, counted=False)
        assert (given_back.state, given_back.attempt) == ("QUEUED", 0)
        with pytest.raises(StaleLeaseError):
            await server.report(claimed.lease, PROGRESS)
    last = open_store("last", 60.0)
    again = await claim(last)
    with pytest.raises(StaleLeaseError):  # of the same number, and another server's
        await server.report(again.lease, PROGRESS)
    assert (await last.give_back(again.lease)).attempt == 1


async def test_a_new_server_settles_what_a_dead_one_ran(
    open_store: Open, where: Path | SecretStr
) -> None:
    is_shared = isinstance(where, SecretStr)
    dead = open_store("dead", 60.0)
    await queue(dead, "again", "spent", "stopping", "waiting", "done")
    again = await claim(dead)
    spent = await claim(dead)
    await dead.give_back(spent.lease)
    await claim(dead)
    stopping = await claim(dead)
    await dead.cancel(stopping.name)
    await dead.cancel(Name("p", "jobs", "done"))
    living = open_store("living", 60.0)
    await living.recover()
    if is_shared:  # the other one may live: its leases tell
        for running in (again.name, spent.name, stopping.name):
            assert (await living.get(running)).state in ("RUNNING", "CANCELLING")
        await expire(where)
        await living.recover()
    found = {j.name.id: j for j in (await living.list_page("p", [], PageRequest()))[0]}
    assert {name: j.state for name, j in found.items()} == {
        "again": "QUEUED",
        "spent": "FAILED",
        "stopping": "CANCELLED",
        "waiting": "QUEUED",
        "done": "CANCELLED",
    }
    error = found["spent"].error
    assert error is not None
    assert error.reason == "ATTEMPTS_EXHAUSTED"
    assert (await claim(living)).attempt == again.attempt + 1
    with pytest.raises(StaleLeaseError):
        await dead.report(again.lease, PROGRESS)


async def test_a_watcher_wakes_at_the_next_event_and_misses_none(store: JobStore) -> None:
    (made,) = await queue(store, "j1")
    seen: list[JobEvent] = []

    async def watch() -> None:
        while not seen or getattr(seen[-1].body, "state", "") != "CANCELLED":
            seen.extend(await store.events_after(made.name, seen[-1].sequence if seen else 0, 5.0))

    watchers = asyncio.gather(watch())
    await asyncio.sleep(0.02)
    claimed = await claim(store)
    for number in range(5):
        await store.report(claimed.lease, replace(PROGRESS, num_products=number))
        await asyncio.sleep(0.001 * number)
    await store.finish(claimed.lease, None)
    await asyncio.wait_for(watchers, 5.0)
    assert [event.sequence for event in seen] == list(range(1, len(seen) + 1))
    assert len(seen) == 8


async def test_waiting_for_events_ends_with_the_time(store: JobStore) -> None:
    (made,) = await queue(store, "j1")
    assert await store.events_after(made.name, 1, 0.01) == []
    with pytest.raises(ServiceError, match="RESOURCE_NOT_FOUND"):
        await store.events_after(Name("p", "jobs", "none"), 0, 0.01)


async def test_lists_are_newest_first_and_keep_to_the_filter(store: JobStore) -> None:
    await queue(store, "a", "b", "c", "d")
    await store.cancel(Name("p", "jobs", "b"))
    await store.create(job("elsewhere", project="q"), 100)

    async def listed(wanted: list[JobState], size: int) -> list[str]:
        found, token = await store.list_page("p", wanted, PageRequest(size=size))
        names = [j.name.id for j in found]
        while token:
            found, token = await store.list_page("p", wanted, PageRequest(size=size, token=token))
            names += [j.name.id for j in found]
        return names

    assert await listed([], 3) == ["d", "c", "b", "a"]
    assert await listed(["QUEUED"], 2) == ["d", "c", "a"]
    assert await listed(["CANCELLED", "FAILED"], 0) == ["b"]
    _, token = await store.list_page("p", ["QUEUED"], PageRequest(size=1))
    with pytest.raises(ServiceError, match="PAGE_TOKEN_INVALID"):
        await store.list_page("p", [], PageRequest(token=token))
    assert len(await store.unfinished("p")) == 3


async def test_only_ended_jobs_are_deleted(store: JobStore) -> None:
    (made,) = await queue(store, "j1")
    with pytest.raises(ServiceError, match="JOB_NOT_ENDED"):
        await store.delete(made.name)
    await store.cancel(made.name)
    await store.delete(made.name)
    with pytest.raises(ServiceError, match="RESOURCE_NOT_FOUND"):
        await store.get(made.name)
    with pytest.raises(ServiceError, match="RESOURCE_NOT_FOUND"):
        await store.delete(made.name)


async def test_events_come_in_pages_and_none_is_left_out(store: JobStore) -> None:
    await store.create(job(), 10)
    claimed = await store.claim()
    assert claimed is not None
    for _ in range(12):
        await store.report(claimed.lease, PROGRESS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hvp_service.jobs.event_log.EVENTS_PER_PAGE", 5)
        pages: list[list[JobEvent]] = []
        while not pages or pages[-1]:
            after = pages[-1][-1].sequence if pages else 0
            pages.append(await store.events_after(claimed.name, after, 0.0))
    assert [len(page) for page in pages] == [5, 5, 4, 0]
    assert [event.sequence for page in pages for event in page] == list(range(1, 15))


async def test_jobs_that_ended_before_a_time_are_found_and_forgotten(store: JobStore) -> None:
    for identifier in ("a", "b", "c"):
        await store.create(job(identifier), 10)
    for _ in range(2):
        claimed = await store.claim()
        assert claimed is not None
        await store.finish(claimed.lease, RESULT)
    names = [Name("p", "jobs", identifier) for identifier in ("a", "b", "c")]
    assert await store.ended_before(0) == []
    assert await store.ended_before(now_us() + 1) == names[:2]
    for name in names:
        await store.forget(name)
    assert await store.ended_before(now_us() + 1) == []
    assert [left.name for left in await store.unfinished("p")] == names[2:]
    with pytest.raises(ServiceError, match="RESOURCE_NOT_FOUND"):
        await store.events_after(names[0], 0, 0.0)


def test_the_states_are_those_of_the_protos() -> None:
    from hvp_protos.v1 import job_pb2

    names = {name.removeprefix("STATE_") for name in job_pb2.Job.State.keys()}  # noqa: SIM118
    assert names - {"UNSPECIFIED"} == set(get_args(JobState))
