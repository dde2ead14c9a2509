"""Waiting for a busy database, where there is no caller who could be told to call again."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import structlog

from hvp_service.storage.troubles import DatabaseBusyError

Result = TypeVar("Result")

_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 5.0

log = structlog.get_logger()


async def until_done(call: Callable[[], Awaitable[Result]]) -> Result:
    """Make a call until the database is not busy, for as long as that takes.

    Args:
        call: The call to make; it has done nothing when it raises DatabaseBusyError.
    """
    pause_s = _FIRST_PAUSE_S
    while True:
        try:
            return await call()
        except DatabaseBusyError as error:
            log.warning("the database is busy; trying again", why=str(error), pause_s=pause_s)
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
