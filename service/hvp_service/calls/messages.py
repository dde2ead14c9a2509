"""Conversions between values and messages that all services share."""

from __future__ import annotations

from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from hvp_service.calls.paging import PageRequest


def timestamp(time_us: int | None) -> Timestamp | None:
    """The message of a time in microseconds since the epoch."""
    if time_us is None:
        return None
    message = Timestamp()
    message.FromMicroseconds(time_us)
    return message


def enum_name(enum: Any, value: int) -> str:
    """Name of an enum value; of the zero value for a number that this version does not know."""
    names = {number: name for name, number in enum.items()}
    return str(names.get(value, names[0]))


def enum_value(enum: Any, name: str) -> Any:
    """Number of an enum value; zero for a name that this version does not know."""
    return dict(enum.items()).get(name, 0)


def page_request(request: Any) -> PageRequest:
    """The page that a List request asks for."""
    return PageRequest(size=request.page_size, token=request.page_token)
