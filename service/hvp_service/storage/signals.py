"""Wake-ups: whoever waits for a change of rows hears of it when it is committed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import final


@final
class Signals:
    """Topics that rows are about, and those who wait for news of one.

    Law: who takes a topic's event and then reads the rows misses no change: the event is set once
    a later change is committed, by this server or by another one on the same database.
    """

    def __init__(self) -> None:
        self._events: dict[str, asyncio.Event] = {}
        self._callbacks: dict[str, list[Callable[[], None]]] = {}

    def event(self, topic: str) -> asyncio.Event:
        """The event that the next news of a topic sets; take it before reading the rows."""
        return self._events.setdefault(topic, asyncio.Event())

    def call(self, topic: str, callback: Callable[[], None]) -> None:
        """Have a function called at all news of a topic."""
        self._callbacks.setdefault(topic, []).append(callback)

    def ring(self, topic: str) -> None:
        """Tell the news of a topic."""
        if (event := self._events.pop(topic, None)) is not None:
            event.set()
        for callback in self._callbacks.get(topic, ()):
            callback()

    def ring_all(self) -> None:
        """Tell everybody that there may be news which was missed."""
        for topic in {*self._events, *self._callbacks}:
            self.ring(topic)
