"""How much JSON may hold, counted in its bytes before it becomes objects.

A list of two characters becomes one of seventy bytes, an entry of eight becomes two hundred: a
limit of length alone is no limit of memory. Signs inside strings are counted too, so limits leave
room for text that quotes JSON.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class JsonBounds:
    """Limits on everything in a document that costs memory.

    Attributes:
        num_bytes: Most bytes in the document.
        num_objects: Most objects, counted as opening braces.
        num_lists: Most lists, counted as opening brackets.
        num_items: Most items, counted as commas.
    """

    num_bytes: int
    num_objects: int
    num_lists: int
    num_items: int

    def exceeded_by(self, raw: bytes) -> str:
        """The excess of a document over a limit, in words that follow "has"; "" for none."""
        if len(raw) > self.num_bytes:
            return f"{len(raw)} bytes, {self.num_bytes} are possible"
        for sign, most, what in (
            (b"{", self.num_objects, "objects"),
            (b"[", self.num_lists, "lists"),
            (b",", self.num_items, "entries"),
        ):
            found = raw.count(sign)
            if found > most:
                return f"{found} {what}, {most} are possible"
        return ""
