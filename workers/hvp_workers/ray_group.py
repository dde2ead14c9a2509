"""A group whose ranks are Ray actors."""

from __future__ import annotations

import asyncio
import uuid
from pathlib import Path
from typing import Any, final

from hvp_workers.backend import GroupLostError, RankInfo, Tuning
from hvp_workers.group import Group
from hvp_workers.ray_cluster import RayCluster
from hvp_workers.ray_gang import Gang, GangSpec, Patience, start_gang


@final
class RayGroup(Group):
    """Ranks as Ray actors; see `Group` for the law.

    A loss ends every rank: the survivors of a collective that lost a member have nothing to go on
    with. Nothing is restarted here; whoever owns the group awaits `start` again.

    `start` must be awaited in the main thread (see `RayCluster`), and blocks its event loop for the
    seconds that Ray takes to start.
    """

    def __init__(
        self,
        *,
        num_workers: int,
        device: str,
        run_dir: Path | None = None,
        tuning: Tuning | None = None,
        engine: str = "hvp_workers.engine:RankEngine",
        patience: Patience | None = None,
    ):
        if num_workers < 1:
            raise ValueError("a group has at least one worker")
        self.device = device
        self.num_ranks = num_workers
        self._tuning = tuning or Tuning()
        self._engine = engine
        self._patience = patience or Patience()
        self._cluster = RayCluster(num_ranks=num_workers, device=device, run_dir=run_dir)
        self._gang: Gang | None = None
        # Held from the submission of a method to its last answer. It is FIFO, so every rank starts
        # methods in the order of the calls, and a time limit counts one method's own time.
        self._turn = asyncio.Lock()

    async def start(self) -> None:
        """Start the cluster where needed and the ranks; idempotent while they live.

        Raises:
            GroupLostError: WORKER_GROUP_START_FAILED.
        """
        async with self._turn:
            if self._gang is not None:
                return
            if not self._cluster.is_open:
                self._cluster.close()
                self._cluster.open()
            session = uuid.uuid4().hex[:12]
            # On record before there is anything to find, so that a kill in between is covered.
            self._cluster.note(session)
            self._gang = await start_gang(
                GangSpec(
                    num_ranks=self.num_ranks,
                    device=self.device,
                    tuning=self._tuning,
                    engine=self._engine,
                    session=session,
                    patience=self._patience,
                )
            )
            self.generation = session
            self._cluster.note()

    async def run(self, method: str, *arguments: Any) -> list[Any]:
        """Call `engine.method(*arguments)` on every rank; results in order of rank.

        A caller that is cancelled does not take the ranks out of step: the method runs to its end,
        and the next call waits for it.

        Raises:
            BackendError: The error that every rank raised.
            GroupLostError: WORKER_GROUP_LOST.
        """
        await self._turn.acquire()
        task = asyncio.ensure_future(self._run(method, arguments))
        task.add_done_callback(self._end_turn)
        return await asyncio.shield(task)

    def _end_turn(self, task: asyncio.Future[list[Any]]) -> None:
        self._turn.release()
        if not task.cancelled():
            task.exception()  # seen, whether or not a caller still waits for it

    async def _run(self, method: str, arguments: tuple[Any, ...]) -> list[Any]:
        gang = self._running()
        try:
            return await gang.call(method, arguments)
        except GroupLostError:
            self._gang = None
            await gang.end()
            raise

    async def ranks(self) -> list[RankInfo]:
        """See `Group`."""
        return await self._running().ranks()

    def _running(self) -> Gang:
        if self._gang is None:
            raise GroupLostError(
                "WORKER_GROUP_LOST", "The worker group is not running. Start it and call again."
            )
        return self._gang

    async def close(self) -> None:
        """End the ranks, and the cluster when it is ours; idempotent.

        A method that still runs is given up at once, and its caller gets GroupLostError.
        """
        gang, self._gang = self._gang, None
        if gang is not None:
            if not self._turn.locked():  # ranks at work would not hear that they are to leave
                await gang.leave()
            await gang.end()
        self._cluster.close()
