"""Names of enum values on the wire, those of servers newer than this client included."""

from __future__ import annotations

from typing import Any


def plain_name(enum: Any, number: int, prefix: str) -> str:
    """Name of an enum value without its prefix; `UNKNOWN_7` where this client has none for 7.

    Args:
        enum: A message's enum, as in `job_pb2.Job.State`.
        number: The value; proto3 hands on numbers that it does not know.
        prefix: Prefix of every name in the enum, as in `STATE_`.

    Returns:
        The name.
    """
    names: dict[int, str] = {value: name for name, value in enum.items()}
    return names.get(number, f"UNKNOWN_{number}").removeprefix(prefix)
