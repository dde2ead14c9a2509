"""What may be given where a handle is wanted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard, TypeVar

from hvp_client._exceptions import InvalidArgumentError

Handle = TypeVar("Handle")


def require_handle(value: Any, handle: type[Handle], field: str) -> Handle:
    """Refuse what is no handle of this class, with what to do where it is numbers.

    Args:
        value: What the caller gave.
        handle: The class.
        field: The argument's name.

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
