"""Selections of a model's parameters: by patterns of their names, or divided into blocks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from hvp_operations.operation import SpecError
from hvp_operations.parameters import layer_of, select
from hvp_operations.wording import clipped, shown

from hvp_client._checkpoints import ParameterTensor
from hvp_client._exceptions import InvalidArgumentError


def as_globs(value: Any, field: str = "parameters") -> tuple[str, ...]:
    """Patterns as a tuple, from None, one pattern or several; None gives ().

    Raises:
        InvalidArgumentError: `PARAMETERS_INVALID`: the value is none of these, or is empty.
    """
    if value is None:
        return ()
    if not isinstance(value, Iterable):
        raise _invalid(f"{field} are patterns of names, not {shown(value)}.", field)
    found = (value,) if isinstance(value, str) else tuple(value)
    if not all(isinstance(each, str) for each in found):
        raise _invalid(f"{field} are patterns of names, not {shown(found)}.", field)
    if not found:
        raise _invalid("No pattern selects no parameter; None selects all.", field)
    for each in found:
        if not each.isprintable():
            raise _invalid(
                f"{field}: {clipped(each)!a} is no pattern of names of parameters.", field
            )
    return found


def chosen(
    globs: Sequence[str], tensors: Sequence[ParameterTensor], field: str = "parameters"
) -> tuple[ParameterTensor, ...]:
    """The tensors that patterns select, with offsets into vectors of their own.

    Raises:
        InvalidArgumentError: `PARAMETERS_NOT_FOUND`, with the nearest names; `PARAMETERS_INVALID`.
    """
    try:
        names = set(select(globs, [tensor.name for tensor in tensors], field))
    except SpecError as error:
        raise InvalidArgumentError(
            error.message, reason=error.reason, field=error.field, metadata=error.metadata
        ) from None
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
    names = [tensor.name for tensor in tensors]
    if isinstance(by, str):
        if by not in ("layer", "tensor"):
            raise _no_blocks(by)
        blocks: dict[str, list[str]] = {}
        for name in names:
            blocks.setdefault(name if by == "tensor" else layer_of(name), []).append(name)
        return blocks
    if isinstance(by, Mapping):
        asked = {str(name): as_globs(globs, "by") for name, globs in by.items()}
    elif isinstance(by, Iterable):
        asked = {}
        for globs in by:
            patterns = as_globs(globs, "by")
            name = ", ".join(patterns)
            if name in asked:
                raise _invalid(f"Two blocks have the same patterns, {shown(name)}.", "by")
            asked[name] = patterns
    else:
        raise _no_blocks(by)
    block_of: dict[str, str] = {}
    for block, globs in asked.items():
        for tensor in chosen(globs, tensors, "by"):
            if tensor.name in block_of:
                raise _invalid(
                    f"{tensor.name} is in two blocks, {shown(block_of[tensor.name])} and "
                    f"{shown(block)}.",
                    "by",
                )
            block_of[tensor.name] = block
    left = [name for name in names if name not in block_of]
    if left:
        raise _invalid(
            f"{len(left)} tensors are in no block, {left[0]} among them; restrict the operator "
            "first, or give them a block.",
            "by",
        )
    return {block: [name for name in names if block_of[name] == block] for block in asked}


def in_words(globs: Sequence[str]) -> str:
    """A selection as a phrase, such as ` in *.mlp.*`; "" where all parameters are selected."""
    few = ", ".join(clipped(glob) for glob in globs[:2])
    return f" in {few}{', ...' if len(globs) > 2 else ''}" if globs else ""


def _no_blocks(by: Any) -> InvalidArgumentError:
    return _invalid(f"by must be 'layer', 'tensor' or lists of patterns, not {shown(by)}.", "by")


def _invalid(message: str, field: str) -> InvalidArgumentError:
    return InvalidArgumentError(message, reason="PARAMETERS_INVALID", field=field)
