"""Records of a job: its status, progress, events, plan and result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, Literal

import numpy as np
from hvp_operations.codec import to_values
from hvp_operations.operation import Detail, Table, load
from hvp_operations.registry import operations
from hvp_operations.wording import shown
from hvp_protos.v1 import job_pb2

from hvp_client._enums import plain_name
from hvp_client._exceptions import (
    BY_STATUS,
    HvpError,
    InvalidArgumentError,
    JobFailedError,
    UnknownError,
)
from hvp_client._times import from_timestamp

_KIBI = 1024
_WHOLE = 100  # from here on a size has no decimals

_ENDED_STATES = frozenset({"SUCCEEDED", "FAILED", "CANCELLED"})


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands.

    Attributes:
        stage: `loading`, `saving`, or what the operation calls it, as in `iterating`.
        num_products: Operator products done in this attempt.
        max_products: Upper bound on the products; 0 while the model loads.
        seconds_per_product: Median time of a product so far.
        detail: The operation's own figures, such as Ritz values; None before the first product,
            and where the operation is new to this client.
    """

    stage: str
    num_products: int
    max_products: int
    seconds_per_product: float
    detail: Detail | None


@dataclass(frozen=True, kw_only=True)
class JobStatus:
    """A job as the server knew it at one moment.

    Attributes:
        state: `QUEUED`, `RUNNING`, `SUCCEEDED`, `FAILED`, `CANCELLED`; a newer one is `UNKNOWN_7`.
        cancelling: Whether the job was asked to stop and still runs, to the end of the product at
            hand.
        ended: Whether the state is final; a state that is new to this client is final where the
            job has an `end_time`.
        attempt: Number of the run, from 1; one more after each loss of the server or a rank.
        progress: Where the run stands; None before the first product.
        error: Why the job failed, as an exception that is not raised; None unless it failed.
        create_time: When the job was queued, UTC.
        start_time: When the latest attempt began, UTC; None before the first.
        end_time: When the job ended, UTC; None while it has not.
    """

    state: str
    cancelling: bool
    ended: bool
    attempt: int
    progress: Progress | None
    error: HvpError | None
    create_time: datetime
    start_time: datetime | None
    end_time: datetime | None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a question would cost, and whether it fits.

    Attributes:
        max_products: Upper bound on products with the operator.
        seconds_per_product: Median of the latest job on the same operator; None where there was
            none.
        max_seconds: Upper bound on the time of all products; None where the pace is not known.
        num_ranks: Number of ranks that share each vector.
        least_bytes_per_rank: Memory for vectors without which the job does not begin.
        wished_bytes_per_rank: Memory for vectors that the job takes where there is enough.
        available_bytes_per_rank: Memory of the rank that has least, free or in use; None where it
            is not known.
        fits: Whether `least_bytes_per_rank` is there.
        problem: Why the job does not fit and what would help; "" where it fits.
    """

    max_products: int
    seconds_per_product: float | None
    max_seconds: float | None
    num_ranks: int
    least_bytes_per_rank: int
    wished_bytes_per_rank: int
    available_bytes_per_rank: int | None
    fits: bool
    problem: str

    def table(self) -> Table:
        """The figures, for people."""
        room = "not known"
        if self.available_bytes_per_rank is not None:
            room = _bytes(self.available_bytes_per_rank)
        pace = "not known before a first job on this operator"
        if self.max_seconds is not None and self.seconds_per_product is not None:
            longest = timedelta(seconds=round(self.max_seconds))
            pace = f"at most {longest}, {self.seconds_per_product:.3g} s a product"
        return Table(
            title="it fits" if self.fits else "it does not fit",
            headings=("", ""),
            rows=(
                ("products", f"at most {self.max_products}"),
                ("time", pace),
                ("vectors on each rank, at least", _bytes(self.least_bytes_per_rank)),
                ("where memory allows", _bytes(self.wished_bytes_per_rank)),
                ("memory of a rank" if self.num_ranks == 1 else "memory of the least rank", room),
            ),
            notes=(self.problem,) if self.problem else (),
        )


def _bytes(count: int) -> str:
    """A size in the unit that suits it."""
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < _KIBI:
            break
        size, unit = size / _KIBI, larger
    return f"{size:.0f} {unit}" if size >= _WHOLE else f"{size:.3g} {unit}"


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened to a job.

    Attributes:
        type: `state` or `progress`.
        sequence: Place in the job's history, dense from 1; `watch(after_sequence=...)` goes on
            from here.
        time: When it happened, UTC.
        state: The state that the job went into, on a `state` event.
        cancelling: On a `state` event RUNNING: whether a running job was asked to stop.
        attempt: Number of the run, on a `state` event; 0 otherwise.
        error: Why the job failed, on the `state` event FAILED.
        progress: Where the run stood, on a `progress` event.
    """

    type: Literal["state", "progress"]
    sequence: int
    time: datetime
    state: str = ""
    cancelling: bool = False
    attempt: int = 0
    error: HvpError | None = None
    progress: Progress | None = None

    @property
    def num_products(self) -> int:
        """Products done so far; 0 on a `state` event."""
        return self.progress.num_products if self.progress else 0


def state_name(state: job_pb2.Job.State.ValueType) -> str:
    """Plain name of a state, as in `RUNNING`, which a job asked to stop still is."""
    if state == job_pb2.Job.STATE_CANCELLING:
        return "RUNNING"
    return plain_name(job_pb2.Job.State, state, "STATE_")


def state_values(name: str) -> list[job_pb2.Job.State.ValueType]:
    """The wire's values of a state's name, the inverse of `state_name`.

    Args:
        name: In upper or lower case.

    Returns:
        One value, or for RUNNING two.

    Raises:
        InvalidArgumentError: `STATE_UNKNOWN`.
    """
    values = [
        value
        for value in job_pb2.Job.State.values()
        if value != job_pb2.Job.STATE_UNSPECIFIED and state_name(value) == name.upper()
    ]
    if not values:
        raise InvalidArgumentError(
            f"no job state {shown(name)}; there are QUEUED, RUNNING, SUCCEEDED, FAILED "
            "and CANCELLED",
            reason="STATE_UNKNOWN",
            field="states",
        )
    return values


def progress_from_proto(message: job_pb2.JobProgress) -> Progress:
    """Make a `Progress` of its message."""
    declared = operations().get(message.WhichOneof("detail") or "")
    return Progress(
        stage=message.stage,
        num_products=message.num_products,
        max_products=message.max_products,
        seconds_per_product=message.seconds_per_product,
        detail=declared
        and declared.progress(**to_values(getattr(message, declared.name), declared.progress)),
    )


def status_from_proto(message: job_pb2.Job) -> JobStatus:
    """Make a `JobStatus` of a job's message."""
    state = state_name(message.state)
    over = message.HasField("end_time")
    failed = message.HasField("error")
    return JobStatus(
        state=state,
        cancelling=message.state == job_pb2.Job.STATE_CANCELLING,
        ended=state in _ENDED_STATES or (state.startswith("UNKNOWN_") and over),
        attempt=message.attempt,
        progress=progress_from_proto(message.progress) if message.HasField("progress") else None,
        error=error_from_proto(message.error, JobFailedError, message.name) if failed else None,
        create_time=from_timestamp(message.create_time),
        start_time=from_timestamp(message.start_time) if message.HasField("start_time") else None,
        end_time=from_timestamp(message.end_time) if over else None,
    )


def result_from_proto(message: job_pb2.JobResult, vector: Callable[[Any], Any]) -> Any | None:
    """Make the record of a result.

    Args:
        message: The result.
        vector: Makes a handle of a vector's message.

    Returns:
        The operation's record; None where the operation is new to this client.
    """
    declared = operations().get(message.WhichOneof("result") or "")
    if declared is None:
        return None
    found = getattr(message, declared.name)
    values = to_values(
        found, declared.result, numbers=lambda numbers: np.array(numbers, np.float64)
    )
    for field in declared.result.vectors:
        given = getattr(found, field)
        is_repeated = found.DESCRIPTOR.fields_by_name[field].is_repeated
        values[field] = [vector(each) for each in given] if is_repeated else vector(given)
    return load(declared.record)(**values)


def with_vectors(result: Any, handle: Callable[[Any], Any]) -> Any:
    """The same result with other handles for its vectors.

    Args:
        result: An operation's record; anything else is returned as it is.
        handle: Makes the new handle from the old one.
    """
    for declared in operations().values():
        fields = declared.result.vectors
        if fields and isinstance(result, load(declared.record)):
            held = {field: getattr(result, field) for field in fields}
            return replace(
                result,
                **{
                    field: [handle(each) for each in value]
                    if isinstance(value, list)
                    else handle(value)
                    for field, value in held.items()
                },
            )
    return result


def plan_from_proto(message: job_pb2.JobPlan) -> Plan:
    """Make a `Plan` of its message."""
    return Plan(
        max_products=message.max_products,
        seconds_per_product=message.seconds_per_product or None,
        max_seconds=message.max_seconds or None,
        num_ranks=message.num_ranks,
        least_bytes_per_rank=message.least_bytes_per_rank,
        wished_bytes_per_rank=message.wished_bytes_per_rank,
        available_bytes_per_rank=message.available_bytes_per_rank or None,
        fits=message.fits,
        problem=message.problem,
    )


def error_from_proto(
    message: job_pb2.JobError, kind: type[HvpError] | None = None, job: str = ""
) -> HvpError:
    """Make an exception that says why a job failed.

    Args:
        message: The job's error.
        kind: Class of the exception; by default that of the status code.
        job: Name of the job, added to the metadata.

    Returns:
        The exception, not raised.
    """
    code = _CODE_NAMES.get(message.code, "UNKNOWN")
    metadata = dict(message.metadata)
    if job:
        metadata["job"] = job
    return (kind or BY_STATUS.get(code, UnknownError))(
        message.message, code=code, reason=message.reason, metadata=metadata
    )


# google.rpc.Code
_CODE_NAMES = {
    1: "CANCELLED",
    2: "UNKNOWN",
    3: "INVALID_ARGUMENT",
    4: "DEADLINE_EXCEEDED",
    5: "NOT_FOUND",
    6: "ALREADY_EXISTS",
    7: "PERMISSION_DENIED",
    8: "RESOURCE_EXHAUSTED",
    9: "FAILED_PRECONDITION",
    10: "ABORTED",
    11: "OUT_OF_RANGE",
    12: "UNIMPLEMENTED",
    13: "INTERNAL",
    14: "UNAVAILABLE",
    15: "DATA_LOSS",
    16: "UNAUTHENTICATED",
}


def event_from_proto(message: job_pb2.JobEvent) -> Event | None:
    """Make the record of an event; None of a heartbeat, and of a kind new to this client."""
    if message.HasField("progress"):
        return Event(
            type="progress",
            sequence=message.sequence,
            time=from_timestamp(message.time),
            progress=progress_from_proto(message.progress),
        )
    if not message.HasField("state_change"):
        return None
    change = message.state_change
    return Event(
        type="state",
        sequence=message.sequence,
        time=from_timestamp(message.time),
        state=state_name(change.state),
        cancelling=change.state == job_pb2.Job.STATE_CANCELLING,
        attempt=change.attempt,
        error=error_from_proto(change.error) if change.HasField("error") else None,
    )
