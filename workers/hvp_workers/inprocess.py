"""One rank in a thread of this process: a laptop's whole service, and the tests'."""

from __future__ import annotations

import asyncio
import importlib
import os
import socket
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any, final

import psutil

from hvp_workers.backend import BackendError, RankInfo, Tuning
from hvp_workers.environment import OFFLINE
from hvp_workers.group import Group
from hvp_workers.group_backend import GroupBackend
from hvp_workers.rank_process import use_compile_cache


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
        self._num_threads = 0
        self._thread: ThreadPoolExecutor | None = None

    async def start(self) -> None:
        """Make the engine; idempotent."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="hvp-rank")
            self._engine = await self._in_thread(self._make_engine)
            self.generation = uuid.uuid4().hex

    def _make_engine(self) -> Any:
        use_compile_cache(self._tuning.compile_cache)
        os.environ.update(OFFLINE)
        import torch
        from hvp_core.collective import Alone

        self._num_threads = torch.get_num_threads()
        module, _, name = self._engine_name.partition(":")
        return getattr(importlib.import_module(module), name)(Alone(), self.device, self._tuning)

    async def _in_thread(self, function: Any, *arguments: Any) -> Any:
        if self._thread is None:
            raise _not_running()
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    async def run(self, method: str, *arguments: Any) -> list[Any]:
        """Call the engine in its thread."""
        return [await self._in_thread(self._call, method, arguments)]

    def _call(self, method: str, arguments: tuple[Any, ...]) -> Any:
        return getattr(self._engine, method)(*arguments)

    async def ranks(self) -> list[RankInfo]:
        """This process; its engine is not asked."""
        if self._engine is None:
            raise _not_running()
        return [
            RankInfo(
                rank=0,
                hostname=socket.gethostname(),
                pid=os.getpid(),
                resident_bytes=psutil.Process().memory_info().rss,
                num_threads=self._num_threads,
            )
        ]

    async def close(self) -> None:
        """Wait for the call that is running, then let the engine go."""
        thread, self._thread, self._engine = self._thread, None, None
        if thread is not None:
            await asyncio.get_running_loop().run_in_executor(None, thread.shutdown)


def _not_running() -> BackendError:
    return BackendError("WORKER_GROUP_LOST", "The backend is not running. Start it and call again.")


def inprocess_backend(device: str, tuning: Tuning) -> GroupBackend:
    """A backend of one rank in this process, not yet started."""
    return GroupBackend(InProcessGroup(device, tuning))
