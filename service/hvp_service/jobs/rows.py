"""Rows of jobs and events as values; a row that this version cannot read is not fatal."""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, TypeVar, get_args

import sqlalchemy as sa
from hvp_operations.checking import typed
from hvp_operations.operation import Detail, Result, SpecError
from hvp_operations.registry import operations
from hvp_workers.backend import RunProgress
from pydantic import TypeAdapter, ValidationError

from hvp_service.calls.names import Name
from hvp_service.jobs.store import (
    FINAL_STATES,
    Job,
    JobError,
    JobEvent,
    JobResult,
    JobSpec,
    JobState,
    StateChange,
    unreadable,
)
from hvp_service.operators.resolver import OperatorRef

Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class _Frame:
    """The part of a result's column that is the same for every operation."""

    vectors: tuple[str, ...] = ()
    num_elements: int = 0
    output_shape: tuple[int, ...] = ()
    argument_shape: tuple[int, ...] = ()
    vector_time: int = 0


_OPERATOR: Final = TypeAdapter(OperatorRef)
_OF_SPEC: Final = frozenset({"operation", "operator", "spec"})
_NAMES: Final = TypeAdapter(dict[str, tuple[str, ...]])
_PROGRESS: Final = TypeAdapter(RunProgress)
_FRAME: Final = TypeAdapter(_Frame)
ERROR: Final = TypeAdapter(JobError)
STATE_CHANGE: Final = TypeAdapter(StateChange)

_NUMBERS = (
    *("attempt", "max_attempts", "last_sequence"),
    *("create_time", "start_time", "end_time"),
)
_STATES: frozenset[str] = frozenset(get_args(JobState))


def read_job(row: sa.Row[Any]) -> Job:
    """Read a job from its row.

    A state that this version does not know, and an end that it cannot read, are shown as FAILED
    with JOB_UNREADABLE; the row stays as it is, for the version that wrote it. A job that has not
    ended keeps its state, without a spec where that cannot be read.
    """
    name = Name(row.project, "jobs", row.id)
    numbers = {column: getattr(row, column) for column in _NUMBERS}
    # SQLite keeps text in a column of numbers, if someone put it there.
    whole = {column: value for column, value in numbers.items() if isinstance(value, int)}
    damaged = any(column not in whole and numbers[column] is not None for column in numbers)
    spec = None if damaged else read_spec(row.spec)
    state, error = row.state, _read(ERROR, row.error)
    earlier = None if spec is None else _read(_results(spec.operation), row.earlier)
    if row.earlier is not None and earlier is None:
        spec = None  # without it the question would be another one
    result = None if spec is None else _read_result(spec.operation, row.result)
    ended_unread = state in FINAL_STATES and (
        (state == "SUCCEEDED" and (spec is None or result is None))
        or (state == "FAILED" and error is None)
    )
    if state not in _STATES or ended_unread:
        state, result, error = "FAILED", None, unreadable(name)
    return Job(
        name=name,
        spec=spec,
        extends=row.extends,
        earlier=earlier,
        labels=row.labels if isinstance(row.labels, dict) else {},
        state=state,
        attempt=whole.get("attempt", 0),
        max_attempts=whole.get("max_attempts", 0),
        progress=read_progress(row.progress),
        result=result,
        error=error,
        last_sequence=whole.get("last_sequence", 0),
        create_time=whole.get("create_time", 0),
        start_time=whole.get("start_time"),
        end_time=whole.get("end_time"),
    )


def read_event(row: sa.Row[Any]) -> JobEvent:
    """Read an event from its row; a kind or state that this version does not know has no body."""
    stored = row.body if isinstance(row.body, dict) else {}
    body: StateChange | RunProgress | None = None
    match stored.get("kind"):
        case "progress":
            body = read_progress(stored.get("value"))
        case "state_change":
            body = _read(STATE_CHANGE, stored.get("value"))
    return JobEvent(sequence=row.sequence, time=row.time, body=body)


def spec_row(spec: JobSpec) -> dict[str, Any]:
    """The value of a spec's column."""
    row = {
        "operation": spec.operation,
        "operator": _OPERATOR.dump_python(spec.operator, mode="json"),
        "spec": asdict(spec.spec),
    }
    if spec.earlier:
        row["earlier"] = {field: list(names) for field, names in spec.earlier.items()}
    return row


def asked_operation(row: Any) -> str:
    """The operation in a spec's column, unchecked; `unknown` where this version has none such."""
    asked = row.get("operation") if isinstance(row, dict) else None
    return asked if isinstance(asked, str) and asked in operations() else "unknown"


def progress_row(progress: RunProgress) -> dict[str, Any]:
    """The value of progress's column."""
    return asdict(progress)


def result_row(result: JobResult) -> dict[str, Any]:
    """The value of a result's column.

    Raises:
        TypeError: The result is not of the operation's type.
    """
    return {
        "result": earlier_row(result.result),
        "vectors": list(result.vectors),
        "num_elements": result.num_elements,
        "output_shape": list(result.output_shape),
        "argument_shape": list(result.argument_shape),
        "vector_time": result.vector_time,
    }


def earlier_row(result: Result) -> Any:
    """The value of the column for the result that a job goes on from.

    Raises:
        TypeError: The result is not of the operation's type.
    """
    return TypeAdapter(type(result)).dump_python(result, mode="json")


@functools.cache
def _details(operation: str) -> TypeAdapter[Detail]:
    return TypeAdapter(operations()[operation].progress)


@functools.cache
def _results(operation: str) -> TypeAdapter[Result]:
    return TypeAdapter(operations()[operation].result)


def read_spec(stored: Any) -> JobSpec | None:
    """Read a spec; None unless this version knows all of it: a part would be another question."""
    if not (isinstance(stored, dict) and stored.keys() - {"earlier"} == _OF_SPEC):
        return None
    declared = operations().get(str(stored["operation"]))  # whatever a damaged row has there
    operator = _read(_OPERATOR, stored["operator"])
    earlier = _read(_NAMES, stored.get("earlier", {}))
    if declared is None or operator is None or earlier is None:
        return None
    if not _names_all(_OPERATOR.dump_python(operator), stored["operator"]):
        return None
    if abs(operator.micro_batch_size) >= 1 << 31 or not isinstance(stored["spec"], dict):
        return None
    try:
        spec = typed(declared, stored["spec"])
    except SpecError:
        return None
    return JobSpec(operation=declared.name, operator=operator, spec=spec, earlier=earlier)


def read_progress(stored: Any) -> RunProgress | None:
    """Read progress, without its detail where another version wrote that."""
    if not isinstance(stored, dict):
        return None
    progress = _read(_PROGRESS, {**stored, "detail": None})
    if progress is None or progress.operation not in operations():
        return None
    return replace(progress, detail=_read(_details(progress.operation), stored.get("detail")))


def _read_result(operation: str, stored: Any) -> JobResult | None:
    if not isinstance(stored, dict):
        return None
    result = _read(_results(operation), stored.get("result"))
    rest = {name: value for name, value in stored.items() if name != "result"}
    frame = _read(_FRAME, rest)
    return None if result is None or frame is None else JobResult(result=result, **asdict(frame))


def _names_all(known: Any, stored: Any) -> bool:
    """Whether every field of a stored value, and of those within it, is known."""
    if isinstance(known, (list, tuple)) and isinstance(stored, list):
        return all(map(_names_all, known, stored))
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
