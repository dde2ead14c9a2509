"""The blocking side of `hvp_client.awaited.job`: made of it by `make sdk`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any, Generic, TypeVar, final

from hvp_client._exceptions import HvpError
from hvp_client._results import Event, JobStatus, Progress
from hvp_client.awaited.job import AsyncJob
from hvp_client.blocking.twins import Blocking, twin_of

ResultT = TypeVar("ResultT")


@final
class Job(Blocking, Generic[ResultT], twin=AsyncJob):
    """Long work on the server: a row that outlives this client and the server's own restarts.

    The properties tell what this object last heard, from `status()`, `result()`, `cancel()` or the
    end of `watch()`, and never ask the server.
    """

    _twin: AsyncJob[ResultT]

    @property
    def name(self) -> str:
        """`projects/{project}/jobs/{id}`."""
        return self._twin.name

    @property
    def state(self) -> str:
        """`QUEUED`, `RUNNING`, `SUCCEEDED`, `FAILED`, `CANCELLED`; a newer one is `UNKNOWN_7`."""
        return self._twin.state

    @property
    def cancelling(self) -> bool:
        """Whether the job was asked to stop and still ran, to the end of the product at hand."""
        return self._twin.cancelling

    @property
    def ended(self) -> bool:
        """Whether the state is final."""
        return self._twin.ended

    @property
    def attempt(self) -> int:
        """Number of the run, from 1; one more after each loss of the server or a rank."""
        return self._twin.attempt

    @property
    def progress(self) -> Progress | None:
        """Where the run stood; None before the first product."""
        return self._twin.progress

    @property
    def error(self) -> HvpError | None:
        """Why the job failed, as an exception that is not raised; None unless it failed."""
        return self._twin.error

    @property
    def labels(self) -> dict[str, str]:
        """Labels of the job, from when it was made or last relabelled."""
        return self._twin.labels

    @property
    def etag(self) -> str:
        """Tag of the present labels, which changes with them; `relabel` takes it."""
        return self._twin.etag

    @property
    def spec(self) -> dict[str, Any]:
        """The question: `operation`, the operator's fields, and the operation's own values.

        All values are such as JSON has: numbers, strings, lists and dicts.
        """
        return self._twin.spec

    @property
    def headline(self) -> str:
        """The question in a few words; "" where the operation is new to this client."""
        return self._twin.headline

    @property
    def extends(self) -> str:
        """Name of the job whose result this one goes on from; "" for a job of its own."""
        return self._twin.extends

    @property
    def create_time(self) -> datetime:
        """When the job was queued, UTC."""
        return self._twin.create_time

    @property
    def start_time(self) -> datetime | None:
        """When the latest attempt began, UTC; None before the first."""
        return self._twin.start_time

    @property
    def end_time(self) -> datetime | None:
        """When the job ended, UTC; None while it has not."""
        return self._twin.end_time

    def status(self) -> JobStatus:
        """Ask the server how the job is: one snapshot, in one call.

        Returns:
            The snapshot, which the properties tell from then on.

        Raises:
            NotFoundError: The job was deleted.
        """
        return self._portal.run(self._twin.status())

    def relabel(self, labels: Mapping[str, str], *, etag: str | None = None) -> None:
        """Give the job other labels, in the place of all that it has.

        Args:
            labels: At most 64 labels; names and values have at most 256 characters each.
            etag: `job.etag` of the labels to replace: the call fails if they have changed since.
                None replaces whatever labels there are.

        Raises:
            InvalidArgumentError: `LABELS_INVALID`.
            AbortedError: `ETAG_MISMATCH`: the labels have changed; ask for `status()` first.
        """
        self._portal.run(self._twin.relabel(labels, etag=etag))

    def extend(self, *, labels: Mapping[str, str] | None = None, **changes: Any) -> Job[ResultT]:
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
        result: Job[ResultT] = self._wait(
            self._twin.extend(
                labels=labels, **{name: twin_of(value) for name, value in changes.items()}
            )
        )
        return result

    def cancel(self) -> None:
        """Ask the job to stop between two products; an ended job is not changed.

        Raises:
            NotFoundError: The job was deleted.
        """
        self._portal.run(self._twin.cancel())

    def delete(self) -> None:
        """Delete the job, its events, and its vectors but for those that are kept.

        Raises:
            NotFoundError: The job was deleted already.
            FailedPreconditionError: `JOB_NOT_ENDED`: cancel it first.
        """
        self._portal.run(self._twin.delete())

    def result(self, timeout_s: float | None = None) -> ResultT:
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
        result: ResultT = self._wait(self._twin.result(timeout_s))
        return result

    def watch(self, after_sequence: int = 0) -> Iterator[Event]:
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
        return self._portal.iterate(self._twin.watch(after_sequence))

    def __repr__(self) -> str:
        asked = self.spec
        what = " ".join(filter(None, map(asked.get, ("operation", "operator", "dtype"))))
        return f"<{type(self).__name__} {what or 'of a newer server'} {self.state} {self.name}>"
