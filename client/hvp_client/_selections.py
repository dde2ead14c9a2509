"""Selections of a model's parameters: by patterns of their names, or divided into blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from hvp_operations.operation import SpecError
from hvp_operations.parameters import globs_of, select
from hvp_operations.partition import Partition
from hvp_operations.wording import clipped

from hvp_client._checkpoints import ParameterTensor
from hvp_client._exceptions import InvalidArgumentError


def as_globs(value: Any, field: str = "parameters") -> tuple[str, ...]:
    """Patterns as a tuple, from None, one pattern or several; None gives ().

    Raises:
        InvalidArgumentError: `PARAMETERS_INVALID`: the value is none of these, or is empty.
    """
    if value is None:
        return ()
    with refusals():
        return globs_of(value, field)


@contextmanager
def refusals() -> Iterator[None]:
    """Raise what a spec is refused for as an `InvalidArgumentError`."""
    try:
        yield
    except SpecError as error:
        raise InvalidArgumentError(
            error.message, reason=error.reason, field=error.field, metadata=error.metadata
        ) from None


def chosen(
    globs: Sequence[str], tensors: Sequence[ParameterTensor], field: str = "parameters"
) -> tuple[ParameterTensor, ...]:
    """The tensors that patterns select, with offsets into vectors of their own.

    Raises:
        InvalidArgumentError: `PARAMETERS_NOT_FOUND`, with the nearest names; `PARAMETERS_INVALID`.
    """
    with refusals():
        names = set(select(globs, [tensor.name for tensor in tensors], field))
    found, offset = [], 0
    for tensor in tensors:
        if tensor.name in names:
            found.append(replace(tensor, offset=offset))
            offset += tensor.num_elements
    return tuple(found)


def in_blocks(
    by: str | Sequence[Any] | Mapping[str, Any], tensors: Sequence[ParameterTensor]
) -> dict[str, list[str]]:
    """Divide tensors into blocks, so that each tensor is in one of them.

    Args:
        by: `layer`, `tensor`, or the blocks' patterns. Each block has one pattern or several;
            blocks in a mapping have its names, and blocks in a sequence are named by their
            patterns.
        tensors: The tensors to divide.

    Returns:
        Names of the tensors of each block, in the order of `tensors`.

    Raises:
        InvalidArgumentError: `PARAMETERS_NOT_FOUND`: a pattern selects nothing.
            `PARAMETERS_INVALID`: `by` is another word, or a tensor is in two blocks or in none.
    """
    with refusals():
        return Partition.of(by).divide([tensor.name for tensor in tensors])


def in_words(globs: Sequence[str]) -> str:
    """A selection as a phrase, such as ` in *.mlp.*`; "" where all parameters are selected."""
    few = ", ".join(clipped(glob) for glob in globs[:2])
    return f" in {few}{', ...' if len(globs) > 2 else ''}" if globs else ""
