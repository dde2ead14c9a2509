"""The sweep at start and every hour, which removes whatever time has made useless."""

from __future__ import annotations

import asyncio
import contextlib

import structlog

from hvp_service.app.config import ServerConfig
from hvp_service.blobs.store import BlobStore
from hvp_service.calls.request_log import RequestLog
from hvp_service.checkpoints.store import CheckpointStore
from hvp_service.jobs.store import JobStore
from hvp_service.storage.clock import SECOND, now_us
from hvp_service.storage.database import Database
from hvp_service.uploads.store import UploadStore
from hvp_service.vectors.store import VectorStore

INTERVAL_S = 3600.0

log = structlog.get_logger()


class Sweeper:
    """Removes uploads, blobs, jobs and answers whose time is up, and files that no row names."""

    def __init__(
        self,
        config: ServerConfig,
        database: Database,
        uploads: UploadStore,
        blobs: BlobStore,
        checkpoints: CheckpointStore,
        request_log: RequestLog,
        jobs: JobStore,
        vectors: VectorStore,
    ):
        self._config = config
        self._database = database
        self._uploads = uploads
        self._blobs = blobs
        self._checkpoints = checkpoints
        self._request_log = request_log
        self._jobs = jobs
        self._vectors = vectors
        self._task: asyncio.Task[None] | None = None

    async def sweep(self) -> None:
        """Sweep once; a part that fails does not keep the others from being swept."""
        for step in (
            self._uploads.expire,
            self._blobs.collect,
            self._blobs.sweep,
            self._checkpoints.sweep,
            self._forget_request_ids,
            self._forget_jobs,
            self._database.shrink,
        ):
            try:
                await step()
            except Exception:
                log.exception("a step of a sweep failed; the next sweep tries again")

    async def _forget_request_ids(self) -> None:
        await self._request_log.forget(now_us() - int(self._config.request_id_ttl_s * SECOND))

    async def _forget_jobs(self) -> None:
        before_us = now_us() - int(self._config.job_retention_s * SECOND)
        while names := await self._jobs.ended_before(before_us):
            for name in names:
                await self._vectors.delete_of_job(name)
                await self._jobs.forget(name)

    def start(self, interval_s: float = INTERVAL_S) -> None:
        """Begin to sweep every `interval_s` seconds."""
        self._task = asyncio.create_task(self._loop(interval_s))

    async def stop(self) -> None:
        """End the sweeping."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _loop(self, interval_s: float) -> None:
        while True:
            await asyncio.sleep(interval_s)
            await self.sweep()
