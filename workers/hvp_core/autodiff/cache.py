"""A cache of what is dear to make."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar, final

T = TypeVar("T")


@final
class Cache(Generic[T]):
    """The values that were used last, each by the key of what it was made from.

    Args:
        kept: Number of values that are kept.
    """

    def __init__(self, kept: int) -> None:
        self._kept = kept
        self._found: OrderedDict[Hashable, T] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """The value of a key, made if it is not there."""
        if key not in self._found:
            self._found[key] = make()
            while len(self._found) > self._kept:
                self._found.popitem(last=False)
        self._found.move_to_end(key)
        return self._found[key]
