"""The state of a run written down: as shards of vectors, small tensors and plain values.

A state is a dataclass of numbers, words, tensors and dataclasses of these, singly or in lists. Its
fields are all that a run knows, so a state that is written at one step and read in another process
goes on as if nothing had happened, bit for bit.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, TypeVar, final

from torch import Tensor

StateT = TypeVar("StateT")

_NUM_USED = "num_used"


def vectors_of_the_space(num_used: str) -> Mapping[str, str]:
    """Metadata of a field that holds rows of vectors, of which each process has its part.

    Args:
        num_used: The property that counts the leading rows which hold something; the others are
            allocated when the state is read, and not written.
    """
    return {_NUM_USED: num_used}


@final
@dataclass(frozen=True)
class Snapshot:
    """A state without its types.

    Attributes:
        shards: Rows (r, local) of vectors by the field's path: this process' part of each, on the
            device of the run's vectors.
        tensors: Small tensors on the CPU by the field's path, the same on every process.
        values: Numbers, words and lists of these by the field's path, the same on every process;
            JSON holds them exactly.
    """

    shards: dict[str, Tensor] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)


def written(state: Any) -> Snapshot:
    """Take a snapshot of a state.

    Args:
        state: A dataclass of the kinds of fields that the module's docstring lists.

    Returns:
        The snapshot. Its tensors are the state's own: they change with its next step.

    Raises:
        TypeError: A field holds something that cannot be written.
    """
    snapshot = Snapshot()
    _write(state, "", snapshot)
    return snapshot


def _write(value: Any, path: str, into: Snapshot) -> None:
    if is_dataclass(value):
        into.values[path] = {}  # there is one
        for each in fields(value):
            inner, here = f"{path}.{each.name}".lstrip("."), getattr(value, each.name)
            if _NUM_USED in each.metadata:
                into.values[inner] = len(here)
                into.shards[inner] = here[: getattr(value, each.metadata[_NUM_USED])]
            else:
                _write(here, inner, into)
    elif isinstance(value, Tensor):
        into.tensors[path] = value
    elif isinstance(value, list | tuple) and any(map(is_dataclass, value)):
        into.values[path] = len(value)
        for index, each in enumerate(value):
            _write(each, f"{path}.{index}", into)
    elif isinstance(value, list | tuple):
        into.values[path] = [_plain(each, path) for each in value]
    else:
        into.values[path] = _plain(value, path)


def _plain(value: Any, path: str) -> Any:
    """The value as JSON has it, which has no infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is not None and not isinstance(value, bool | int | float | str):
        raise TypeError(f"{path} is a {type(value).__name__}: no state can hold that")
    return value


def restored(kind: type[StateT], snapshot: Snapshot) -> StateT:
    """Make a state from a snapshot.

    Args:
        kind: The state's dataclass.
        snapshot: A snapshot, as `written` gives it.

    Returns:
        A state with tensors of its own.
    """
    return typing.cast("StateT", _read(kind, "", snapshot))


def _read(hint: Any, path: str, snapshot: Snapshot) -> Any:
    kind = _without_none(hint)
    if path in snapshot.tensors:
        return snapshot.tensors[path].clone()
    value = snapshot.values[path]
    if value is None:
        return None
    if is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        made = {}
        for each in fields(kind):
            inner = f"{path}.{each.name}".lstrip(".")
            if inner in snapshot.shards:
                used = snapshot.shards[inner]
                made[each.name] = used.new_empty(snapshot.values[inner], *used.shape[1:])
                made[each.name][: len(used)] = used
            else:
                made[each.name] = _read(hints[each.name], inner, snapshot)
        return typing.cast("Any", kind)(**made)
    if typing.get_origin(kind) in (list, tuple):
        of, sequence = typing.get_args(kind)[0], typing.get_origin(kind)
        if isinstance(value, int):
            return sequence(_read(of, f"{path}.{index}", snapshot) for index in range(value))
        return sequence(of(each) for each in value)
    return float(value) if kind is float else value


def _without_none(hint: Any) -> Any:
    """The type that a value has if it is not None."""
    if typing.get_origin(hint) in (typing.Union, UnionType):
        return next(each for each in typing.get_args(hint) if each is not NoneType)
    return hint
