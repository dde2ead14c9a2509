"""Runs queued jobs on the worker group, one after another."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator
from typing import cast

import structlog
from hvp_workers.backend import (
    BackendError,
    EigshProgress,
    EigshResult,
    EigshSpec,
    GroupLostError,
)

from hvp_service.clock import now_us
from hvp_service.config import ServerConfig
from hvp_service.errors import ServiceError, code_of
from hvp_service.group_supervisor import GroupSupervisor
from hvp_service.job_store import (
    Job,
    JobError,
    JobResult,
    JobStore,
    Lease,
    StaleLeaseError,
    attempts_exhausted,
)
from hvp_service.names import Name
from hvp_service.operator_resolver import OperatorResolver, ResolvedOperator
from hvp_service.vector_rows import Vector
from hvp_service.vector_store import VectorStore

log = structlog.get_logger()


class _InterruptedError(Exception):
    """The job is to stop between two products: cancelled, or the server goes down."""


class Dispatcher:
    """One loop that acts: claims a job, runs it, writes how it ended.

    Law: whatever happens to a run, its job is afterwards ended or queued again.
    """

    def __init__(
        self,
        config: ServerConfig,
        jobs: JobStore,
        group: GroupSupervisor,
        operators: OperatorResolver,
        vectors: VectorStore,
    ):
        self._config = config
        self._jobs = jobs
        self._group = group
        self._operators = operators
        self._vectors = vectors
        self._work = asyncio.Event()
        self._stopping = False
        self._running: Name | None = None
        self._cancelled = False
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to run jobs."""
        self._task = asyncio.create_task(self._loop())

    def notice_work(self) -> None:
        """A job has been queued."""
        self._work.set()

    def notice_cancel(self, name: Name) -> None:
        """A job is to be cancelled."""
        if self._running == name:
            self._cancelled = True

    async def stop(self, grace_s: float) -> None:
        """Queue the running job again after its current product and end the loop."""
        self._stopping = True
        self._work.set()
        if self._task is None:
            return
        # While the group is being started again there is no product to wait for.
        grace_s = grace_s if self._group.state == "READY" else 0.0
        await asyncio.wait([self._task], timeout=grace_s)
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def _loop(self) -> None:
        while not self._stopping:
            await self._group.wait_ready()
            self._work.clear()
            try:
                job = await self._jobs.claim()
                if job is not None:
                    await self._run(job)
                    continue
            except Exception:
                log.exception("the dispatcher stumbled")
                await asyncio.sleep(1.0)
                continue
            with contextlib.suppress(TimeoutError):
                # Leases run out without anybody's notice.
                await asyncio.wait_for(self._work.wait(), self._config.lease_s)

    async def _run(self, job: Job) -> None:
        lease = job.lease
        self._running, self._cancelled = job.name, False
        logger = log.bind(job=str(job.name), attempt=job.attempt)
        logger.info("job started")
        renewal = asyncio.create_task(self._renew(lease))
        try:
            ended = await self._attempt(job)
            logger.info("job left", state=ended.state)
        except StaleLeaseError as error:
            logger.warning("lease lost", error=str(error))
        except asyncio.CancelledError:
            await asyncio.shield(asyncio.ensure_future(self._give_back(lease)))
            raise
        finally:
            self._running = None
            renewal.cancel()

    async def _attempt(self, job: Job) -> Job:
        try:
            if (await self._jobs.get(job.name)).state == "CANCELLING":
                self._cancelled = True  # between the claim and now
            return await self._jobs.finish(job.lease, await self._eigsh(job))
        except _InterruptedError:
            if self._cancelled:
                return await self._jobs.finish(job.lease, None)
            return await self._jobs.give_back(job.lease)
        except GroupLostError as error:
            self._group.lose(error)
            return await self._lost(job, str(error))
        except BackendError as error:
            failure = JobError(
                code=code_of(error.reason),
                reason=error.reason,
                message=error.message,
                metadata=error.metadata,
            )
            return await self._jobs.finish(job.lease, failure)
        except ServiceError as error:
            if error.reason == "WORKER_GROUP_LOST":
                return await self._lost(job, str(error))
            failure = JobError(
                code=error.code,
                reason=error.reason,
                message=error.message,
                metadata=error.metadata,
            )
            return await self._jobs.finish(job.lease, failure)
        except StaleLeaseError:
            raise
        except Exception:
            log.exception("job failed through a fault of this server", job=str(job.name))
            failure = JobError(
                code=code_of("INTERNAL"),
                reason="INTERNAL",
                message=f"A fault of the server; its log has the details under {job.name}.",
            )
            return await self._jobs.finish(job.lease, failure)

    async def _eigsh(self, job: Job) -> JobResult:
        spec = job.spec
        resolved = await self._operators.resolve(spec.operator)
        outputs = [f"{job.name.id}-{index}" for index in range(spec.k)]
        run = self._group.backend.eigsh(
            resolved.operator,
            EigshSpec(
                k=spec.k,
                which=spec.which,
                tol=spec.tol,
                max_products=spec.max_products,
                seed=spec.seed,
                num_lanczos_vectors=spec.num_lanczos_vectors,
            ),
            outputs,
        )
        try:
            # Every implementation is an async generator; the interface promises `aclose`.
            async with contextlib.aclosing(
                cast("AsyncGenerator[EigshProgress | EigshResult, None]", run)
            ) as items:
                result = await self._follow(job.lease, items)
            log.info("eigenpairs found", job=str(job.name), provenance=dict(result.provenance))
            made = await self._keep(job, resolved, outputs)
            if self._cancelled:
                raise _InterruptedError
        except GroupLostError:
            raise  # they hold nothing any more
        except Exception:
            await self._withdraw(outputs)
            raise
        return JobResult(
            eigsh=result,
            eigenvectors=tuple(str(vector.name) for vector in made),
            num_elements=resolved.num_parameters,
            eigenvector_time=made[0].create_time,
        )

    async def _follow(
        self, lease: Lease, items: AsyncGenerator[EigshProgress | EigshResult, None]
    ) -> EigshResult:
        stored_at, stored_stage = -float("inf"), ""
        latest: EigshProgress | None = None
        async for item in items:
            if isinstance(item, EigshResult):
                if self._cancelled:
                    raise _InterruptedError
                if latest is not None:
                    await self._jobs.report(lease, latest)
                return item
            latest = item
            # A product of a small model takes a millisecond, a durable row several.
            if (
                item.stage != stored_stage
                or time.monotonic() - stored_at >= self._config.progress_interval_s
            ):
                await self._jobs.report(lease, item)
                stored_at, stored_stage, latest = time.monotonic(), item.stage, None
            if self._cancelled or self._stopping:
                raise _InterruptedError
        raise RuntimeError("the backend's run ended without a result")

    async def _keep(self, job: Job, resolved: ResolvedOperator, outputs: list[str]) -> list[Vector]:
        made = [
            self._vectors.new(
                resolved.checkpoint.name,
                resolved.operator.space.dtype,
                resolved.num_parameters,
                {"kind": "file"},
                identifier=output,
            )
            for output in outputs
        ]
        created = now_us()
        for vector in made:
            await self._vectors.keep(vector)
        # In files they are at hand; k vectors of every job would fill the ranks' memory.
        with contextlib.suppress(ServiceError):  # ranks that are lost just now are as good
            await self._vectors.free(outputs)
        await self._vectors.add(made, resident=False)
        log.debug("eigenvectors kept", job=str(job.name), microseconds=now_us() - created)
        return made

    async def _withdraw(self, outputs: list[str]) -> None:
        try:
            await self._vectors.withdraw(outputs)
        except Exception:
            log.exception("a job's eigenvectors were not cleared away")

    async def _lost(self, job: Job, cause: str) -> Job:
        if job.attempt >= job.max_attempts:
            return await self._jobs.finish(job.lease, attempts_exhausted(job, cause))
        return await self._jobs.give_back(job.lease)

    async def _give_back(self, lease: Lease) -> None:
        with contextlib.suppress(StaleLeaseError):
            await self._jobs.give_back(lease)

    async def _renew(self, lease: Lease) -> None:
        while True:
            await asyncio.sleep(self._config.lease_s / 3)
            try:
                await self._jobs.renew(lease)
            except StaleLeaseError:
                return
            except Exception:
                log.exception("a lease was not renewed; trying again", job=str(lease.name))
