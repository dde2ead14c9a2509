"""Lifetimes: what a vector belongs to, and which things are in use at present."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Collection, Coroutine, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, final


@final
@dataclass(frozen=True, kw_only=True)
class Lifetime:
    """When a vector goes by itself. By default never: it is kept, or belongs to a job.

    Attributes:
        session: Id of the session that it goes with; "" for none.
        expire_time: When the vector goes unless it is used before, in microseconds; None for never.
        kept: Whether a caller has asked that it stay, so that it does not go with its job either.
    """

    session: str = ""
    expire_time: int | None = None
    kept: bool = False


UNTIL_DELETED = Lifetime()
KEPT = Lifetime(kept=True)


@final
class Uses:
    """Counts the users of things, by id, so that a thing that is to go waits for its last user.

    Law: an id that was told to leave is given out once, by `leave` or by the `end` of its last use.
    """

    def __init__(self) -> None:
        self._users: Counter[str] = Counter()
        self._leaving: set[str] = set()

    @property
    def ids(self) -> list[str]:
        """Ids of everything in use."""
        return list(self._users)

    def begin(self, ids: Iterable[str]) -> None:
        """Note one more user of each."""
        self._users.update(ids)

    def end(self, ids: Iterable[str]) -> list[str]:
        """Note that one user of each has left, and return the ids that may leave now."""
        free = []
        for identifier in ids:
            self._users[identifier] -= 1
            if not self._users[identifier]:
                del self._users[identifier]
                if identifier in self._leaving:
                    self._leaving.remove(identifier)
                    free.append(identifier)
        return free

    def leave(self, ids: Iterable[str]) -> list[str]:
        """Tell things to leave, and return the ids of those that nobody uses: they may go now."""
        wanted = set(ids)
        self._leaving |= wanted & self._users.keys()
        return sorted(wanted - self._users.keys())


@final
class Holds:
    """Uses whose things are removed in the background when their last user has left.

    Args:
        remove: Removes things that nobody uses, by id; an exception of it is a fault.
    """

    def __init__(self, remove: Callable[[Collection[str]], Coroutine[Any, Any, None]]):
        self._remove = remove
        self._uses = Uses()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def ids(self) -> list[str]:
        """Ids of everything in use."""
        return self._uses.ids

    @contextlib.contextmanager
    def hold(self, ids: Collection[str]) -> Iterator[None]:
        """Use things for the block: look them up inside of it, and they stay until its end."""
        self._uses.begin(ids)
        try:
            yield
        finally:
            self.remove_soon(self._uses.end(ids))

    def leave(self, ids: Iterable[str]) -> list[str]:
        """Tell things to leave, and return those that nobody uses, for the caller to remove."""
        return self._uses.leave(ids)

    def remove_soon(self, ids: Collection[str]) -> None:
        """Remove things in the background."""
        if ids:
            task = asyncio.create_task(self._remove(ids))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Wait until the things that are being removed are gone."""
        while self._tasks:
            await asyncio.wait(self._tasks)
