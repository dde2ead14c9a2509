"""The one exception of the mathematics: a reason code, what happened, what to do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import torch


def is_out_of_memory(error: Exception) -> bool:
    """Whether torch, or Python, could not allocate; on a CPU torch has no type for that."""
    refused = isinstance(error, RuntimeError) and "allocate" in str(error)
    return refused or isinstance(error, MemoryError | torch.OutOfMemoryError)


@final
class CurvatureError(Exception):
    """A model, batch or vector that cannot give a correct number.

    Attributes:
        reason: UPPER_SNAKE code, as in the protos' comments.
        message: A sentence that says what happened and what to do.
        metadata: Names and figures for programs, by key.
    """

    def __init__(self, reason: str, message: str, metadata: Mapping[str, str] | None = None):
        super().__init__(reason, message, dict(metadata or {}))
        self.reason = reason
        self.message = message
        self.metadata = dict(metadata or {})

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}"
