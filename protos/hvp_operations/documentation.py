"""What a dataclass' docstring says, taken apart: for help texts and for docstrings made of it."""

from __future__ import annotations

import inspect
import re


def paragraphs(kind: type) -> list[str]:
    """What comes before the attributes, each paragraph in one line."""
    text = inspect.cleandoc(kind.__doc__ or "").partition("\nAttributes:\n")[0]
    return [" ".join(paragraph.split()) for paragraph in text.strip().split("\n\n")]


def attributes(kind: type) -> dict[str, str]:
    """What each attribute means, in one line, by its name."""
    section = inspect.cleandoc(kind.__doc__ or "").partition("\nAttributes:\n")[2]
    entries = re.split(r"^    (?=\w+: )", section, flags=re.MULTILINE)
    found = (entry.partition(": ") for entry in entries if entry.strip())
    return {name.strip(): " ".join(text.split()) for name, _, text in found}
