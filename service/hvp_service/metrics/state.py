"""Figures of a server's state, looked up when they are asked for."""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, final, get_args

import structlog
from hvp_operations.operation import Detail
from hvp_workers.backend import BackendError, RankInfo, RunProgress
from prometheus_client.core import GaugeMetricFamily, Metric

from hvp_service.app.dependencies import Dependencies
from hvp_service.calls.errors import ServiceError
from hvp_service.group.supervisor import GroupState
from hvp_service.jobs.store import JobState

_STATES: tuple[str, ...] = get_args(GroupState)
# Longer than the rows are waited for, Prometheus would not wait either: it gives up after 10 s.
_PATIENCE_S = 5.0
# Folders are looked through at most so often; there may be many files.
_STORED_EVERY_S = 60.0
#: Folders of the state folder whose files count as stored; those of checkpoints are links to blobs.
STORED = ("blobs", "uploads", "vectors", "compile-cache", "tmp")

#: Every figure of this module: its words, and its labels.
FAMILIES: dict[str, tuple[str, tuple[str, ...]]] = {
    "hvp_server_info": ("1, for the server's version and ranks.", ("version", "device", "backend")),
    "hvp_group_state": ("1 for the state that the ranks are in, else 0.", ("state",)),
    "hvp_rank_resident_bytes": ("Bytes of a rank's process in memory.", ("rank",)),
    "hvp_jobs": ("Jobs that have not ended.", ("state", "operation")),
    "hvp_job_products": ("Products of the running job so far.", ("operation",)),
    "hvp_job_products_limit": (
        "The most products that the running job may make; 0 before it knows.",
        ("operation",),
    ),
    "hvp_job_product_seconds": (
        "Median seconds of a product of the running job.",
        ("operation",),
    ),
    "hvp_job_progress": (
        "The running job's own progress, by the field of its message, as restarts, estimates and "
        "standard errors; of several numbers, as residuals, the largest.",
        ("operation", "field"),
    ),
    "hvp_disk_free_bytes": ("Free bytes of the state folder's disk.", ()),
    "hvp_disk_size_bytes": ("All bytes of the state folder's disk.", ()),
    "hvp_stored_bytes": (
        "Bytes of the files in the state folder; looked up at most once a minute.",
        ("folder",),
    ),
}

log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What only the event loop can tell."""

    state: GroupState
    ranks: tuple[RankInfo, ...]
    jobs: Mapping[tuple[JobState, str], int]
    progress: RunProgress | None


@final
class StateCollector:
    """A collector for Prometheus, which is asked in a thread of its own.

    Law: ranks are not called, so that a figure never waits for a product. What cannot be told in
    time is left out, and the rest is told.
    """

    def __init__(self, deps: Dependencies, loop: asyncio.AbstractEventLoop):
        self._deps = deps
        self._loop = loop
        self._stored: dict[str, int] = {}
        self._stored_at = -float("inf")

    def describe(self) -> Iterable[Metric]:
        """Nothing: otherwise the registry would collect in order to learn the names."""
        return []

    def collect(self) -> Iterator[Metric]:
        """The figures of this moment; called by Prometheus' client."""
        deps, config = self._deps, self._deps.config
        yield _family("hvp_server_info", {(deps.version, config.device, config.backend): 1})
        yield from self._disk()
        asked = asyncio.run_coroutine_threadsafe(snapshot(deps), self._loop)
        try:
            found = asked.result(_PATIENCE_S)
        except (TimeoutError, ServiceError) as error:
            asked.cancel()
            log.warning("figures are left out", why=str(error) or "they took too long")
            return
        yield from figures(found)

    def _disk(self) -> Iterator[Metric]:
        root = self._deps.state_dir.root
        usage = shutil.disk_usage(root)
        yield _family("hvp_disk_free_bytes", {(): usage.free})
        yield _family("hvp_disk_size_bytes", {(): usage.total})
        if time.monotonic() - self._stored_at > _STORED_EVERY_S:
            self._stored = {folder: _size(root / folder) for folder in STORED}
            database = self._deps.state_dir.database
            files = database.parent.glob(f"{database.name}*")  # its log lies beside it
            self._stored["database"] = sum(path.stat().st_size for path in files)
            self._stored_at = time.monotonic()
        yield _family(
            "hvp_stored_bytes", {(folder,): size for folder, size in self._stored.items()}
        )


async def snapshot(deps: Dependencies) -> Snapshot:
    """What the event loop can tell, without waiting for the ranks."""
    ranks: list[RankInfo] = []
    if deps.group.state == "READY":
        try:
            ranks = await deps.group.backend.ranks()
        except BackendError as error:  # a loss that its caller is about to report
            log.debug("no figures of ranks", why=str(error))
    return Snapshot(
        state=deps.group.state,
        ranks=tuple(ranks),
        jobs=await deps.jobs.tally(),
        progress=deps.dispatcher.latest,
    )


def figures(found: Snapshot) -> Iterator[Metric]:
    """A snapshot as Prometheus has it."""
    states = {(each.lower(),): float(each == found.state) for each in _STATES}
    yield _family("hvp_group_state", states)
    yield _family(
        "hvp_rank_resident_bytes", {(str(rank.rank),): rank.resident_bytes for rank in found.ranks}
    )
    yield _family(
        "hvp_jobs",
        {(state.lower(), operation): count for (state, operation), count in found.jobs.items()},
    )
    progress = found.progress
    if progress is None:
        return
    of_operation = (progress.operation,)
    yield _family("hvp_job_products", {of_operation: progress.num_products})
    yield _family("hvp_job_products_limit", {of_operation: progress.max_products})
    yield _family("hvp_job_product_seconds", {of_operation: progress.seconds_per_product})
    if progress.detail is not None:
        numbers = _numbers(progress.detail)
        yield _family(
            "hvp_job_progress", {(progress.operation, field): value for field, value in numbers}
        )


def _family(name: str, samples: Mapping[Any, float]) -> Metric:
    """A figure of the table above, with its samples by the values of its labels."""
    words, labels = FAMILIES[name]
    family = GaugeMetricFamily(name, words, labels=labels)
    for values, value in samples.items():
        family.add_metric(values, value)
    return family


def _numbers(detail: Detail) -> Iterator[tuple[str, float]]:
    for field in fields(detail):
        value: Any = getattr(detail, field.name)
        several = value if isinstance(value, tuple) else (value,)
        numbers = [each for each in several if type(each) in (int, float)]
        if numbers and len(numbers) == len(several):
            yield field.name, max(numbers)


def _size(folder: Path) -> int:
    """Bytes of all files below a folder, as far as they can be looked at."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                total += Path(path, name).lstat().st_size
            except OSError:  # it went meanwhile
                continue
    return total
