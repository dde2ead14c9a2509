"""Checks of arguments that have to be handles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard, TypeVar

from hvp_client._exceptions import InvalidArgumentError

Handle = TypeVar("Handle")


def require_handle(value: Any, handle: type[Handle], field: str) -> Handle:
    """Refuse a value that is no handle of a class; the message helps where it is an array.

    Args:
        value: The caller's argument.
        handle: Class of the handle.
        field: Name of the argument, for the error.

    Returns:
        The value.

    Raises:
        InvalidArgumentError: `VECTOR_EXPECTED`.
    """
    if isinstance(value, handle):
        return value
    raise InvalidArgumentError(
        f"{field} must be a vector's handle, not {type(value).__name__}; H.vector(array) makes one "
        "of numbers",
        reason="VECTOR_EXPECTED",
        field=field,
    )


def is_sequence_of(value: Any, handle: type[Handle]) -> TypeGuard[Sequence[Handle]]:
    """Whether a list or tuple holds handles of this class."""
    return isinstance(value, (list, tuple)) and any(isinstance(v, handle) for v in value)
