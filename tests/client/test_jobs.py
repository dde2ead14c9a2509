"""What a job's handle makes of a server's messages, against a server that only answers."""

# ruff: noqa: N802  gRPC names the methods

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, final

import grpc
import pytest
from hvp_client import AsyncClient, InvalidArgumentError
from hvp_client.cli.display import plain_line
from hvp_protos.v1 import job_pb2, job_pb2_grpc

NAME = "projects/default/jobs/1"
State = job_pb2.Job.State


@final
class Jobs(job_pb2_grpc.JobServiceServicer):
    """One job; as in the service, lists leave its result out."""

    def __init__(self) -> None:
        self.state = job_pb2.Job.STATE_SUCCEEDED
        self.asked: list[str] = []
        self.states: list[State.ValueType] = []

    def job(self) -> job_pb2.Job:
        return job_pb2.Job(name=NAME, state=self.state, attempt=1)

    async def ListJobs(
        self, request: job_pb2.ListJobsRequest, context: Any
    ) -> job_pb2.ListJobsResponse:
        self.asked.append("ListJobs")
        self.states = list(request.states)
        return job_pb2.ListJobsResponse(jobs=[self.job()])

    async def GetJob(self, request: job_pb2.GetJobRequest, context: Any) -> job_pb2.GetJobResponse:
        self.asked.append("GetJob")
        job = self.job()
        job.result.eigsh.eigenvalues.append(2.5)
        job.result.eigsh.outcome = job_pb2.EigshResult.OUTCOME_CONVERGED
        return job_pb2.GetJobResponse(job=job)

    async def WatchJob(
        self, request: job_pb2.WatchJobRequest, context: Any
    ) -> AsyncIterator[job_pb2.WatchJobResponse]:
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
    await job.refresh()
    assert (job.state, job.cancelling) == ("RUNNING", False)


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
