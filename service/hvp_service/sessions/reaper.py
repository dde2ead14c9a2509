"""The loop that ends sessions and vectors when their time is up."""

from __future__ import annotations

import asyncio
import contextlib
from typing import final

import structlog

from hvp_service.sessions.store import SessionStore
from hvp_service.storage.clock import SECOND, now_us

_SHORTEST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 15.0
# The loop comes round late by milliseconds when it is busy. By more it was stopped: the process or
# the machine was suspended, the database was locked, or the clock was set.
_STOPPED_US = SECOND
_AGAIN_US = SECOND  # after a failure, which may have passed

log = structlog.get_logger()


@final
class Reaper:
    """Ends sessions soon after their time, and never for a silence that was the server's own."""

    def __init__(self, sessions: SessionStore):
        self._sessions = sessions
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin the loop."""
        self._task = asyncio.create_task(self._loop())

    async def stop(self) -> None:
        """End the loop."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _loop(self) -> None:
        looked, pause_s = now_us(), 0.0
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._sessions.opened.wait(), pause_s)
            self._sessions.opened.clear()
            try:
                late_us = now_us() - looked - int(pause_s * SECOND)
                looked = now_us()
                if late_us > _STOPPED_US:
                    log.warning("the server was stopped", seconds=late_us / SECOND)
                    await self._sessions.recover()
                due = await self._sessions.expire()
            except Exception:
                log.exception("sessions were not looked through; trying again")
                due = now_us() + _AGAIN_US
            # A damaged row's time is no number.
            left_s = (due - now_us()) / SECOND if isinstance(due, int) else _LONGEST_PAUSE_S
            pause_s = min(max(left_s, _SHORTEST_PAUSE_S), _LONGEST_PAUSE_S)
