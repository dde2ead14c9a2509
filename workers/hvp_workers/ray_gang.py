"""Starting a gang of Ray actors, whole or not at all, and taking it down."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import Any, final

import psutil

from hvp_workers import orphans
from hvp_workers.backend import BackendError, GroupLostError, RankInfo, Tuning
from hvp_workers.orphans import ProcessMark
from hvp_workers.ray_answers import Member, collect
from hvp_workers.ray_facts import rank_infos, ranks_beside, threads_each
from hvp_workers.ray_rank import LOOPBACK, Place, Rank, Seat

# Ray's kill takes effect within milliseconds where it is heard at all.
_KILL_GRACE_S = 2.0


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long a group waits before it gives a rank up, in seconds.

    Raises:
        ValueError: A time is not positive.
    """

    start_s: float = 120.0  # for the machines, and again for the ranks to find each other
    command_s: float = 3600.0  # for one method on every rank
    straggler_s: float = 30.0  # for the other ranks once one of them has raised
    leave_s: float = 5.0  # for an orderly end

    def __post_init__(self) -> None:
        if min(self.start_s, self.command_s, self.straggler_s, self.leave_s) <= 0:
            raise ValueError("every time must be positive")


@dataclass(frozen=True, kw_only=True)
class GangSpec:
    """The request for a gang: its ranks, their device, and what they run."""

    num_ranks: int
    device: str  # "cpu" or "cuda"
    tuning: Tuning
    engine: str  # "module:callable", called with (collective, device, tuning)
    session: str  # names shared memory; unique
    patience: Patience


@final
class Gang:
    """Ranks that run, joined in a process group, each with an engine."""

    def __init__(self, members: Sequence[Member], patience: Patience, undo: AsyncExitStack):
        self._members = tuple(members)
        self._patience = patience
        self._undo = undo

    async def call(self, method: str, arguments: tuple[Any, ...]) -> list[Any]:
        """Run one method on every rank; the caller lets one call end before the next.

        Raises:
            BackendError: The error that every rank raised.
            GroupLostError: A rank is lost; `end` the gang.
        """
        return await collect(
            self._members,
            [member.actor.call.remote(method, arguments) for member in self._members],
            what=f"`{method}`",
            limit_s=self._patience.command_s,
            straggler_s=self._patience.straggler_s,
        )

    async def ranks(self) -> list[RankInfo]:
        """The ranks that live, whatever they compute."""
        import ray

        return await rank_infos(self._members, ray.get_runtime_context().get_node_id())

    async def leave(self) -> None:
        """Ask the ranks to put their engines away; gives up after `leave_s`."""
        with contextlib.suppress(BackendError):
            await collect(
                self._members,
                [member.actor.leave.remote() for member in self._members],
                what="the end",
                limit_s=self._patience.leave_s,
                straggler_s=self._patience.leave_s,
            )

    async def end(self) -> None:
        """Kill the ranks and free what they held; bounded in time, idempotent."""
        await self._undo.aclose()


async def start_gang(spec: GangSpec) -> Gang:
    """Start every rank, or undo what was started and raise.

    Raises:
        GroupLostError: WORKER_GROUP_START_FAILED, with what to change.
    """
    started = time.monotonic()
    processes: list[ProcessMark] = []  # of this machine, known once the actors run
    async with AsyncExitStack() as undo:
        try:
            actors = await _place(spec, processes, undo)
            members = await _number(spec, actors, processes)
            members = await _join(spec, members)
        except BackendError as error:
            raise GroupLostError(
                "WORKER_GROUP_START_FAILED",
                f"{spec.num_ranks} workers did not start, {time.monotonic() - started:.0f} s "
                f"after the first was asked for. {error.message}",
                error.metadata,
                error.trace,
            ) from error
        return Gang(members, spec.patience, undo.pop_all())
    raise AssertionError("unreachable")


async def _place(spec: GangSpec, processes: list[ProcessMark], undo: AsyncExitStack) -> list[Any]:
    """One actor per rank, each in its own bundle of a placement group."""
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    bundle = {"CPU": 1, "GPU": 1} if spec.device == "cuda" else {"CPU": 1}
    undo.callback(orphans.free_segments, spec.session)  # last, when nobody maps them
    undo.push_async_callback(_see_off, processes)
    placement = placement_group([bundle] * spec.num_ranks, strategy="PACK")
    undo.callback(_quietly, remove_placement_group, placement)
    deadline = time.monotonic() + spec.patience.start_s
    placed = False
    while not placed and time.monotonic() < deadline:
        # In short pieces: a thread cannot be cancelled, and the program's end waits for it.
        placed = await asyncio.to_thread(placement.wait, 0.5)
    if not placed:
        resources = ray.cluster_resources()
        offered = {name: resources.get(name, 0.0) for name in bundle}
        advice = "Ask for fewer workers (--workers), or wait until others have ended."
        if not all(offered.values()):
            advice = "Without GPUs, start with --device cpu."
        raise BackendError(
            "WORKER_GROUP_START_FAILED",
            f"Each worker needs {bundle} and the cluster has {offered} in all, perhaps in use. "
            f"{advice}",
        )
    driver = ProcessMark.of(psutil.Process())
    node_id = ray.get_runtime_context().get_node_id()
    actors = []
    for index in range(spec.num_ranks):
        actor = (
            ray.remote(Rank)
            .options(
                num_cpus=bundle["CPU"],
                num_gpus=bundle.get("GPU", 0),
                max_restarts=0,  # whoever owns the group decides what to do after a loss
                max_task_retries=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    placement_group=placement, placement_group_bundle_index=index
                ),
            )
            .remote(node_id, driver)
        )
        undo.callback(_quietly, ray.kill, actor)
        actors.append(actor)
    return actors


async def _number(spec: GangSpec, actors: list[Any], processes: list[ProcessMark]) -> list[Member]:
    """The actors in order of rank: by node, then by device.

    Processes of this machine are added to `processes`.
    """
    import ray

    places: list[Place] = await _answers(
        [actor.place.remote() for actor in actors], spec.patience.start_s, "the workers' processes"
    )
    here = ray.get_runtime_context().get_node_id()
    processes.extend(place.process for place in places if place.node_id == here)
    members = [
        Member(actor=actor, place=place) for actor, place in zip(actors, places, strict=True)
    ]
    return sorted(
        members,
        key=lambda member: (
            member.place.address,
            member.place.node_id,
            member.place.gpu,
            member.place.process.pid,
        ),
    )


async def _join(spec: GangSpec, members: list[Member]) -> list[Member]:
    """Make the ranks one process group, each with its engine; the ranks, with their memory."""
    patience = spec.patience
    same_host = len({member.place.node_id for member in members}) == 1
    address = LOOPBACK if same_host else members[0].place.address
    (port,) = await _answers(
        [members[0].actor.open_store.remote(address, patience.start_s)],
        patience.start_s,
        "rank 0's rendezvous",
    )
    references = [
        member.actor.join.remote(
            Seat(
                rank=rank,
                num_ranks=spec.num_ranks,
                same_host=same_host,
                device=spec.device,
                tuning=spec.tuning,
                num_threads=num_threads,
                address=address,
                port=port,
                session=spec.session,
                engine=spec.engine,
                start_timeout_s=patience.start_s,
                # The driver keeps the time; this one only has to be longer.
                collective_timeout_s=patience.start_s + patience.command_s,
            )
        )
        for rank, (member, num_threads) in enumerate(
            zip(members, threads_each(members), strict=True)
        )
    ]
    totals = await collect(
        members,
        references,
        what="the start",
        limit_s=patience.start_s,
        straggler_s=patience.straggler_s,
    )
    return [
        replace(member, memory_bytes=total // (sharing if spec.device == "cpu" else 1))
        for member, total, sharing in zip(members, totals, ranks_beside(members), strict=True)
    ]


async def _answers(references: list[Any], limit_s: float, what: str) -> list[Any]:
    """The answers of actors that have no rank yet.

    Raises:
        BackendError: WORKER_GROUP_START_FAILED.
    """
    import ray

    futures = [asyncio.wrap_future(reference.future()) for reference in references]
    try:
        return await asyncio.wait_for(asyncio.gather(*futures), limit_s)
    except TimeoutError as error:
        raise BackendError(
            "WORKER_GROUP_START_FAILED",
            f"There was no sign of {what} within {limit_s:.0f} s. The machine may be overloaded or "
            "out of memory.",
        ) from error
    except ray.exceptions.RayError as error:
        raise BackendError(
            "WORKER_GROUP_START_FAILED", f"Ray could not start {what}: {error}"
        ) from error


async def _see_off(processes: list[ProcessMark]) -> None:
    """Kill processes that have not heard Ray: those that are stopped, or deep in the kernel."""
    await asyncio.to_thread(orphans.end_processes, processes, grace_s=_KILL_GRACE_S)


def _quietly(function: Callable[[Any], None], argument: Any) -> None:
    """Tell Ray to let something go; the cluster may be gone, and then it has."""
    with contextlib.suppress(Exception):
        function(argument)
