"""Rows of jobs and events as values, whoever wrote them: what cannot be read is not fatal."""

from __future__ import annotations

from typing import Any, Final, TypeVar, get_args

import sqlalchemy as sa
from hvp_workers.backend import EigshProgress
from pydantic import TypeAdapter, ValidationError

from hvp_service.job_store import (
    FINAL_STATES,
    EigshJob,
    Job,
    JobError,
    JobEvent,
    JobResult,
    JobState,
    StateChange,
    unreadable,
)
from hvp_service.names import Name

Value = TypeVar("Value")

SPEC: Final = TypeAdapter(EigshJob)
PROGRESS: Final = TypeAdapter(EigshProgress)
RESULT: Final = TypeAdapter(JobResult)
ERROR: Final = TypeAdapter(JobError)
STATE_CHANGE: Final = TypeAdapter(StateChange)

_NUMBERS = (
    *("attempt", "max_attempts", "last_sequence"),
    *("create_time", "start_time", "end_time"),
)
_STATES: frozenset[str] = frozenset(get_args(JobState))


def read_job(row: sa.Row[Any]) -> Job:
    """A job of its row.

    A state that this version does not know, and an end that it cannot read, are shown as FAILED
    with JOB_UNREADABLE; the row stays as it is, for the version that wrote it. A job that has not
    ended keeps its state, without a spec where that cannot be read.
    """
    name = Name(row.project, "jobs", row.id)
    numbers = {column: getattr(row, column) for column in _NUMBERS}
    # SQLite keeps text in a column of numbers, if someone put it there.
    whole = {column: value for column, value in numbers.items() if isinstance(value, int)}
    damaged = any(column not in whole and numbers[column] is not None for column in numbers)
    spec = None if damaged else _read_spec(row.spec)
    state, result, error = row.state, _read(RESULT, row.result), _read(ERROR, row.error)
    ended_unread = state in FINAL_STATES and (
        (state == "SUCCEEDED" and (spec is None or result is None))
        or (state == "FAILED" and error is None)
    )
    if state not in _STATES or ended_unread:
        state, result, error = "FAILED", None, unreadable(name)
    return Job(
        name=name,
        spec=spec,
        labels=row.labels if isinstance(row.labels, dict) else {},
        state=state,
        attempt=whole.get("attempt", 0),
        max_attempts=whole.get("max_attempts", 0),
        progress=_read(PROGRESS, row.progress),
        result=result,
        error=error,
        last_sequence=whole.get("last_sequence", 0),
        create_time=whole.get("create_time", 0),
        start_time=whole.get("start_time"),
        end_time=whole.get("end_time"),
    )


def read_event(row: sa.Row[Any]) -> JobEvent:
    """An event of its row; one of a kind or state that this version does not know has no body."""
    stored = row.body if isinstance(row.body, dict) else {}
    body: StateChange | EigshProgress | None = None
    match stored.get("kind"):
        case "progress":
            body = _read(PROGRESS, stored.get("value"))
        case "state_change":
            body = _read(STATE_CHANGE, stored.get("value"))
    return JobEvent(sequence=row.sequence, time=row.time, body=body)


def _read_spec(stored: Any) -> EigshJob | None:
    """A spec, when this version knows all it says: what is overlooked would be another question."""
    spec = _read(SPEC, stored)
    if spec is None or not _names_all(SPEC.dump_python(spec), stored):
        return None
    rows = spec.operator.micro_batch_size
    small = max(map(abs, (spec.k, spec.max_products, spec.num_lanczos_vectors, rows)))
    return spec if small < 1 << 31 and 0 <= spec.seed < 1 << 64 else None


def _names_all(known: Any, stored: Any) -> bool:
    """Whether every field of a stored value, and of those within it, is known."""
    if not (isinstance(known, dict) and isinstance(stored, dict)):
        return True
    return all(name in known and _names_all(known[name], stored[name]) for name in stored)


def _read(adapter: TypeAdapter[Value], stored: Any) -> Value | None:
    if stored is None:
        return None
    try:
        return adapter.validate_python(stored)
    except ValidationError:
        return None
