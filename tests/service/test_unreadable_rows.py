"""Rows of jobs that another version wrote or a disk has damaged, among rows that are sound."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
import sqlalchemy as sa
from hvp_operations.checking import Seed
from hvp_operations.eigsh import EigshSpec
from hvp_protos.v1 import job_pb2 as pb
from hvp_service.app.config import ServerConfig
from hvp_service.app.dependencies import Dependencies, open_dependencies
from hvp_service.batches import service as batches
from hvp_service.calls.errors import ServiceError
from hvp_service.calls.names import Name, parse
from hvp_service.calls.paging import PageRequest
from hvp_service.checkpoints import service as checkpoints
from hvp_service.group import service as system
from hvp_service.jobs import service as jobs
from hvp_service.jobs.rows import spec_row
from hvp_service.jobs.rpc import JobServicer
from hvp_service.jobs.store import Job, JobSpec
from hvp_service.operators.resolver import OperatorRef
from hvp_service.storage.clock import now_us
from hvp_service.storage.database import job_events
from hvp_service.storage.state_dir import StateDir

from tests.service.quadratic_backend import QuadraticBackend
from tests.service.world import PROJECT, create_job, make_batch, make_operator

CONTEXT: Any = None  # of gRPC; the servicer does not look at it

# Columns of a row that this version cannot read, and the state that it shows.
POISON: dict[str, tuple[dict[str, Any], str]] = {
    "another-operation": (
        {"spec": {"operation": "prophecy", "operator": {}, "spec": {}}},
        "FAILED",
    ),
    "an-operation-that-is-no-word": (
        {"spec": {"operation": ["eigsh"], "operator": {}, "spec": {}}},
        "FAILED",
    ),
    "an-earlier-version": ({"spec": {"k": 2, "which": "BE", "operator": {}}}, "FAILED"),
    "a-field-more": ({"spec": "+filter_degree"}, "FAILED"),
    "a-field-more-within": ({"spec": "+operator.selection"}, "FAILED"),
    "another-which": ({"spec": "which=BOTH"}, "FAILED"),
    "no-json": ({"spec": "{damaged"}, "FAILED"),
    "a-k-beyond-the-wire": ({"spec": "+k=1000000000000000000000000000000"}, "FAILED"),
    "words-for-an-attempt": ({"attempt": "abc"}, "FAILED"),
    "words-for-a-sequence": ({"last_sequence": "soon"}, "FAILED"),
    "words-for-a-time": ({"create_time": "soon"}, "FAILED"),
    "words-for-a-bound": ({"max_attempts": "soon"}, "FAILED"),
    "a-state-to-come": ({"state": "PAUSED"}, "FAILED"),
    "a-result-to-come": ({"state": "SUCCEEDED", "result": {"density": [1]}}, "FAILED"),
    "no-result": ({"state": "SUCCEEDED"}, "FAILED"),
    "an-error-to-come": ({"state": "FAILED", "error": ["no"]}, "FAILED"),
    "labels-to-come": ({"state": "CANCELLED", "labels": ["no"]}, "CANCELLED"),
    "progress-to-come": ({"state": "CANCELLED", "progress": {"probes": 3}}, "CANCELLED"),
    "held-by-a-server-that-is-gone": (
        {"spec": {"operation": "density"}, "state": "RUNNING", "attempt": 1, "lease_owner": "x"},
        "FAILED",
    ),
}


def spec_of(ref: OperatorRef, change: Any) -> str:
    """A spec as a row has it: whole text, a document, or the usual one with a change."""
    usual = spec_row(
        JobSpec(operation="eigsh", operator=ref, spec=EigshSpec(k=2, which="BE", seed=Seed(1)))
    )
    if isinstance(change, dict):
        return json.dumps(change)
    if change.startswith("+") and "=" in change:
        name, _, value = change[1:].partition("=")
        usual["spec"][name] = int(value)
    elif change.startswith("+"):
        place, _, name = change[1:].rpartition(".")
        usual[place or "spec"][name] = 3
    elif "=" in change:
        name, _, value = change.partition("=")
        usual["spec"][name] = value
    else:
        return str(change)
    return json.dumps(usual)


async def insert(deps: Dependencies, ref: OperatorRef, name: str, columns: dict[str, Any]) -> None:
    """A row beside the store, as another version may have left it, with its one event."""
    row: dict[str, Any] = {
        "project": PROJECT,
        "id": name,
        "labels": "{}",
        "state": "QUEUED",
        "attempt": 0,
        "max_attempts": 3,
        "lease_owner": "",
        "lease_expire": 1 << 60,
        "progress": None,
        "result": None,
        "error": None,
        "last_sequence": 2,
        "create_time": now_us(),
    } | {
        key: value if value is None or isinstance(value, (str, int)) else json.dumps(value)
        for key, value in columns.items()
    }
    row["spec"] = spec_of(ref, columns.get("spec", "which=BE"))
    names = ", ".join(row)
    values = ", ".join(f":{key}" for key in row)
    state = {"state": columns.get("state", "QUEUED"), "attempt": 0, "error": None}
    async with deps.database.writing() as connection:
        await connection.execute(sa.text(f"INSERT INTO jobs ({names}) VALUES ({values})"), row)  # noqa: S608
        for sequence, body in enumerate(
            [{"kind": "log", "value": "news"}, {"kind": "state_change", "value": state}], 1
        ):
            await connection.execute(
                job_events.insert().values(
                    project=PROJECT, job_id=name, sequence=sequence, time=1, body=body
                )
            )


async def watched(deps: Dependencies, name: str) -> list[pb.JobEvent]:
    """Every event of a watch from the beginning, heartbeats left out."""
    request = pb.WatchJobRequest(name=name)
    return [
        answer.event
        async for answer in JobServicer(deps).WatchJob(request, CONTEXT)
        if not answer.event.HasField("heartbeat")
    ]


async def test_rows_that_this_version_cannot_read_stop_neither_the_queue_nor_the_calls(
    config: ServerConfig, state_dir: StateDir
) -> None:
    earlier = await open_dependencies(config, state_dir, QuadraticBackend())
    ref = await make_operator(earlier)
    await earlier.dispatcher.stop(1.0)
    for name, (columns, _) in POISON.items():
        await insert(earlier, ref, name, columns)
    await earlier.close()

    deps = await open_dependencies(config, state_dir, QuadraticBackend())
    servicer = JobServicer(deps)
    try:
        sound = await create_job(deps, ref, name=Name(PROJECT, "jobs", "sound"))
        while (found := await jobs.wait(deps, sound.name, 10.0)).state == "QUEUED":
            pass
        assert found.state == "SUCCEEDED"

        listed = await servicer.ListJobs(pb.ListJobsRequest(parent=f"projects/{PROJECT}"), CONTEXT)
        shown = {job.name.rpartition("/")[2]: job for job in listed.jobs}
        assert shown.keys() == {*POISON, "sound"}
        for name, (_, state) in POISON.items():
            got = await servicer.GetJob(pb.GetJobRequest(name=shown[name].name), CONTEXT)
            for job in (shown[name], got.job):
                assert pb.Job.State.Name(job.state) == f"STATE_{state}", name
                assert (job.error.reason == "JOB_UNREADABLE") == (state == "FAILED"), name
            events = await watched(deps, shown[name].name)
            assert [event.sequence for event in events] == list(range(1, len(events) + 1)), name
            assert events[0].WhichOneof("event") is None  # of a kind that nobody knows yet

        assert await system.queue(deps, PROJECT) == (0, 0)
        batch = await make_batch(deps)
        await checkpoints.delete_checkpoint(deps, parse(ref.checkpoint, "checkpoints"))
        await batches.delete_batch(deps, batch.name)
        for name in POISON:
            await servicer.DeleteJob(pb.DeleteJobRequest(name=shown[name].name), CONTEXT)
    finally:
        await deps.close()


async def test_a_row_to_come_that_waits_is_shown_waiting_and_can_be_cancelled(
    deps: Dependencies,
) -> None:
    ref = await make_operator(deps)
    await deps.dispatcher.stop(1.0)
    await insert(deps, ref, "waits", {"spec": {"operation": "density"}})
    job: Job = await deps.jobs.get(Name(PROJECT, "jobs", "waits"))
    assert (job.state, job.spec) == ("QUEUED", None)
    assert [found.name for found in await deps.jobs.unfinished(PROJECT)] == [job.name]
    cancelled = await JobServicer(deps).CancelJob(pb.CancelJobRequest(name=str(job.name)), CONTEXT)
    assert cancelled.job.state == pb.Job.STATE_CANCELLED


@pytest.mark.parametrize("kind", ["KIND_FISHER_TO_COME", ""])
async def test_an_operator_kind_to_come_is_listed_as_unspecified(
    deps: Dependencies, kind: str
) -> None:
    ref = await make_operator(deps)
    await deps.dispatcher.stop(1.0)
    spec = json.loads(spec_of(ref, "which=BE"))
    spec["operator"]["kind"] = kind
    await insert(deps, ref, "kind", {"spec": spec})
    listed = await JobServicer(deps).ListJobs(
        pb.ListJobsRequest(parent=f"projects/{PROJECT}"), CONTEXT
    )
    assert listed.jobs[0].spec.eigsh.operator.kind == 0


async def test_a_damaged_checkpoint_row_is_named_and_the_others_are_listed(
    deps: Dependencies,
) -> None:
    damaged, sound = await make_operator(deps, n=4), await make_operator(deps, n=5)
    async with deps.database.writing() as connection:
        await connection.execute(
            sa.text("UPDATE checkpoints SET parameters='{bad' WHERE id=:id"),
            {"id": parse(damaged.checkpoint, "checkpoints").id},
        )
    listed, _ = await deps.checkpoints.list_page(PROJECT, PageRequest(size=10, token=""))
    assert [str(each.name) for each in listed] == [sound.checkpoint]
    with pytest.raises(ServiceError, match="upload it again") as caught:
        await deps.checkpoints.get(parse(damaged.checkpoint, "checkpoints"))
    assert caught.value.reason == "CHECKPOINT_UNREADABLE"


async def test_a_damaged_session_row_keeps_no_other_session_alive(deps: Dependencies) -> None:
    async with deps.database.writing() as connection:
        for identifier, expires in (("damaged", "never"), ("over", 1)):
            await connection.execute(
                sa.text("INSERT INTO sessions VALUES ('default', :id, 1, 0, :expires)"),
                {"id": identifier, "expires": expires},
            )
    await deps.reaper.stop()
    deps.reaper.start()
    for _ in range(200):
        async with deps.database.reading() as connection:
            left = (await connection.scalars(sa.text("SELECT id FROM sessions"))).all()
        if "over" not in left:
            break
        await asyncio.sleep(0.05)
    assert "over" not in left
    await deps.reaper.stop()  # it is alive: what had ended it would be raised here
