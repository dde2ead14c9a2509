"""One rank in a thread of this process: a laptop's whole service, and the tests'."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import queue
import socket
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from typing import Any, final

import psutil

from hvp_workers.backend import BackendError, GroupLostError, RankInfo, Tuning
from hvp_workers.environment import OFFLINE
from hvp_workers.group import Group, as_backend_error
from hvp_workers.group_backend import GroupBackend
from hvp_workers.rank_process import (
    fix_workspaces,
    loading_modules,
    total_memory,
    use_compile_cache,
)

# An engine that is idle goes in milliseconds; what it computes can take an hour.
_LEAVE_S = 1.0


@final
class RankThread:
    """A thread that makes calls one after another, and that nobody has to wait for.

    Law: every call that was taken on ends: with its value, with its error, or, when the thread is
    given up, with GroupLostError.
    """

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None]
        self._calls = queue.SimpleQueue()
        self._waiting: set[Future[Any]] = set()
        # A daemon: the process may end while it computes. A pool's threads are waited for.
        self._thread = threading.Thread(target=self._work, name="hvp-rank", daemon=True)
        self._thread.start()

    async def call(self, function: Callable[[], Any]) -> Any:
        """Make a call in the thread, after those before it."""
        future: Future[Any] = Future()
        self._waiting.add(future)
        future.add_done_callback(self._waiting.discard)
        self._calls.put((function, future))
        # Shielded: a caller who leaves does not take the call out of the queue.
        return await asyncio.shield(asyncio.wrap_future(future))

    async def end(self) -> None:
        """End the thread; give it up if it computes for longer than an idle one takes to end."""
        self._calls.put(None)
        if not self._waiting:
            await asyncio.to_thread(self._thread.join, _LEAVE_S)
        for future in list(self._waiting):
            _settle(
                future,
                error=GroupLostError("WORKER_GROUP_LOST", "The rank was ended while it computed."),
            )

    def _work(self) -> None:
        while (work := self._calls.get()) is not None:
            function, future = work
            if future.done():  # given up before its turn
                continue
            try:
                value = function()
            except Exception as error:  # any failure is reported by value
                _settle(future, error=as_backend_error(error))
            else:
                _settle(future, value=value)
            del work, function, future


def _settle(future: Future[Any], *, value: Any = None, error: Exception | None = None) -> None:
    """Set the outcome of a call, unless it was given up meanwhile."""
    with contextlib.suppress(InvalidStateError):
        if error is None:
            future.set_result(value)
        else:
            future.set_exception(error)


@final
class InProcessGroup(Group):
    """A group of one; its engine runs in a thread of its own, one call at a time."""

    num_ranks = 1

    def __init__(
        self, device: str, tuning: Tuning, *, engine: str = "hvp_workers.engine:RankEngine"
    ):
        self.device = device
        self._tuning = tuning
        self._engine_name = engine  # "module:callable", called with (collective, device, tuning)
        self._engine: Any = None
        self._num_threads = self._memory_bytes = 0
        self._thread: RankThread | None = None

    async def start(self) -> None:
        """Make the engine; idempotent.

        Raises:
            GroupLostError: WORKER_GROUP_START_FAILED.
        """
        if self._thread is not None:
            return
        thread = RankThread()
        try:
            self._engine = await thread.call(self._make_engine)
        except BackendError as error:
            await thread.end()
            raise GroupLostError(
                "WORKER_GROUP_START_FAILED",
                f"The rank in this process did not start. {error.message}",
                error.metadata,
                error.trace,
            ) from error
        except BaseException:
            await thread.end()
            raise
        self._thread, self.generation = thread, uuid.uuid4().hex

    def _make_engine(self) -> Any:
        use_compile_cache(self._tuning.compile_cache)
        fix_workspaces()
        os.environ.update(OFFLINE)
        module, _, name = self._engine_name.partition(":")
        with loading_modules():
            import torch
            from hvp_core.sharding.collective import Alone

            make = getattr(importlib.import_module(module), name)
        self._num_threads = torch.get_num_threads()
        self._memory_bytes = total_memory(self.device)
        return make(Alone(), self.device, self._tuning)

    async def run(self, method: str, *arguments: Any) -> list[Any]:
        """See Group: the engine is called in its thread."""
        if self._thread is None:
            raise GroupLostError("WORKER_GROUP_LOST", "The rank in this process is not running.")
        engine = self._engine
        return [await self._thread.call(lambda: getattr(engine, method)(*arguments))]

    async def ranks(self) -> list[RankInfo]:
        """See Group: this process; its engine is not asked."""
        if self._engine is None:
            raise _not_running()
        return [
            RankInfo(
                rank=0,
                hostname=socket.gethostname(),
                pid=os.getpid(),
                resident_bytes=psutil.Process().memory_info().rss,
                num_threads=self._num_threads,
                memory_bytes=self._memory_bytes,
            )
        ]

    async def close(self) -> None:
        """Let the engine go; a call that runs is given up, though its thread goes on with it."""
        thread, self._thread, self._engine = self._thread, None, None
        if thread is not None:
            await thread.end()


def _not_running() -> BackendError:
    return BackendError("WORKER_GROUP_LOST", "The backend is not running. Start it and call again.")


def inprocess_backend(device: str, tuning: Tuning) -> GroupBackend:
    """A backend of one rank in this process, not yet started."""
    return GroupBackend(InProcessGroup(device, tuning))
