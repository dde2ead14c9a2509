"""Selection of a model's parameters by patterns of their names, as shells have them.

`*` stands for any characters, dots among them, `?` for one, `[...]` for one of several; upper and
lower case differ. A pattern selects whole tensors by their canonical name, so that a tied tensor
goes by its first name alone.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from hvp_operations.operation import SpecError
from hvp_operations.wording import clipped, shown

MOST_NAMES = 4096  # in a request
MOST_PATTERNS = 64  # of these, ones that are compared with every name
LONGEST = 512  # characters
_NEAREST = 5
_SPECIAL = re.compile(r"[*?\[]")
_LAYER = re.compile(r"(.*?\.\d+)\.")


def select(
    globs: Sequence[str], names: Sequence[str], field: str = "parameters"
) -> tuple[str, ...]:
    """Select names by patterns; no pattern selects all of them.

    Args:
        globs: Patterns; each has to select something.
        names: Names of all parameters, in canonical order.
        field: Name of the request's field, for errors.

    Returns:
        The selected names in canonical order, so that two lists of patterns that select the same
        parameters give the same names.

    Raises:
        SpecError: PARAMETERS_INVALID: too many patterns, or too long ones. PARAMETERS_NOT_FOUND: a
            pattern selects nothing; the message lists the nearest names.
    """
    if not globs:
        return tuple(names)
    _check(globs, field)
    known, selected = set(names), set[str]()
    for glob in globs:
        if glob in known:
            selected.add(glob)
            continue
        found = [name for name in names if fnmatchcase(name, glob)]
        if not found:
            raise _nothing(glob, names, field)
        selected.update(found)
    return tuple(name for name in names if name in selected)


def globs_of(value: Any, field: str = "parameters") -> tuple[str, ...]:
    """Patterns as a tuple, from one pattern or several.

    Raises:
        SpecError: PARAMETERS_INVALID: the value is none of these, or is empty.
    """
    if not isinstance(value, Iterable):
        raise _invalid(f"{field} are patterns of names, not {shown(value)}.", field)
    found = (value,) if isinstance(value, str) else tuple(value)
    if not all(isinstance(each, str) for each in found):
        raise _invalid(f"{field} are patterns of names, not {shown(found)}.", field)
    if not found:
        raise _invalid("No pattern selects no parameter; '*' selects all.", field)
    for each in found:
        if not each.isprintable():
            raise _invalid(
                f"{field}: {clipped(each)!a} is no pattern of names of parameters.", field
            )
    return found


def layer_of(name: str) -> str:
    """The layer of a parameter: its name up to the first number, or else its module."""
    found = _LAYER.match(name)
    return found[1] if found else name.rpartition(".")[0] or name


def _check(globs: Sequence[str], field: str) -> None:
    patterns = sum(1 for glob in globs if _SPECIAL.search(glob))
    if len(globs) > MOST_NAMES or patterns > MOST_PATTERNS:
        raise SpecError(
            "PARAMETERS_INVALID",
            f"{len(globs)} patterns, {patterns} of them with wildcards; give at most {MOST_NAMES}, "
            f"{MOST_PATTERNS} of them with wildcards.",
            field,
        )
    for index, glob in enumerate(globs):
        if not glob or len(glob) > LONGEST:
            raise SpecError(
                "PARAMETERS_INVALID",
                f"A pattern of a parameter's name has from 1 to {LONGEST} characters, not "
                f"{len(glob)}.",
                f"{field}[{index}]",
            )


def _nothing(glob: str, names: Sequence[str], field: str) -> SpecError:
    # Without its wildcards a pattern is as near to a name as its words are.
    words = _SPECIAL.sub("", glob)
    nearest = difflib.get_close_matches(words, names, _NEAREST, cutoff=0.3) or names[:_NEAREST]
    return SpecError(
        "PARAMETERS_NOT_FOUND",
        f"No parameter is called {shown(glob)}; the nearest are {', '.join(nearest)}. A tied "
        "tensor goes by its first name alone.",
        field,
        {"glob": glob, "nearest": ", ".join(nearest)[:1024]},
    )


def _invalid(message: str, field: str) -> SpecError:
    return SpecError("PARAMETERS_INVALID", message, field)
