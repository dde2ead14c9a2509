"""The event loop behind the blocking client: one daemon thread, shared by a process's clients.

gRPC's asyncio wakes every loop that it knows for every event, so one loop for all clients is
quieter and cheaper than one each.
"""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, ClassVar, TypeVar, final

from hvp_client._exceptions import FailedPreconditionError

Result = TypeVar("Result")
Work = Coroutine[Any, Any, Result]


@final
class Portal:
    """One client's way to run coroutines from any thread; its handles keep it open.

    Args:
        close: Makes the coroutine that ends the client; run once, from `close()`, when client and
            handles are forgotten, or at the interpreter's end.
    """

    def __init__(self, close: Callable[[], Work[None]]):
        self._thread = _LoopThread.acquire()
        self._closer = weakref.finalize(self, _finish, self._thread, close)

    def close(self) -> None:
        """Run the client's end and leave the loop; closing twice is no error."""
        self._closer()

    def run(self, coroutine: Work[Result]) -> Result:
        """Await a coroutine on the loop and block until it is done.

        Args:
            coroutine: The coroutine; cancelled when the wait is interrupted, as by Ctrl-C.

        Returns:
            Its result.

        Raises:
            RuntimeError: Called on the loop's own thread, where it would wait for itself: from a
                progress callback, for example.
            FailedPreconditionError: `CLIENT_CLOSED`, or `CLIENT_FORKED` in a child of the process
                that made the client: the loop's thread is not there.
        """
        if not self._thread.alive() and self._closer.alive:
            coroutine.close()
            raise FailedPreconditionError(
                "this client was made before a fork and its thread stayed with the parent; open a "
                "Client in this process, which should be started with multiprocessing's 'spawn'",
                reason="CLIENT_FORKED",
            )
        if self._thread.is_current() or not self._closer.alive:
            coroutine.close()
            if self._closer.alive:
                raise RuntimeError(
                    "a blocking call was made from a callback of the client; use AsyncClient there"
                )
            raise FailedPreconditionError(
                "this client is closed; open another", reason="CLIENT_CLOSED"
            )
        future = self._thread.submit(coroutine)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def iterate(self, stream: AsyncGenerator[Result, None]) -> Iterator[Result]:
        """Give the items of an asynchronous stream.

        Args:
            stream: The stream, which is closed when the iteration ends or is given up.

        Yields:
            Its items.
        """
        end = object()
        running: set[asyncio.Task[Any]] = set()
        try:
            while (item := self.run(_next(stream, end, running))) is not end:
                yield item
        finally:
            if self._closer.alive and self._thread.alive():
                closing = self._thread.submit(_close(stream, running))
                # An iterator given up may be collected on any thread, the loop's own included.
                if not self._thread.is_current():
                    closing.result()


@final
class _LoopThread:
    """A loop on a daemon thread; it runs while anyone has acquired it and not yet released."""

    _lock: ClassVar[threading.Lock] = threading.Lock()
    _shared: ClassVar[_LoopThread | None] = None

    def __init__(self) -> None:
        self._users = 0
        self._pid = os.getpid()
        self._loop = asyncio.new_event_loop()
        # Its own pool for files and digests: asyncio's default one cannot be shut down at the
        # interpreter's end, when no thread may be started any more.
        self._pool = ThreadPoolExecutor(thread_name_prefix="hvp-client-io")
        self._loop.set_default_executor(self._pool)
        self._thread = threading.Thread(target=self._serve, name="hvp-client", daemon=True)
        self._thread.start()

    @classmethod
    def acquire(cls) -> _LoopThread:
        with cls._lock:
            # A fork copies the object without its thread.
            if cls._shared is None or cls._shared._pid != os.getpid():
                cls._shared = cls()
            cls._shared._users += 1
            return cls._shared

    def release(self) -> None:
        with _LoopThread._lock:
            self._users -= 1
            if self._users > 0:
                return
            if _LoopThread._shared is self:
                _LoopThread._shared = None
        self._loop.call_soon_threadsafe(self._loop.stop)
        if not self.is_current():
            self._thread.join()

    def is_current(self) -> bool:
        return threading.current_thread() is self._thread

    def submit(self, coroutine: Work[Result]) -> Future[Result]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def alive(self) -> bool:
        return self._pid == os.getpid() and self._thread.is_alive()

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.set_exception_handler(_on_loop_error)
        try:
            self._loop.run_forever()
        finally:
            pending = asyncio.all_tasks(self._loop)
            for task in pending:
                task.cancel()
            self._loop.run_until_complete(_settle(pending))
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._pool.shutdown()
            self._loop.close()


def _finish(thread: _LoopThread, close: Callable[[], Work[None]]) -> None:
    if not thread.alive():
        return
    closing = thread.submit(close())
    if thread.is_current():
        # Collected on the loop's thread, which therefore cannot wait.
        closing.add_done_callback(lambda _: thread.release())
        return
    try:
        closing.result()
    finally:
        thread.release()


async def _settle(tasks: set[asyncio.Task[Any]]) -> None:
    await asyncio.gather(*tasks, return_exceptions=True)


async def _next(
    stream: AsyncGenerator[Any, None], end: object, running: set[asyncio.Task[Any]]
) -> Any:
    task = asyncio.current_task()
    assert task is not None
    running.add(task)
    try:
        return await anext(stream, end)
    finally:
        running.discard(task)


async def _close(stream: AsyncGenerator[Any, None], running: set[asyncio.Task[Any]]) -> None:
    # A Ctrl-C between handing a step to the loop and waiting for it leaves the step running.
    for task in running:
        task.cancel()
    await _settle(set(running))
    await stream.aclose()


def _on_loop_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    # gRPC wakes every loop of the process for one event; all but the first find nothing to read.
    if not isinstance(context.get("exception"), BlockingIOError):
        loop.default_exception_handler(context)
