"""Jobs: long work that goes on whether or not its client is there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from datetime import datetime
from typing import Any, Generic, TypeVar, final

from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
from hvp_operations.codec import to_plain, to_values
from hvp_operations.operation import Operation
from hvp_operations.registry import operations
from hvp_protos.v1 import job_pb2

from hvp_client._algebra import matrix_of
from hvp_client._exceptions import (
    DeadlineExceededError,
    HvpError,
    JobCancelledError,
    JobFailedError,
    UnavailableError,
    UnimplementedError,
)
from hvp_client._labels import check_labels
from hvp_client._results import (
    Event,
    JobStatus,
    Progress,
    error_from_proto,
    event_from_proto,
    result_from_proto,
    status_from_proto,
)
from hvp_client._session import Session, new_request_id
from hvp_client._specs import extended_spec
from hvp_client._wire import Pauses, is_transient
from hvp_client.awaited.vector import AsyncVector

ResultT = TypeVar("ResultT")

_WAIT_S = 30.0  # one long poll; the server allows 60


@final
class AsyncJob(Generic[ResultT]):
    """Long work on the server: a row that outlives this client and the server's own restarts.

    The properties tell what this object last heard, from `status()`, `result()`, `cancel()` or the
    end of `watch()`, and never ask the server.
    """

    def __init__(self, session: Session, message: job_pb2.Job):
        self._session = session
        self._learn(message)

    def _learn(self, message: job_pb2.Job) -> JobStatus:
        self._message = message
        self._known = status_from_proto(message)
        return self._known

    @property
    def name(self) -> str:
        """`projects/{project}/jobs/{id}`."""
        return self._message.name

    @property
    def state(self) -> str:
        """`QUEUED`, `RUNNING`, `SUCCEEDED`, `FAILED`, `CANCELLED`; a newer one is `UNKNOWN_7`."""
        return self._known.state

    @property
    def cancelling(self) -> bool:
        """Whether the job was asked to stop and still ran, to the end of the product at hand."""
        return self._known.cancelling

    @property
    def ended(self) -> bool:
        """Whether the state is final."""
        return self._known.ended

    @property
    def attempt(self) -> int:
        """Number of the run, from 1; one more after each loss of the server or a rank."""
        return self._known.attempt

    @property
    def progress(self) -> Progress | None:
        """Where the run stood; None before the first product."""
        return self._known.progress

    @property
    def error(self) -> HvpError | None:
        """Why the job failed, as an exception that is not raised; None unless it failed."""
        return self._known.error

    @property
    def labels(self) -> dict[str, str]:
        """Labels of the job, from when it was made or last relabelled."""
        return dict(self._message.labels)

    @property
    def etag(self) -> str:
        """Tag of the present labels, which changes with them; `relabel` takes it."""
        return self._message.etag

    @property
    def spec(self) -> dict[str, Any]:
        """The question: `operation`, the operator's fields, and the operation's own values.

        All values are such as JSON has: numbers, strings, lists and dicts.
        """
        declared = self._declared
        if declared is None:  # of a newer server's, this client can say no more
            return {"operation": self._message.spec.WhichOneof("spec") or ""}
        message = getattr(self._message.spec, declared.name)
        return {
            "operation": declared.name,
            "operator": str(matrix_of(message.operator)),
            "checkpoint": message.operator.checkpoint,
            "batch": message.operator.data_batch,
            "dtype": message.operator.dtype,
            "precision": message.operator.precision,
            "deterministic": message.operator.deterministic,
            "parameters": list(message.operator.parameters),
            "sample_seed": message.operator.sample_seed,
            "num_samples": message.operator.num_samples,
            **to_plain(message, declared.spec),
        }

    @property
    def headline(self) -> str:
        """The question in a few words; "" where the operation is new to this client."""
        declared = self._declared
        if declared is None:
            return ""
        values = to_values(getattr(self._message.spec, declared.name), declared.spec)
        return declared.headline(declared.spec(**values))

    @property
    def extends(self) -> str:
        """Name of the job whose result this one goes on from; "" for a job of its own."""
        return self._message.extends

    @property
    def _declared(self) -> Operation[Any] | None:
        return operations().get(self._message.spec.WhichOneof("spec") or "")

    @property
    def create_time(self) -> datetime:
        """When the job was queued, UTC."""
        return self._known.create_time

    @property
    def start_time(self) -> datetime | None:
        """When the latest attempt began, UTC; None before the first."""
        return self._known.start_time

    @property
    def end_time(self) -> datetime | None:
        """When the job ended, UTC; None while it has not."""
        return self._known.end_time

    async def status(self) -> JobStatus:
        """Ask the server how the job is: one snapshot, in one call.

        Returns:
            The snapshot, which the properties tell from then on.

        Raises:
            NotFoundError: The job was deleted.
        """
        answer = await self._session.wire.unary(
            "JobService/GetJob", job_pb2.GetJobRequest(name=self.name), job_pb2.GetJobResponse
        )
        return self._learn(answer.job)

    async def relabel(self, labels: Mapping[str, str], *, etag: str | None = None) -> None:
        """Give the job other labels, in the place of all that it has.

        Args:
            labels: At most 64 labels; names and values have at most 256 characters each.
            etag: `job.etag` of the labels to replace: the call fails if they have changed since.
                None replaces whatever labels there are.

        Raises:
            InvalidArgumentError: `LABELS_INVALID`.
            AbortedError: `ETAG_MISMATCH`: the labels have changed; ask for `status()` first.
        """
        answer = await self._session.wire.unary(
            "JobService/UpdateJob",
            job_pb2.UpdateJobRequest(
                job=job_pb2.Job(name=self.name, labels=check_labels(labels)),
                update_mask=FieldMask(paths=["labels"]),
                etag=etag or "",
            ),
            job_pb2.UpdateJobResponse,
        )
        self._learn(answer.job)

    async def extend(
        self, *, labels: Mapping[str, str] | None = None, **changes: Any
    ) -> AsyncJob[ResultT]:
        """Ask the same question again, going on from this job's result.

        What the result holds is not computed again: probes of a density, a trace by hutchinson or a
        trace of a function; a diagonal is gone on with or averaged; a low-rank matrix is added to.
        Eigenvectors, singular vectors and solutions are what the new search begins with.
        Products are counted anew, and so is their budget. This job may be deleted meanwhile;
        docs/extending.md has every question.

        Args:
            labels: Kept with the new job.
            changes: Arguments of the question that differ, by name, such as `num_probes`, `k`,
                `max_products` or `tol`; those that may differ are named where another one is given.

        Returns:
            The new job, queued.

        Raises:
            InvalidArgumentError: `EXTENSION_MISMATCH`: an argument that may not differ; or as the
                question itself.
            FailedPreconditionError: `JOB_NOT_SUCCEEDED`; `EXTENSION_UNSUPPORTED`: there is nothing
                to go on from.
            NotFoundError: This job, or a vector of its, was deleted.
            UnimplementedError: `RESULT_UNREADABLE`: the question is new to this client.
        """
        answer = await self._session.wire.unary(
            "JobService/CreateJob",
            job_pb2.CreateJobRequest(
                parent=self._session.parent,
                request_id=new_request_id(),
                spec=extended_spec(self._message.spec, self.name, changes),
                labels=check_labels(labels),
                extends=self.name,
            ),
            job_pb2.CreateJobResponse,
            timeout_s=self._session.wire.timeout.compute_s,
        )
        return AsyncJob(self._session, answer.job)

    async def cancel(self) -> None:
        """Ask the job to stop between two products; an ended job is not changed.

        Raises:
            NotFoundError: The job was deleted.
        """
        answer = await self._session.wire.unary(
            "JobService/CancelJob",
            job_pb2.CancelJobRequest(name=self.name),
            job_pb2.CancelJobResponse,
        )
        self._learn(answer.job)

    async def delete(self) -> None:
        """Delete the job, its events, and its vectors but for those that are kept.

        Raises:
            NotFoundError: The job was deleted already.
            FailedPreconditionError: `JOB_NOT_ENDED`: cancel it first.
        """
        await self._session.wire.unary(
            "JobService/DeleteJob",
            job_pb2.DeleteJobRequest(name=self.name),
            job_pb2.DeleteJobResponse,
        )

    async def result(self, timeout_s: float | None = None) -> ResultT:
        """Wait for the job's end and give its result; a restart of the server is waited out.

        Args:
            timeout_s: Longest wait, seconds; None waits for as long as it takes.

        Returns:
            The operation's record, such as `DensityResult`.

        Raises:
            DeadlineExceededError: `JOB_NOT_ENDED`: the time is over and the job goes on.
            JobFailedError: The job failed; code, reason and metadata are its run's.
            JobCancelledError: The job was cancelled.
            UnimplementedError: `RESULT_UNREADABLE`: a newer server's result.
        """
        loop = asyncio.get_running_loop()
        end_s = None if timeout_s is None else loop.time() + timeout_s
        while not self.ended:
            left_s = _WAIT_S if end_s is None else max(0.0, end_s - loop.time())
            await self._wait(min(_WAIT_S, left_s))
            if not self.ended and end_s is not None and loop.time() >= end_s:
                raise DeadlineExceededError(
                    f"{self.name} is {self.state} after {timeout_s:g} s and goes on; "
                    "call result() again to wait longer, or cancel() it",
                    reason="JOB_NOT_ENDED",
                    metadata={"job": self.name, "state": self.state},
                )
        if self.state == "FAILED" or self.error is not None:
            raise error_from_proto(self._message.error, JobFailedError, self.name)
        if self.state == "CANCELLED":
            raise JobCancelledError(
                f"{self.name} was cancelled and has no result",
                reason="JOB_CANCELLED",
                metadata={"job": self.name},
            )
        if not self._message.HasField("result"):
            await self.status()  # lists leave results out
        found: ResultT | None = result_from_proto(
            self._message.result,
            lambda message: AsyncVector(self._session, message, temporary=False),
        )
        if found is None:
            raise UnimplementedError(
                f"{self.name} is {self.state} with a result that this client cannot read; install "
                "the server's version of it",
                reason="RESULT_UNREADABLE",
                metadata={"job": self.name, "state": self.state},
            )
        return found

    async def _wait(self, wait_s: float) -> None:
        """Ask once for the job's end."""
        timeout = Duration()
        timeout.FromNanoseconds(int(wait_s * 1e9))
        answer = await self._session.wire.unary(
            "JobService/WaitJob",
            job_pb2.WaitJobRequest(name=self.name, timeout=timeout),
            job_pb2.WaitJobResponse,
            timeout_s=wait_s + self._session.wire.timeout.call_s,
            patience_s=self._session.wire.retry.job_patience_s,
        )
        self._learn(answer.job)

    async def watch(self, after_sequence: int = 0) -> AsyncGenerator[Event, None]:
        """Give what has happened to the job, then what happens, until it ends.

        Args:
            after_sequence: Number of the event to begin after; 0 begins with the first event.

        Yields:
            Events in order, each once. The connection is made again by itself when it breaks or the
            server is started anew.

        Raises:
            NotFoundError: No such job.
            UnavailableError: The server stayed away for longer than `Retry.job_patience_s`.
        """
        wire = self._session.wire
        pauses = Pauses(wire.retry, wire.retry.job_patience_s)
        while True:
            stream = wire.server_stream(
                "JobService/WatchJob",
                job_pb2.WatchJobRequest(name=self.name, after_sequence=after_sequence),
                job_pb2.WatchJobResponse,
                bulk=False,
                silence_s=wire.timeout.silence_s,
            )
            try:
                async with aclosing(stream):
                    async for message in stream:
                        pauses.reset()
                        event = event_from_proto(message.event)
                        after_sequence = max(after_sequence, message.event.sequence)
                        if event is not None:
                            yield event
                if (await self.status()).ended:
                    return
                # A stream ends after the event of a final state only.
                raise UnavailableError(
                    f"the server at {wire.address} stopped telling about {self.name}",
                    reason="STREAM_ENDED",
                )
            except HvpError as error:
                if not is_transient(error):
                    raise
                await pauses.after(error)

    def __repr__(self) -> str:
        asked = self.spec
        what = " ".join(filter(None, map(asked.get, ("operation", "operator", "dtype"))))
        return f"<{type(self).__name__} {what or 'of a newer server'} {self.state} {self.name}>"
