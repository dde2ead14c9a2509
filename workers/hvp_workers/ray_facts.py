"""Facts about a gang's processes, found without asking the ranks, which may be at a product."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import psutil

from hvp_workers.backend import RankInfo
from hvp_workers.orphans import ProcessMark
from hvp_workers.ray_answers import Member

_ELSEWHERE_S = 5.0  # for another machine's answer; without one its ranks are listed with 0 bytes


def ranks_beside(members: Sequence[Member]) -> list[int]:
    """For each rank the number of ranks on its machine, itself among them."""
    num_ranks_on = Counter(member.place.node_id for member in members)
    return [num_ranks_on[member.place.node_id] for member in members]


def threads_each(members: Sequence[Member]) -> list[int]:
    """For each rank the number of threads that it computes with: its share of the cores."""
    return [
        max(1, member.place.num_cores // sharing)
        for member, sharing in zip(members, ranks_beside(members), strict=True)
    ]


def resident_bytes(marks: Sequence[ProcessMark]) -> dict[int, int]:
    """Bytes of the resident set by process id, of the marked processes that live here."""
    found = {}
    for mark in marks:
        process = mark.find()
        if process is not None:
            try:
                found[mark.pid] = int(process.memory_info().rss)
            except psutil.NoSuchProcess:
                continue
    return found


async def rank_infos(members: Sequence[Member], here: str) -> list[RankInfo]:
    """The ranks that live.

    Args:
        members: The gang's ranks, in order.
        here: Ray's id of this machine; other machines are asked by a task that runs beside their
            ranks.
    """
    nodes = sorted({member.place.node_id for member in members})
    marks = {
        node: [member.place.process for member in members if member.place.node_id == node]
        for node in nodes
    }
    answers = await asyncio.gather(
        *(
            asyncio.to_thread(resident_bytes, marks[node])
            if node == here
            else _elsewhere(node, marks[node])
            for node in nodes
        )
    )
    resident = dict(zip(nodes, answers, strict=True))
    return [
        RankInfo(
            rank=rank,
            hostname=member.place.hostname,
            pid=member.place.process.pid,
            resident_bytes=resident[member.place.node_id][member.place.process.pid],
            num_threads=num_threads,
            memory_bytes=member.memory_bytes,
        )
        for rank, (member, num_threads) in enumerate(
            zip(members, threads_each(members), strict=True)
        )
        if member.place.process.pid in resident[member.place.node_id]
    ]


async def _elsewhere(node: str, marks: Sequence[ProcessMark]) -> Mapping[int, int]:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    reference: Any = (
        ray.remote(resident_bytes)
        .options(
            num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=node, soft=False)
        )
        .remote(list(marks))
    )
    try:
        found: Mapping[int, int] = await asyncio.wait_for(
            asyncio.wrap_future(reference.future()), _ELSEWHERE_S
        )
    except (TimeoutError, ray.exceptions.RayError):
        return {mark.pid: 0 for mark in marks}
    return found
