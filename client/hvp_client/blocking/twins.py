"""The base of every blocking handle: an awaited twin, and the portal on which its calls run."""

from __future__ import annotations

from abc import ABC
from collections.abc import Coroutine
from typing import Any, ClassVar

from hvp_client._results import with_vectors
from hvp_client.blocking.portal import Portal


class Blocking(ABC):  # noqa: B024 (what it can do is its twin's)
    """A handle whose calls wait for those of its twin.

    Law: for every public f, h.f(x) waits for twin.f(x) and gives the same, with a blocking handle
    for every awaited one, in the arguments and in what comes back.

    Args:
        portal: The client's portal, on which the twin's calls run.
        twin: The awaited handle.
    """

    _kinds: ClassVar[dict[type[Any], type[Blocking]]] = {}  # by the class of the twin

    def __init_subclass__(cls, *, twin: type[Any] | None = None) -> None:
        """Register the class as the blocking side of `twin`."""
        if twin is not None:
            Blocking._kinds[twin] = cls

    def __init__(self, portal: Portal, twin: Any):
        self._portal = portal
        self._twin = twin

    def _wait(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Await a call that gives handles, and give blocking ones."""
        if coroutine is NotImplemented:  # by a method of arithmetic, of something else's
            return NotImplemented
        return self._blocking(self._portal.run(coroutine))

    def _blocking(self, value: Any) -> Any:
        kind = self._kinds.get(type(value))
        if kind is not None:
            return kind(self._portal, value)
        if isinstance(value, list):
            return [self._blocking(each) for each in value]
        if isinstance(value, dict):
            return {name: self._blocking(each) for name, each in value.items()}
        return with_vectors(value, self._blocking)


def twin_of(value: Any) -> Any:
    """Replace blocking handles by their twins, for a call of the awaited side.

    Args:
        value: A blocking handle, a list or tuple of them, a question's result, or anything else.

    Returns:
        The handle's twin, a list of twins, the result with twins for its vectors, or the value
        itself.
    """
    if isinstance(value, Blocking):
        return value._twin
    if isinstance(value, (list, tuple)) and any(isinstance(each, Blocking) for each in value):
        return [twin_of(each) for each in value]
    return with_vectors(value, twin_of)
