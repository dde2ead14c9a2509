"""What log and metrics have of an attempt at a job."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import structlog

from hvp_service.jobs.store import FINAL_STATES, Job
from hvp_service.metrics import instruments
from hvp_service.storage.clock import SECOND, now_us

log = structlog.get_logger()


def operation_of(job: Job) -> str:
    """A job's question as a label: its name, or `unknown` for another version's."""
    return job.spec.operation if job.spec else "unknown"


@contextmanager
def observed_attempt(job: Job, generation: str) -> Iterator[Callable[[Job], None]]:
    """Give every line of the log within the job's name, and count and time the attempt.

    Args:
        job: The job that was claimed.
        generation: That of the ranks.

    Yields:
        What is to be called with the job as the attempt has left it.
    """
    operation, started = operation_of(job), time.monotonic()

    def left(after: Job) -> None:
        seconds = time.monotonic() - started
        reason = {} if after.error is None else {"reason": after.error.reason}
        log.info("job left", state=after.state, duration_s=round(seconds, 6), **reason)
        if after.state in FINAL_STATES:
            instruments.JOB_RUN_SECONDS.labels(operation, after.state).observe(seconds)
        elif after.attempt == job.attempt:
            instruments.ATTEMPTS_LOST.labels(operation).inc()

    with structlog.contextvars.bound_contextvars(
        project=job.name.project,
        job=str(job.name),
        attempt=job.attempt,
        operation=operation,
        generation=generation,
    ):
        log.info("job started")
        if job.attempt == 1:
            waited_s = max(0, now_us() - job.create_time) / SECOND
            instruments.JOB_WAIT_SECONDS.labels(operation).observe(waited_s)
        yield left
