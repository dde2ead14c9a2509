"""Going down: a flag that refuses new calls and ends long ones, while running ones end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine, Iterator
from typing import Any, TypeVar

from hvp_service.calls.errors import ServiceError

Result = TypeVar("Result")

RETRY_AFTER_S = 5.0


def draining() -> ServiceError:
    """Make the refusal of a call that comes while the server goes down."""
    return ServiceError(
        "SERVER_DRAINING",
        "The server is going down; call again when it is back.",
        retry_after_s=RETRY_AFTER_S,
    )


class Drain:
    """A flag that is set once, when the server is asked to stop."""

    def __init__(self) -> None:
        self._begun = asyncio.Event()
        self._num_calls = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def begin(self) -> None:
        """Refuse new calls and end those that would wait."""
        self._begun.set()

    @property
    def begun(self) -> bool:
        """Whether the server is going down."""
        return self._begun.is_set()

    async def wait(self) -> None:
        """Return when the server goes down."""
        await self._begun.wait()

    def refuse(self) -> None:
        """Refuse a call while the server goes down.

        Raises:
            ServiceError: SERVER_DRAINING.
        """
        if self.begun:
            raise draining()

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """Count a call as running for the block.

        Raises:
            ServiceError: SERVER_DRAINING.
        """
        self.refuse()
        self._num_calls += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._num_calls -= 1
            if not self._num_calls:
                self._idle.set()

    async def idle(self, timeout_s: float) -> None:
        """Return when no call runs, or when the time is up."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), timeout_s)

    async def or_refuse(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Await `work`, but only as long as the server stays up.

        Raises:
            ServiceError: SERVER_DRAINING.
        """
        task = asyncio.ensure_future(work)
        begun = asyncio.ensure_future(self._begun.wait())
        try:
            await asyncio.wait({task, begun}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                self.refuse()
            return await task
        finally:
            begun.cancel()
            task.cancel()
