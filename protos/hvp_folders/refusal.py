"""The one exception of this package, which client, service and ranks turn into their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final


@final
class FolderError(Exception):
    """A folder that cannot be served as a checkpoint.

    Attributes:
        reason: UPPER_SNAKE code, as in the protos' comments.
        message: What happened and what to do.
        metadata: Names and figures for programs; `path` is the file at fault.
    """

    def __init__(self, reason: str, message: str, metadata: Mapping[str, str] | None = None):
        super().__init__(reason, message, dict(metadata or {}))
        self.reason = reason
        self.message = message
        self.metadata = dict(metadata or {})

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}"


def files_invalid(message: str, path: str = "") -> FolderError:
    """Make the refusal of a set of files that is no checkpoint.

    Args:
        message: What is wrong and what to do.
        path: Name of the file at fault, or "".
    """
    metadata = {"path": path[:200]} if path else {}
    return FolderError("CHECKPOINT_FILES_INVALID", message, metadata)
