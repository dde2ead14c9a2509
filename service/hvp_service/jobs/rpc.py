"""hvp.v1.JobService."""

# ruff: noqa: N802, D102  (gRPC gives the methods their names, the protos their description)

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, cast

from hvp_protos.v1 import job_pb2 as pb
from hvp_protos.v1 import job_pb2_grpc

from hvp_service.app.dependencies import Dependencies
from hvp_service.calls.messages import enum_name, page_request
from hvp_service.calls.names import Name, noted, parse, parse_parent
from hvp_service.jobs import service as jobs
from hvp_service.jobs.messages import (
    asked_values,
    event_message,
    job_message,
    plan_message,
)
from hvp_service.jobs.store import JobState


class JobServicer(job_pb2_grpc.JobServiceServicer):
    """The RPCs on jobs."""

    def __init__(self, deps: Dependencies):
        self._deps = deps

    async def CreateJob(self, request: pb.CreateJobRequest, context: Any) -> pb.CreateJobResponse:
        project = parse_parent(request.parent)
        operation, operator, values = asked_values(request.spec)
        job, planned = await jobs.create(
            self._deps,
            noted(Name(project, "jobs", jobs.job_id(project, request.request_id))),
            operation=operation,
            operator=operator,
            values=values,
            labels=dict(request.labels),
            validate_only=request.validate_only,
            extends=request.extends,
        )
        return pb.CreateJobResponse(job=job_message(job), plan=plan_message(planned))

    async def UpdateJob(self, request: pb.UpdateJobRequest, context: Any) -> pb.UpdateJobResponse:
        job = await jobs.update(
            self._deps,
            parse(request.job.name, "jobs"),
            dict(request.job.labels),
            request.update_mask.paths,
            request.etag,
        )
        return pb.UpdateJobResponse(job=job_message(job))

    async def GetJob(self, request: pb.GetJobRequest, context: Any) -> pb.GetJobResponse:
        job = await self._deps.jobs.get(parse(request.name, "jobs"))
        return pb.GetJobResponse(job=job_message(job))

    async def ListJobs(self, request: pb.ListJobsRequest, context: Any) -> pb.ListJobsResponse:
        states = [
            cast(JobState, enum_name(pb.Job.State, state).removeprefix("STATE_"))
            for state in request.states
        ]
        found, token = await self._deps.jobs.list_page(
            parse_parent(request.parent), states, page_request(request)
        )
        return pb.ListJobsResponse(jobs=[job_message(job) for job in found], next_page_token=token)

    async def CancelJob(self, request: pb.CancelJobRequest, context: Any) -> pb.CancelJobResponse:
        job = await jobs.cancel(self._deps, parse(request.name, "jobs"))
        return pb.CancelJobResponse(job=job_message(job))

    async def DeleteJob(self, request: pb.DeleteJobRequest, context: Any) -> pb.DeleteJobResponse:
        await jobs.delete(self._deps, parse(request.name, "jobs"))
        return pb.DeleteJobResponse()

    async def WaitJob(self, request: pb.WaitJobRequest, context: Any) -> pb.WaitJobResponse:
        timeout_s = request.timeout.seconds + request.timeout.nanos / 1e9
        job = await jobs.wait(self._deps, parse(request.name, "jobs"), timeout_s)
        return pb.WaitJobResponse(job=job_message(job))

    async def WatchJob(
        self, request: pb.WatchJobRequest, context: Any
    ) -> AsyncIterator[pb.WatchJobResponse]:
        async for event in jobs.watch(
            self._deps, parse(request.name, "jobs"), request.after_sequence
        ):
            yield pb.WatchJobResponse(event=event_message(event))
