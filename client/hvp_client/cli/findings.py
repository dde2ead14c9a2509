"""What `hvp doctor` finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was examined: the verdict on it, and what would mend a problem."""

    what: str
    verdict: Literal["ok", "note", "problem"]
    found: str
    fix: str = ""
