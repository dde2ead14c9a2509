"""Reports of the worker group and of the queue of jobs."""

from __future__ import annotations

from dataclasses import dataclass

from hvp_workers.backend import BackendError, RankInfo

from hvp_service.app.dependencies import Dependencies
from hvp_service.calls.names import Name
from hvp_service.group.supervisor import GroupState


@dataclass(frozen=True, kw_only=True)
class GroupReport:
    """The worker group at one moment."""

    name: Name
    state: GroupState
    generation: str
    num_ranks: int
    device: str
    ranks: tuple[RankInfo, ...]


async def report_group(deps: Dependencies, project: str) -> GroupReport:
    """Report the group, also while it computes; a group that is lost has no ranks to show."""
    ranks: list[RankInfo] = []
    if deps.group.state == "READY":
        try:
            ranks = await deps.group.backend.ranks()
        except BackendError as error:
            if error.reason != "WORKER_GROUP_LOST":  # a loss that its caller is about to report
                raise
    backend = deps.group.backend
    return GroupReport(
        name=Name(project, "workerGroups", "default"),
        state=deps.group.state,
        generation=backend.generation,
        num_ranks=backend.num_ranks,
        device=backend.device,
        ranks=tuple(ranks),
    )


async def queue(deps: Dependencies, project: str) -> tuple[int, int]:
    """Number of a project's queued jobs, and number of its running ones."""
    unfinished = await deps.jobs.unfinished(project)
    queued = sum(job.state == "QUEUED" for job in unfinished)
    return queued, len(unfinished) - queued
