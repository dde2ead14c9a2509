"""The supervisor of the worker group: it alone calls the backend, and restarts it after a loss."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Literal, TypeVar

import structlog
from hvp_workers.backend import Backend, BackendError, GroupLostError

from hvp_service.app.drain import draining
from hvp_service.calls.errors import ServiceError
from hvp_service.metrics import instruments

Result = TypeVar("Result")
GroupState = Literal["STARTING", "READY", "LOST"]

RETRY_AFTER_S = 2.0
_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 30.0

log = structlog.get_logger()


class GroupSupervisor:
    """Runs calls on the backend to their end, whoever still waits for them.

    Law: after a loss no call reaches the ranks before they have been started anew, and whatever a
    start meets, it is tried again.
    """

    def __init__(self, backend: Backend):
        self.backend = backend
        self.state: GroupState = "STARTING"
        self._closed = False
        self._ready = asyncio.Event()
        self._changed = asyncio.Event()
        self._restart: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()

    async def start(self) -> None:
        """Start the ranks for the first time.

        Raises:
            BackendError: They do not start.
        """
        await self.backend.start()
        instruments.GROUP_STARTS.inc()
        self._enter("READY")

    async def close(self) -> None:
        """End the ranks, whatever they compute; calls that still run end with them. Idempotent."""
        self._closed = True
        if self._restart is not None:
            self._restart.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._restart
        self._enter("LOST")
        await self.backend.close()
        if self._tasks:
            _, pending = await asyncio.wait(self._tasks, timeout=5)
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)

    async def wait_ready(self) -> None:
        """Return when the ranks can be called."""
        await self._ready.wait()

    async def wait_other_than(self, state: GroupState) -> GroupState:
        """Return the state as soon as it is another than this one."""
        while self.state == state:
            await self._changed.wait()
        return self.state

    def lose(self, error: GroupLostError) -> None:
        """Note that the ranks are gone, and begin to start them again."""
        if self.state == "READY" and not self._closed:
            log.error(
                "worker group lost", reason=error.reason, message=error.message, **_trace_of(error)
            )
            instruments.GROUP_LOSSES.inc()
            self._enter("LOST")
            self._restart = asyncio.create_task(self._start_again())

    async def call(
        self,
        work: Callable[[Backend], Coroutine[Any, Any, Result]],
        undo: Callable[[], Awaitable[None]] | None = None,
    ) -> Result:
        """Run a call on the ranks for a caller who may leave.

        Args:
            work: Makes the call; it is never cancelled in the middle, because ranks that stop at
                different places wait for one another for ever.
            undo: Runs after `work` when the caller left before its end.

        Raises:
            ServiceError: WORKER_GROUP_LOST, SERVER_DRAINING.
            BackendError: The ranks' refusal.
        """
        if self.state != "READY":
            raise self._lost_error()
        task = asyncio.create_task(self._guard(work))
        self._keep(task)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if undo is not None:
                self._keep(asyncio.create_task(self._undo(task, undo)))
            raise

    def call_soon(self, work: Callable[[Backend], Coroutine[Any, Any, None]]) -> None:
        """Run a call on the ranks after the earlier ones, for a caller who does not wait.

        Ranks that are lost are not called: they hold nothing any more.
        """
        if self.state == "READY":
            self._keep(asyncio.create_task(self._guard(work)))

    async def _guard(self, work: Callable[[Backend], Coroutine[Any, Any, Result]]) -> Result:
        try:
            return await work(self.backend)
        except GroupLostError as error:
            self.lose(error)
            raise self._lost_error() from error

    async def _undo(self, task: asyncio.Task[Any], undo: Callable[[], Awaitable[None]]) -> None:
        await asyncio.wait([task])
        try:
            await undo()
        except (BackendError, ServiceError) as error:
            log.warning("could not clear up after a caller who left", error=str(error))
        except Exception:
            log.exception("could not clear up after a caller who left")

    def _keep(self, task: asyncio.Task[Any]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._let_go)

    def _let_go(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # a caller who left does not read it

    async def _start_again(self) -> None:
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                await self.backend.start()
            except BackendError as error:
                log.error(
                    "worker group does not start",
                    error=str(error),
                    pause_s=pause_s,
                    **_trace_of(error),
                )
            except Exception:  # a full disk, no descriptor left, Ray's own: it may be over then
                log.exception("worker group does not start", pause_s=pause_s)
            else:
                break
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        instruments.GROUP_STARTS.inc()
        log.info("worker group started again", generation=self.backend.generation)
        self._enter("READY")

    def _enter(self, state: GroupState) -> None:
        self.state = state
        if state == "READY":
            self._ready.set()
        else:
            self._ready.clear()
        self._changed.set()
        self._changed = asyncio.Event()

    def _lost_error(self) -> ServiceError:
        if self._closed:
            return draining()
        return ServiceError(
            "WORKER_GROUP_LOST",
            "A worker process died or hung; the group is being started again. Call again: vectors "
            "from a seed or an upload come back by themselves, products must be made again.",
            retry_after_s=RETRY_AFTER_S,
        )


def _trace_of(error: BackendError) -> dict[str, str]:
    """Fields for a log line that show where a rank met an unforeseen error."""
    return {"exception": error.trace} if error.trace else {}
