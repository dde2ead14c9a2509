"""Names of resources, given as text or as the objects that have them."""

from __future__ import annotations

from typing import Any

from hvp_client._exceptions import InvalidArgumentError


def name_of(value: Any, field: str) -> str:
    """Name of a resource, given by its name or as the object that has it.

    Args:
        value: The name, or the object.
        field: Name of the argument, for the error.

    Returns:
        The name, unchecked.

    Raises:
        InvalidArgumentError: `RESOURCE_NAME_INVALID`: `value` is no text and has no name.
    """
    name = value if isinstance(value, str) else getattr(value, "name", None)
    if isinstance(name, str):
        return name
    raise InvalidArgumentError(
        f"{field} must be a name or what has one, as a Checkpoint has, not {type(value).__name__}",
        reason="RESOURCE_NAME_INVALID",
        field=field,
    )
