"""What is known of a call while it runs, for the lines that the log has of it."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, MutableMapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any


@dataclass(kw_only=True)
class CallRecord:
    """A call that runs.

    Attributes:
        request_id: Name of the call, under which the log has it and its caller is told of it.
        names: Fields of every line of the call: method, project, job.
        refusal: Fields of its last line that say why it was refused, or what went wrong.
    """

    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    names: dict[str, str] = field(default_factory=dict)
    refusal: dict[str, Any] = field(default_factory=dict)


_CURRENT: ContextVar[CallRecord | None] = ContextVar("call", default=None)


def current_call() -> CallRecord:
    """The record of the call in whose task this is asked; a new one outside of calls."""
    return _CURRENT.get() or CallRecord()


def begin_call(names: Mapping[str, str]) -> CallRecord:
    """A record for the call that begins in this task, which ends with it."""
    record = CallRecord(names=dict(names))
    _CURRENT.set(record)
    return record


def add_call(_: Any, __: str, line: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Give a line of the log the names of the call that it is written in; a processor."""
    if (call := _CURRENT.get()) is not None:
        line.setdefault("request_id", call.request_id)
        for name, value in call.names.items():
            line.setdefault(name, value)
    return line
