"""A gang of ranks that run the same method of their engines in step."""

from __future__ import annotations

import traceback
from abc import ABC, abstractmethod
from typing import Any

from hvp_workers.backend import BackendError, RankInfo


class Group(ABC):
    """One engine per rank; a method runs on all of them or the group is lost.

    Law: calls start on every rank in the order in which `run` was called, so collectives inside
    the engines pair up.
    """

    generation: str = ""  # changes with every start
    device: str
    num_ranks: int

    @abstractmethod
    async def start(self) -> None:
        """Start the ranks, each with an engine; on failure nothing is left behind.

        Raises:
            GroupLostError: WORKER_GROUP_START_FAILED, with what to change.
        """

    @abstractmethod
    async def run(self, method: str, *arguments: Any) -> list[Any]:
        """Call `engine.method(*arguments)` on every rank; results in order of rank.

        Raises:
            BackendError: The error that every rank raised; the group lives on.
            GroupLostError: WORKER_GROUP_LOST when a rank died, hung, or failed alone; the whole
                group has been ended.
        """

    @abstractmethod
    async def ranks(self) -> list[RankInfo]:
        """The living processes and their memory now; it does not wait for a method that runs.

        Raises:
            BackendError: WORKER_GROUP_LOST: no process lives.
        """

    @abstractmethod
    async def close(self) -> None:
        """End the ranks, whatever they compute; idempotent.

        A method that still runs is given up, and its caller gets GroupLostError.
        """


def as_backend_error(error: Exception) -> BackendError:
    """A rank's error in the form that crosses processes; call it where `error` is caught."""
    if isinstance(error, BackendError):
        return error
    name = type(error).__name__
    return BackendError("INTERNAL", f"{name}: {error}", {"exception": name}, traceback.format_exc())
