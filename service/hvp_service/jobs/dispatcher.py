"""Runs queued jobs on the worker group, one after another."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from typing import cast

import structlog
from hvp_operations.operation import Result, Side
from hvp_workers.backend import Backend, BackendError, GroupLostError, RunProgress

from hvp_service.app.config import ServerConfig
from hvp_service.calls.errors import ServiceError, code_of, fault_message, is_fault
from hvp_service.calls.names import Name, parse
from hvp_service.group.supervisor import GroupSupervisor
from hvp_service.jobs.inputs import using_inputs
from hvp_service.jobs.observing import observed_attempt
from hvp_service.jobs.plan import plan_of, require_room
from hvp_service.jobs.store import (
    FINAL_STATES,
    Job,
    JobError,
    JobResult,
    JobSpec,
    JobState,
    JobStore,
    Lease,
    StaleLeaseError,
    attempts_exhausted,
)
from hvp_service.metrics.instruments import computed
from hvp_service.operators.resolver import OperatorResolver, ResolvedOperator
from hvp_service.storage.clock import now_us
from hvp_service.storage.patience import until_done
from hvp_service.storage.troubles import DatabaseBusyError
from hvp_service.vectors.rows import Vector
from hvp_service.vectors.store import VectorStore

# A run whose ranks have been ended writes its row and is gone.
_PARTING_S = 2.0

log = structlog.get_logger()


class _InterruptedError(Exception):
    """A run has to stop between two products: its job is cancelled, or the server goes down."""


class Dispatcher:
    """The loop that claims a job, runs it, and writes how it ended.

    Law: whatever happens to a run, its job is afterwards ended or queued again. A database that is
    busy ends no job, and an attempt that the server's own end cuts short does not count.
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
        self.latest: RunProgress | None = None  # of the running job
        self._cancelled = False
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to run jobs."""
        self._task = asyncio.create_task(self._loop())

    def notice_work(self) -> None:
        """Note that a job has been queued."""
        self._work.set()

    def notice_cancel(self, name: Name) -> None:
        """Note that a job is to be cancelled; its run stops before the next product."""
        if self._running == name:
            self._cancelled = True

    async def stop(self, grace_s: float) -> None:
        """Queue the running job again, after its current product if that ends within the grace.

        Otherwise the ranks are ended, and with them every call that still runs.
        """
        self._stopping = True
        self._work.set()
        if self._task is None:
            return
        # While the group is being started again there is no product to wait for.
        if self._group.state == "READY":
            await asyncio.wait([self._task], timeout=grace_s)
            if not self._task.done():
                log.warning("a product outlasts the grace: ending the ranks", grace_s=grace_s)
                try:
                    await self._group.close()
                except Exception:
                    log.exception("the ranks were not ended in order")
                await asyncio.wait([self._task], timeout=_PARTING_S)
        self._task.cancel()
        await asyncio.wait([self._task], timeout=_PARTING_S)

    async def _loop(self) -> None:
        while not self._stopping:
            await self._group.wait_ready()
            self._work.clear()
            try:
                job = await until_done(self._jobs.claim)
                if job is not None:
                    with observed_attempt(job, self._group.backend.generation) as left:
                        await self._run(job, left)
                    continue
            except Exception:
                log.exception("the dispatcher stumbled")
                await asyncio.sleep(1.0)
                continue
            with contextlib.suppress(TimeoutError):
                # Leases run out without anybody's notice.
                await asyncio.wait_for(self._work.wait(), self._config.lease_s)

    async def _run(self, job: Job, left: Callable[[Job], None]) -> None:
        lease = job.lease
        self._running, self._cancelled = job.name, False
        renewal = asyncio.create_task(self._renew(lease))
        try:
            ended = await self._attempt(job)
            left(ended)
            if ended.state in FINAL_STATES and ended.inputs:
                with contextlib.suppress(DatabaseBusyError):  # the reaper comes round to it
                    await self._vectors.collect()  # deleted ones that it needed
        except StaleLeaseError as error:
            log.warning("lease lost", error=str(error))
        except asyncio.CancelledError:
            await asyncio.shield(asyncio.ensure_future(self._give_back(lease)))
            raise
        finally:
            self._running = self.latest = None
            renewal.cancel()

    async def _attempt(self, job: Job) -> Job:
        """Run a job, and write how it ended or that it is queued again."""
        end: JobResult | JobError | None = None  # CANCELLED
        try:
            if (await until_done(lambda: self._jobs.get(job.name))).state == "CANCELLING":
                self._cancelled = True  # between the claim and now
            if self._cancelled or self._stopping:
                raise _InterruptedError
            end = await self._answer(job)
        except StaleLeaseError:
            raise
        except _InterruptedError:
            if not self._cancelled:
                return await self._queue_again(job, counted=False)
        except Exception as error:
            if isinstance(error, GroupLostError):
                self._group.lose(error)
            if isinstance(error, DatabaseBusyError) or (self._stopping and _is_loss(error)):
                return await self._queue_again(job, counted=False)
            if not _is_loss(error):
                end = self._failure(job, error)
            elif job.attempt < job.max_attempts:
                return await self._queue_again(job)
            else:
                end = attempts_exhausted(job, str(error))
        return await self._finish(job, end)

    async def _queue_again(self, job: Job, *, counted: bool = True) -> Job:
        return await until_done(lambda: self._jobs.give_back(job.lease, counted=counted))

    async def _finish(self, job: Job, end: JobResult | JobError | None) -> Job:
        try:
            return await until_done(lambda: self._jobs.finish(job.lease, end))
        except StaleLeaseError:
            if not isinstance(end, JobResult):
                raise
            with contextlib.suppress(ServiceError):  # the job is deleted
                ended = await until_done(lambda: self._jobs.get(job.name))
                if ended.result == end:
                    return ended  # the connection broke as the row was written
            await self._withdraw([parse(name, "vectors").id for name in end.vectors])
            raise
        except Exception as error:
            if not isinstance(end, JobResult):
                raise
            failure = self._failure(job, error)  # a result that no row can hold
            await self._withdraw([parse(name, "vectors").id for name in end.vectors])
            return await until_done(lambda: self._jobs.finish(job.lease, failure))

    def _failure(self, job: Job, error: Exception) -> JobError:
        """Why a job failed, as its owner is told; the log has the rest."""
        if isinstance(error, (BackendError, ServiceError)) and not is_fault(error.reason):
            code = error.code if isinstance(error, ServiceError) else code_of(error.reason)
            return JobError(
                code=code, reason=error.reason, message=error.message, metadata=error.metadata
            )
        what = "job failed through a fault of this server"
        if isinstance(error, BackendError):
            log.error(what, error=str(error), exception=error.trace)
        else:
            log.error(what, exc_info=error)
        return JobError(
            code=code_of("INTERNAL"), reason="INTERNAL", message=fault_message(str(job.name))
        )

    async def _answer(self, job: Job) -> JobResult:
        asked = job.spec
        assert asked is not None  # the store claims no other
        resolved = await until_done(lambda: self._operators.resolve(asked.operator))
        # Before anything is made for its vectors: the row may be older than the first check.
        planned = await plan_of(self._group, asked, resolved)
        require_room(asked, planned)
        # Of this attempt: should it lose its lease, it touches nothing of the next one's.
        outputs = [f"{job.name.id}-{job.attempt}-{index}" for index in range(planned.cost.results)]
        try:
            # Every implementation is an async generator; the interface promises `aclose`.
            async with (
                self._inputs(asked, resolved) as inputs,
                contextlib.aclosing(
                    cast(
                        "AsyncGenerator[RunProgress | Result, None]",
                        self._group.backend.run(
                            resolved.operator,
                            asked.operation,
                            asked.spec,
                            outputs,
                            inputs,
                            job.earlier,
                        ),
                    )
                ) as items,
            ):
                result = await self._follow(
                    job.lease, items, resolved.batch.statistics.num_positions
                )
            sides = result.vector_spaces()
            outputs = outputs[: len(sides)]
            log.info(
                "answer found",
                provenance=dict(result.provenance),
            )
            made = await self._keep(job, resolved, outputs, sides)
            if self._cancelled:
                raise _InterruptedError
        except GroupLostError:
            raise  # they hold nothing any more
        except Exception:
            await self._withdraw(outputs)
            raise
        return JobResult(
            result=result,
            vectors=tuple(str(vector.name) for vector in made),
            num_elements=resolved.num_arguments,
            output_shape=() if resolved.codomain is None else resolved.codomain.shape,
            argument_shape=() if resolved.domain is None else resolved.domain.shape,
            vector_time=made[0].create_time if made else 0,
        )

    @contextlib.asynccontextmanager
    async def _inputs(
        self, asked: JobSpec, resolved: ResolvedOperator
    ) -> AsyncIterator[Mapping[str, Sequence[str]]]:
        """The ids of the vectors that a question names, by field: on the ranks, for the block.

        Raises:
            ServiceError: INPUT_MISSING for a product whose ranks are gone; WORKER_GROUP_LOST where
                the ranks that the vectors were brought to are others by now.
        """
        async with using_inputs(self._vectors, asked, resolved, is_queued=True) as inputs:
            wanted = [vector for vectors in inputs.values() for vector in vectors]

            async def bring(backend: Backend) -> str:
                await self._vectors.ensure_resident(backend, wanted)
                return backend.generation

            generation = await self._group.call(bring) if wanted else ""
            try:
                yield {
                    field: [vector.name.id for vector in vectors]
                    for field, vectors in inputs.items()
                }
            except BackendError as error:
                if error.reason == "INPUT_MISSING" and self._group.backend.generation != generation:
                    raise ServiceError(
                        "WORKER_GROUP_LOST", "The ranks were started anew before the run began."
                    ) from error
                raise

    async def _follow(
        self, lease: Lease, items: AsyncGenerator[RunProgress | Result, None], num_positions: int
    ) -> Result:
        stored_at, stored_stage = -float("inf"), ""
        latest: RunProgress | None = None
        num_counted = 0
        async for item in items:
            computed("job", max(0, item.num_products - num_counted), num_positions)
            num_counted = max(num_counted, item.num_products)
            if isinstance(item, Result):
                if self._cancelled:
                    raise _InterruptedError
                if latest is not None:
                    await self._report(lease, latest)
                return item
            latest = self.latest = item
            # A product of a small model takes a millisecond, a durable row several.
            if (
                item.stage != stored_stage
                or time.monotonic() - stored_at >= self._config.progress_interval_s
            ):
                if await self._report(lease, item):
                    stored_stage, latest = item.stage, None
                stored_at = time.monotonic()
            if self._cancelled or self._stopping:
                raise _InterruptedError
        raise RuntimeError("the backend's run ended without a result")

    async def _report(self, lease: Lease, progress: RunProgress) -> bool:
        """Store progress and tell whether that was done; a run goes on where it was not."""
        try:
            self._look_at(await self._jobs.report(lease, progress))
        except StaleLeaseError:
            raise
        except DatabaseBusyError as error:
            log.warning("progress was not stored", why=str(error))
        except Exception:
            log.exception("progress was not stored")
        else:
            return True
        return False

    def _look_at(self, state: JobState) -> None:
        if state == "CANCELLING":  # through another server, maybe
            self._cancelled = True

    async def _keep(
        self, job: Job, resolved: ResolvedOperator, outputs: Sequence[str], sides: Sequence[Side]
    ) -> list[Vector]:
        made = []
        for output, side in zip(outputs, sides, strict=True):
            space = resolved.codomain if side == "codomain" else resolved.domain
            made.append(
                self._vectors.new(
                    resolved.checkpoint.name,
                    resolved.operator.space.dtype,
                    resolved.length(space),
                    {"kind": "file"},
                    identifier=output,
                    outputs=space,
                    selection=resolved.selection,
                )
            )
        if not made:
            return []
        created = now_us()
        for vector in made:
            await self._vectors.keep(vector)
        # In files they are at hand; k vectors of every job would fill the ranks' memory.
        with contextlib.suppress(ServiceError):  # ranks that are lost just now are as good
            await self._vectors.free(outputs)
        await until_done(lambda: self._vectors.add(made, resident=False))
        log.debug("vectors kept", microseconds=now_us() - created)
        return made

    async def _withdraw(self, outputs: list[str]) -> None:
        try:
            await until_done(lambda: self._vectors.withdraw(outputs))
        except Exception:
            log.exception("a job's vectors were not cleared away")

    async def _give_back(self, lease: Lease) -> None:
        try:
            await self._jobs.give_back(lease, counted=False)
        except StaleLeaseError:
            pass
        except Exception:
            log.exception("a job was not queued again; it is when its lease has run out")

    async def _renew(self, lease: Lease) -> None:
        while True:
            await asyncio.sleep(self._config.lease_s / 3)
            try:
                self._look_at(await self._jobs.renew(lease))
            except StaleLeaseError:
                return
            except Exception:
                log.exception("a lease was not renewed; trying again")


def _is_loss(error: Exception) -> bool:
    """Whether a run ended because the ranks were lost, and not through anything of its own."""
    return isinstance(error, GroupLostError) or (
        isinstance(error, ServiceError) and error.reason in ("WORKER_GROUP_LOST", "SERVER_DRAINING")
    )
