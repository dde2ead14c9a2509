"""The parts of a dataclass' docstring, for help texts and for docstrings that are made of it."""

from __future__ import annotations

import inspect
import re


def paragraphs(kind: type) -> list[str]:
    """The paragraphs before the attributes, each in one line."""
    text = inspect.cleandoc(kind.__doc__ or "").partition("\nAttributes:\n")[0]
    return [" ".join(paragraph.split()) for paragraph in text.strip().split("\n\n")]


def attributes(kind: type) -> dict[str, str]:
    """The description of each attribute, in one line, by the attribute's name."""
    section = inspect.cleandoc(kind.__doc__ or "").partition("\nAttributes:\n")[2]
    entries = re.split(r"^    (?=\w+: )", section, flags=re.MULTILINE)
    found = (entry.partition(": ") for entry in entries if entry.strip())
    return {name.strip(): " ".join(text.split()) for name, _, text in found}
