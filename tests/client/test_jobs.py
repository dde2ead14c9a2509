"""What a job's handle makes of a server's messages, against a server that only answers."""

# ruff: noqa: N802  gRPC names the methods

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from dataclasses import FrozenInstanceError, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, final

import grpc
import hvp_client
import pytest
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from hvp_client import AsyncClient, Client, InvalidArgumentError, Job, JobStatus, UnimplementedError
from hvp_client._checkpoints import checkpoint_from_proto
from hvp_client._system import worker_group_from_proto
from hvp_client.cli.display import plain_line, show_events
from hvp_protos.v1 import checkpoint_pb2, eigsh_pb2, job_pb2, job_pb2_grpc, system_pb2
from rich.console import Console

NAME = "projects/default/jobs/1"
State = job_pb2.Job.State


PAUSED = 17  # a state of a server to come
Events = list[job_pb2.JobEvent]


def of_a_server_to_come(message: Message) -> bytes:
    """A message on the wire with one more field, an empty message of number 99."""
    return message.SerializeToString() + b"\x9a\x06\x00"


@final
class Jobs(job_pb2_grpc.JobServiceServicer):
    """One job; as in the service, lists leave its result out."""

    def __init__(self) -> None:
        self.state = job_pb2.Job.STATE_SUCCEEDED
        self.asked: list[str] = []
        self.states: list[State.ValueType] = []
        self.events: Events = []
        self.change = job_pb2.Job()
        self.result = job_pb2.JobResult(
            eigsh=eigsh_pb2.EigshResult(
                eigenvalues=[2.5], outcome=eigsh_pb2.EigshResult.OUTCOME_CONVERGED
            )
        )

    def job(self) -> job_pb2.Job:
        job = job_pb2.Job(name=NAME, state=self.state, attempt=1)
        job.MergeFrom(self.change)
        return job

    async def ListJobs(
        self, request: job_pb2.ListJobsRequest, context: Any
    ) -> job_pb2.ListJobsResponse:
        self.asked.append("ListJobs")
        self.states = list(request.states)
        return job_pb2.ListJobsResponse(jobs=[self.job()])

    async def GetJob(self, request: job_pb2.GetJobRequest, context: Any) -> job_pb2.GetJobResponse:
        self.asked.append("GetJob")
        job = self.job()
        job.result.CopyFrom(self.result)
        return job_pb2.GetJobResponse(job=job)

    async def WatchJob(
        self, request: job_pb2.WatchJobRequest, context: Any
    ) -> AsyncIterator[job_pb2.WatchJobResponse]:
        for event in self.events:
            yield job_pb2.WatchJobResponse(event=event)
        if self.events:
            return
        states = [State.STATE_RUNNING, State.STATE_CANCELLING, State.STATE_CANCELLED]
        self.state = job_pb2.Job.STATE_CANCELLED
        for sequence, state in enumerate(states, 1):
            change = job_pb2.JobEvent.StateChange(state=state, attempt=1)
            event = job_pb2.JobEvent(sequence=sequence, state_change=change)
            yield job_pb2.WatchJobResponse(event=event)


@pytest.fixture
def jobs() -> Jobs:
    return Jobs()


@pytest.fixture
async def client(jobs: Jobs) -> AsyncIterator[AsyncClient]:
    server = grpc.aio.server()
    job_pb2_grpc.add_JobServiceServicer_to_server(jobs, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with AsyncClient(f"127.0.0.1:{port}") as client:
        yield client
    await server.stop(None)


async def test_a_listed_job_fetches_its_result_when_it_is_asked_for(
    client: AsyncClient, jobs: Jobs
) -> None:
    (job,) = await client.jobs()
    result = await job.result()
    assert result.eigenvalues.tolist() == [2.5]
    assert result.outcome == "CONVERGED"
    assert jobs.asked == ["ListJobs", "GetJob"]
    await job.result()
    assert jobs.asked == ["ListJobs", "GetJob"]


async def test_a_job_that_is_being_cancelled_is_running_and_says_cancelling(
    client: AsyncClient, jobs: Jobs
) -> None:
    jobs.state = job_pb2.Job.STATE_CANCELLING
    (job,) = await client.jobs(states=["running"])
    assert (job.state, job.cancelling, job.ended) == ("RUNNING", True, False)
    assert jobs.states == [job_pb2.Job.STATE_RUNNING, job_pb2.Job.STATE_CANCELLING]
    jobs.state = job_pb2.Job.STATE_RUNNING
    assert (job.state, job.cancelling) == ("RUNNING", True)  # what it last heard
    status = await job.status()
    assert (status.state, status.cancelling, status.ended) == ("RUNNING", False, False)
    assert (job.state, job.cancelling) == ("RUNNING", False)


async def test_a_status_is_one_call_and_no_property_makes_any(
    client: AsyncClient, jobs: Jobs
) -> None:
    jobs.state = job_pb2.Job.STATE_RUNNING
    progress = job_pb2.JobProgress(stage="resting", num_products=3)
    start = Timestamp(seconds=1)
    jobs.change = job_pb2.Job(attempt=2, progress=progress, start_time=start, labels={"why": "x"})

    def in_a_thread() -> JobStatus:
        with Client(client.address) as blocking:
            (job,) = blocking.jobs()
            first = job.status()
            assert jobs.asked == ["ListJobs", "GetJob"]
            jobs.state = job_pb2.Job.STATE_SUCCEEDED
            properties = [name for name in dir(Job) if isinstance(getattr(Job, name), property)]
            told = {name: getattr(job, name) for name in properties}
            assert {field.name for field in fields(JobStatus)} < told.keys()
            assert {name: told[name] for name in told if hasattr(first, name)} == vars(first)
            assert repr(job)
            assert jobs.asked == ["ListJobs", "GetJob"]
            assert job.status().state == job.state == "SUCCEEDED"
            return first

    status = await asyncio.to_thread(in_a_thread)
    assert (status.state, status.attempt, status.ended) == ("RUNNING", 2, False)
    assert status.progress is not None
    assert (status.progress.stage, status.progress.num_products) == ("resting", 3)
    assert (status.start_time, status.end_time) == (datetime.fromtimestamp(1, UTC), None)
    assert status.error is None
    with pytest.raises(FrozenInstanceError):
        status.state = "FAILED"  # type: ignore[misc]


async def test_events_name_the_same_five_states(client: AsyncClient) -> None:
    job = await client.job(NAME)
    events = [event async for event in job.watch()]
    assert [event.state for event in events] == ["RUNNING", "RUNNING", "CANCELLED"]
    assert [event.cancelling for event in events] == [False, True, False]
    assert plain_line(events[1]) == "CANCELLING attempt 1"


@pytest.mark.parametrize("state", ["CANCELLING", "UNSPECIFIED", "DONE", ""])
async def test_jobs_cannot_be_listed_by_a_state_they_never_show(
    client: AsyncClient, jobs: Jobs, state: str
) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        await client.jobs(states=[state])
    assert (caught.value.reason, caught.value.field) == ("STATE_UNKNOWN", "states")
    assert jobs.asked == []


async def test_a_state_and_an_event_of_a_newer_server_neither_end_a_watch_nor_raise(
    client: AsyncClient, jobs: Jobs
) -> None:
    jobs.state = job_pb2.Job.STATE_CANCELLED
    event, change = job_pb2.JobEvent, job_pb2.JobEvent.StateChange
    jobs.events = [
        event(sequence=1, state_change=change(state=State.STATE_RUNNING, attempt=1)),
        event(sequence=2, state_change=change(state=PAUSED, attempt=1)),  # type: ignore[arg-type]
        event.FromString(of_a_server_to_come(event(sequence=3))),
        event(heartbeat=event.Heartbeat()),
        event(sequence=4, progress=job_pb2.JobProgress(stage="resting", num_products=1)),
        event(sequence=5, state_change=change(state=State.STATE_CANCELLED, attempt=1)),
    ]
    seen = [event async for event in (await client.job(NAME)).watch()]
    assert [(event.sequence, event.state) for event in seen] == [
        (1, "RUNNING"),
        (2, "UNKNOWN_17"),
        (4, ""),
        (5, "CANCELLED"),
    ]
    assert all(plain_line(record) for record in seen)
    table = Console(record=True, width=100)
    show_events(iter(seen), NAME, table)
    assert "UNKNOWN_17" in table.export_text()


async def test_a_job_in_a_state_of_a_newer_server_is_shown_and_has_ended_when_its_end_is_known(
    client: AsyncClient, jobs: Jobs
) -> None:
    jobs.state = PAUSED  # type: ignore[assignment]
    (job,) = await client.jobs()
    assert (job.state, job.ended) == ("UNKNOWN_17", False)
    jobs.change = job_pb2.Job(end_time=Timestamp(seconds=1))
    jobs.events = [job_pb2.JobEvent(sequence=1)]
    await job.status()
    assert job.ended
    assert [event async for event in job.watch()] == []


async def test_a_job_of_a_kind_of_a_newer_server_is_listed_and_its_result_says_what_to_do(
    client: AsyncClient, jobs: Jobs
) -> None:
    operator = {"kind": 17}
    spec = job_pb2.JobSpec(eigsh={"operator": operator, "which": 17})  # type: ignore[arg-type]
    jobs.change = job_pb2.Job(spec=spec)
    (job,) = await client.jobs()
    assert (job.spec["operator"], job.spec["which"]) == ("unknown_17", "UNKNOWN_17")
    spec = job_pb2.JobSpec.FromString(of_a_server_to_come(job_pb2.JobSpec()))
    jobs.change, jobs.result = job_pb2.Job(spec=spec), job_pb2.JobResult()
    await job.status()
    assert (job.spec, job.headline) == ({"operation": ""}, "")
    with pytest.raises(UnimplementedError) as caught:
        await job.result()
    assert caught.value.reason == "RESULT_UNREADABLE"


@pytest.mark.parametrize("outcome", [1, 17])
async def test_an_outcome_of_a_newer_server_is_shown_by_its_number(
    client: AsyncClient, jobs: Jobs, outcome: int
) -> None:
    jobs.result = job_pb2.JobResult(eigsh={"outcome": outcome})  # type: ignore[arg-type]
    result = await (await client.job(NAME)).result()
    assert result.outcome == {1: "CONVERGED", 17: "UNKNOWN_17"}[outcome]


def test_names_of_what_a_newer_server_may_send_are_made_in_one_place() -> None:
    folder = Path(hvp_client.__file__).parent
    used = [path.name for path in folder.rglob("*.py") if re.search(r"\.Name\(", path.read_text())]
    assert used == []
    assert (
        worker_group_from_proto(
            system_pb2.WorkerGroup(state=17)  # type: ignore[arg-type]
        ).state
        == "UNKNOWN_17"
    )
    assert (
        checkpoint_from_proto(
            checkpoint_pb2.Checkpoint(state=17)  # type: ignore[arg-type]
        ).state
        == "UNKNOWN_17"
    )
