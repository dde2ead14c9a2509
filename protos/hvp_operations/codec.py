"""Dataclasses as messages and back, by the names of their fields.

An enum's value is a word without the enum's prefix, in the letters in which the dataclass has it; a
number that this version does not know reads as `UNKNOWN_7`. An unspecified one reads as `auto`
where there is that word: a client that is older than the field leaves it out. A field that may be
None is None where its message has no value, or zero in a field that cannot tell the two apart.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from google.protobuf.message import Message

from hvp_operations.checking import field_types, without_none

MessageT = TypeVar("MessageT", bound=Message)


def to_message(value: Any, message: MessageT) -> MessageT:
    """Fill a message from the fields of the same names in a dataclass.

    Args:
        value: Instance of a dataclass; fields that the message lacks are left out.
        message: An empty message.

    Returns:
        `message`, filled.
    """
    for field in message.DESCRIPTOR.fields:
        given = getattr(value, field.name, None)
        if given is None:
            continue
        if field.message_type is None:
            _set_scalars(message, field, given)
        elif field.message_type.GetOptions().map_entry:
            getattr(message, field.name).update(given)
        elif field.is_repeated:
            for item in given:
                to_message(item, getattr(message, field.name).add())
        else:
            to_message(given, getattr(message, field.name))
    return message


def _set_scalars(message: Message, field: Any, given: Any) -> None:
    if field.enum_type is not None:
        name = f"{prefix(field.enum_type)}{given.upper()}"
        given = field.enum_type.values_by_name[name].number
    if field.is_repeated:
        getattr(message, field.name).extend(given)
    else:
        setattr(message, field.name, given)


def to_values(
    message: Message, kind: type, *, numbers: Callable[[Sequence[float]], Any] = tuple
) -> dict[str, Any]:
    """Read the fields of a dataclass from a message, without checking them.

    Args:
        message: A message with fields of the same names; its other fields are left out.
        kind: The dataclass.
        numbers: Makes the value of a repeated field of numbers.

    Returns:
        Values by field, for the dataclass' constructor.
    """
    known = message.DESCRIPTOR.fields_by_name
    return {
        name: _value(message, known[name], *without_none(hint), numbers)
        for name, hint in field_types(kind).items()
        if name in known and _is_told(message, known[name])
    }


def to_plain(message: Message, kind: type) -> dict[str, Any]:
    """Read the fields of a dataclass as JSON has them: dataclasses within are dicts."""
    found = to_values(message, kind)
    for name, value in found.items():
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            found[name] = dataclasses.asdict(value)
    return found


def _is_told(message: Message, field: Any) -> bool:
    """Whether a field has a value; an unset message has none, and takes the dataclass' default."""
    within = field.message_type is not None and not field.is_repeated
    return not within or message.HasField(field.name)


def _value(
    message: Message,
    field: Any,
    hint: Any,
    may_be_none: bool,
    numbers: Callable[[Sequence[float]], Any],
) -> Any:
    value = getattr(message, field.name)
    if field.message_type is not None:
        if field.message_type.GetOptions().map_entry:
            return dict(value)
        inner = typing.get_args(hint)[0] if field.is_repeated else hint
        if not dataclasses.is_dataclass(inner):
            return tuple(value)
        kind = typing.cast("type", inner)
        if field.is_repeated:
            return tuple(kind(**to_values(item, kind, numbers=numbers)) for item in value)
        return kind(**to_values(value, kind, numbers=numbers))
    if field.enum_type is not None:
        found, words = word(field.enum_type, value), typing.get_args(hint)
        if found == "UNSPECIFIED" and "auto" in words:
            return "auto"
        return next((each for each in words if each.upper() == found), found)
    if field.is_repeated:
        return tuple(value) if field.type == field.TYPE_STRING else numbers(value)
    if may_be_none:
        is_there = message.HasField(field.name) if field.has_presence else bool(value)
        return value if is_there else None
    return value


def word(enum: Any, number: int) -> str:
    """Name of an enum's value without the enum's prefix; `UNKNOWN_7` where 7 has no name."""
    known = enum.values_by_number.get(number)
    return f"UNKNOWN_{number}" if known is None else known.name.removeprefix(prefix(enum))


def prefix(enum: Any) -> str:
    """The prefix that the names of an enum's values share, as in `WHICH_`."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", enum.name).upper() + "_"
