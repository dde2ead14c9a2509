"""The job store on tables, in SQLite and in PostgreSQL."""

# ruff: noqa: D102  (JobStore describes the methods)

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import sqlalchemy as sa
from hvp_workers.backend import RunProgress
from sqlalchemy.ext.asyncio import AsyncConnection

from hvp_service.calls.errors import ServiceError, not_found
from hvp_service.calls.labels import check_etag
from hvp_service.calls.names import Name
from hvp_service.calls.paging import Pager, PageRequest
from hvp_service.jobs.event_log import EventLog
from hvp_service.jobs.observing import operation_of
from hvp_service.jobs.rows import (
    ERROR,
    STATE_CHANGE,
    asked_operation,
    earlier_row,
    progress_row,
    read_job,
    read_progress,
    read_spec,
    result_row,
    spec_row,
)
from hvp_service.jobs.store import (
    FINAL_STATES,
    HELD_STATES,
    Job,
    JobError,
    JobEvent,
    JobResult,
    JobState,
    JobStore,
    Lease,
    StaleLeaseError,
    StateChange,
    attempts_exhausted,
    unreadable,
)
from hvp_service.metrics.instruments import JOBS_ENDED
from hvp_service.operators.resolver import OperatorRef
from hvp_service.storage.clock import SECOND
from hvp_service.storage.database import Database, job_inputs, jobs
from hvp_service.vectors.rows import gone, is_named

#: Topic of the news that a job has been queued.
WORK = "jobs"
_NAMES_PER_PAGE = 1000
_JOBS_LOOKED_AT = 100  # the latest ones, for the pace of products


class SqlJobStore(JobStore):
    """Jobs in the tables `jobs` and `job_events`.

    A transaction that changes a job holds the lock of its row before it looks at it, so of two
    that would change it the later one sees what the earlier one did.

    Args:
        database: The database that holds the tables.
        pager: Makes page tokens.
        owner: Id of this server process, which no other server has or had.
        lease_s: How long a claim holds without renewal, in seconds.
    """

    def __init__(self, database: Database, pager: Pager, *, owner: str, lease_s: float):
        self._database = database
        self._pager = pager
        self._owner = owner
        self._lease_us = int(lease_s * SECOND)
        self._events = EventLog(database)

    async def create(self, job: Job, max_queued: int) -> Job:
        assert job.spec is not None
        async with self._database.writing() as connection:
            row = await self._row(connection, job.name)
            if row is not None:
                return read_job(row)
            queued = await connection.scalar(
                sa.select(sa.func.count()).select_from(jobs).where(jobs.c.state == "QUEUED")
            )
            if (queued or 0) >= max_queued:
                raise ServiceError(
                    "QUEUE_FULL", f"{queued} jobs wait already; try later.", retry_after_s=30.0
                )
            await connection.execute(
                jobs.insert().values(
                    project=job.name.project,
                    id=job.name.id,
                    spec=spec_row(job.spec),
                    extends=job.extends,
                    earlier=None if job.earlier is None else earlier_row(job.earlier),
                    labels=dict(job.labels),
                    state="QUEUED",
                    attempt=0,
                    max_attempts=job.max_attempts,
                    lease_owner="",
                    lease_expire=0,
                    last_sequence=0,
                    create_time=job.create_time,
                )
            )
            await self._need(connection, job)
            return await self._change(connection, replace(job, last_sequence=0), state="QUEUED")

    async def _need(self, connection: AsyncConnection, job: Job) -> None:
        """Note the vectors that a job needs, so that they stay until its end."""
        for name in job.inputs:
            if not await is_named(connection, name):
                raise gone(name)
            await connection.execute(
                job_inputs.insert().values(
                    project=name.project, vector_id=name.id, job_id=job.name.id
                )
            )

    async def get(self, name: Name) -> Job:
        async with self._database.reading() as connection:
            return await self._get(connection, name)

    async def list_page(
        self, project: str, states: Sequence[JobState], page: PageRequest
    ) -> tuple[list[Job], str]:
        where: list[sa.ColumnElement[bool]] = [jobs.c.project == project]
        if states:
            where.append(jobs.c.state.in_(states))
        async with self._database.reading() as connection:
            rows, token = await self._pager.fetch(
                connection,
                jobs,
                page,
                scope=f"{project}/jobs/{','.join(sorted(set(states)))}",
                where=where,
                newest_first=True,
            )
        return [_listed(read_job(row)) for row in rows], token

    async def delete(self, name: Name) -> None:
        job = await self.get(name)
        if job.state not in FINAL_STATES:
            raise ServiceError(
                "JOB_NOT_ENDED", f"{name} is {job.state}; cancel it first.", resource=str(name)
            )
        await self.forget(name)

    async def ended_before(self, time_us: int) -> list[Name]:
        async with self._database.reading() as connection:
            rows = await connection.execute(
                sa.select(jobs.c.project, jobs.c.id)
                .where(jobs.c.state.in_(sorted(FINAL_STATES)), jobs.c.end_time < time_us)
                .order_by(jobs.c.end_time)
                .limit(_NAMES_PER_PAGE)
            )
            return [Name(row.project, "jobs", row.id) for row in rows]

    async def forget(self, name: Name) -> None:
        ended = jobs.c.state.in_(sorted(FINAL_STATES))
        async with self._database.writing() as connection:
            if (await connection.execute(sa.delete(jobs).where(*_is(name), ended))).rowcount:
                await self._events.forget(connection, name)

    async def unfinished(self, project: str) -> list[Job]:
        async with self._database.reading() as connection:
            rows = await connection.execute(
                sa.select(jobs).where(
                    jobs.c.project == project, jobs.c.state.not_in(sorted(FINAL_STATES))
                )
            )
            found = [read_job(row) for row in rows]
        return [job for job in found if job.state not in FINAL_STATES]

    async def tally(self) -> Mapping[tuple[JobState, str], int]:
        unfinished = jobs.c.state.in_(["QUEUED", *sorted(HELD_STATES)])
        async with self._database.reading() as connection:
            rows = await connection.execute(sa.select(jobs.c.state, jobs.c.spec).where(unfinished))
            return Counter((row.state, asked_operation(row.spec)) for row in rows)

    async def pace(self, project: str, operator: OperatorRef) -> float:
        latest = sa.select(jobs.c.spec, jobs.c.progress)
        latest = latest.where(jobs.c.project == project, jobs.c.progress.is_not(None))
        latest = latest.order_by(jobs.c.create_time.desc()).limit(_JOBS_LOOKED_AT)
        async with self._database.reading() as connection:
            rows = (await connection.execute(latest)).all()
        for row in rows:
            spec, progress = read_spec(row.spec), read_progress(row.progress)
            if spec and progress and spec.operator == operator and progress.seconds_per_product:
                return progress.seconds_per_product
        return 0.0

    async def claim(self) -> Job | None:
        now = self._database.now()
        async with self._database.updating() as connection:
            await self._settle(
                connection, jobs.c.lease_expire < now, "its lease ran out while the job ran."
            )
            claimed = None
            while claimed is None and (job := await self._oldest_queued(connection)) is not None:
                if job.spec is None:
                    await self._end(connection, job, unreadable(job.name))
                    continue
                claimed = await self._change(
                    connection,
                    job,
                    state="RUNNING",
                    attempt=job.attempt + 1,
                    start_time=now,
                    progress=None,
                    lease_owner=self._owner,
                    lease_expire=now + self._lease_us,
                )
        return claimed

    async def _oldest_queued(self, connection: AsyncConnection) -> Job | None:
        query = sa.select(jobs).where(jobs.c.state == "QUEUED")
        query = query.order_by(jobs.c.create_time, jobs.c.id).limit(1)
        query = query.with_for_update(skip_locked=True)  # another server is about to take that one
        row = (await connection.execute(query)).one_or_none()
        return None if row is None else read_job(row)

    async def renew(self, lease: Lease) -> JobState:
        async with self._database.updating() as connection:
            job = await self._held(connection, lease)
            renewed = self._database.now() + self._lease_us
            await connection.execute(
                sa.update(jobs).where(*_is(lease.name)).values(lease_expire=renewed)
            )
        return job.state

    async def report(self, lease: Lease, progress: RunProgress) -> JobState:
        async with self._database.updating() as connection:
            job = await self._held(connection, lease)
            body = progress_row(progress)
            await self._append(
                connection,
                job,
                {"kind": "progress", "value": body},
                progress=body,
                lease_expire=self._database.now() + self._lease_us,
            )
        return job.state

    async def finish(self, lease: Lease, end: JobResult | JobError | None) -> Job:
        async with self._database.updating() as connection:
            job = await self._held(connection, lease)
            return await self._end(connection, job, end)

    async def give_back(self, lease: Lease, *, counted: bool = True) -> Job:
        async with self._database.updating() as connection:
            job = await self._held(connection, lease)
            if job.state == "CANCELLING":
                return await self._end(connection, job, None)
            # The number of an attempt that does not count is given again, to another owner.
            attempt = job.attempt if counted else job.attempt - 1
            return await self._requeue(connection, job, attempt=attempt)

    async def _requeue(self, connection: AsyncConnection, job: Job, **columns: Any) -> Job:
        return await self._change(
            connection, job, state="QUEUED", lease_owner="", lease_expire=0, **columns
        )

    async def cancel(self, name: Name) -> Job:
        async with self._database.updating() as connection:
            job = await self._get(connection, name, lock=True)
            if job.state == "QUEUED":
                job = await self._end(connection, job, None)
            elif job.state == "RUNNING":
                job = await self._change(connection, job, state="CANCELLING")
        return job

    async def relabel(self, name: Name, labels: Mapping[str, str], etag: str) -> Job:
        async with self._database.updating() as connection:
            job = await self._get(connection, name, lock=True)
            check_etag(etag, job.labels, str(name))
            change = sa.update(jobs).where(*_is(name)).values(labels=dict(labels)).returning(jobs)
            return read_job((await connection.execute(change)).one())

    async def recover(self) -> list[Job]:
        # Whoever shares the database may live; who does not has ended, if there is another one now.
        lost = (
            jobs.c.lease_expire < self._database.now()
            if self._database.is_shared
            else jobs.c.lease_owner != self._owner
        )
        async with self._database.updating() as connection:
            return await self._settle(connection, lost, "the server ended while the job ran.")

    async def _settle(
        self, connection: AsyncConnection, lost: sa.ColumnElement[bool], cause: str
    ) -> list[Job]:
        """End or queue again the jobs that a lost runner holds."""
        settled = []
        rows = await connection.execute(
            sa.select(jobs)
            .where(jobs.c.state.in_(sorted(HELD_STATES)), lost)
            .with_for_update(skip_locked=True)  # another server settles it, or its runner lives
        )
        for job in [read_job(row) for row in rows]:
            if job.state == "CANCELLING":
                settled.append(await self._end(connection, job, None))
            elif job.spec is None:
                settled.append(await self._end(connection, job, unreadable(job.name)))
            elif job.attempt >= job.max_attempts:
                settled.append(await self._end(connection, job, attempts_exhausted(job, cause)))
            else:
                settled.append(await self._requeue(connection, job))
        return settled

    async def events_after(self, name: Name, sequence: int, timeout_s: float) -> list[JobEvent]:
        return await self._events.after(name, sequence, timeout_s)

    async def _row(
        self, connection: AsyncConnection, name: Name, *, lock: bool = False
    ) -> sa.Row[Any] | None:
        query = sa.select(jobs).where(*_is(name))
        return (await connection.execute(query.with_for_update() if lock else query)).one_or_none()

    async def _get(self, connection: AsyncConnection, name: Name, *, lock: bool = False) -> Job:
        row = await self._row(connection, name, lock=lock)
        if row is None:
            raise not_found(str(name), "job")
        return read_job(row)

    async def _held(self, connection: AsyncConnection, lease: Lease) -> Job:
        row = await self._row(connection, lease.name, lock=True)
        if (
            row is None
            or row.state not in HELD_STATES
            or row.attempt != lease.attempt
            or row.lease_owner != self._owner
        ):
            raise StaleLeaseError(f"attempt {lease.attempt} of {lease.name} is not ours any more")
        return read_job(row)

    async def _end(
        self, connection: AsyncConnection, job: Job, end: JobResult | JobError | None
    ) -> Job:
        columns: dict[str, Any] = {
            "end_time": self._database.now(),
            "lease_owner": "",
            "lease_expire": 0,
            "earlier": None,
        }
        await connection.execute(
            sa.delete(job_inputs).where(
                job_inputs.c.project == job.name.project, job_inputs.c.job_id == job.name.id
            )
        )
        if isinstance(end, JobResult):
            columns["result"] = result_row(end)
            return await self._change(connection, job, state="SUCCEEDED", **columns)
        if isinstance(end, JobError):
            columns["error"] = ERROR.dump_python(end, mode="json")
            return await self._change(connection, job, state="FAILED", error_of=end, **columns)
        return await self._change(connection, job, state="CANCELLED", **columns)

    async def _change(
        self,
        connection: AsyncConnection,
        job: Job,
        *,
        state: JobState,
        error_of: JobError | None = None,
        **columns: Any,
    ) -> Job:
        if state in FINAL_STATES:
            JOBS_ENDED.labels(operation_of(job), state).inc()
        change = StateChange(
            state=state, attempt=columns.get("attempt", job.attempt), error=error_of
        )
        if state == "QUEUED":
            self._database.tell(connection, WORK)
        body = {"kind": "state_change", "value": STATE_CHANGE.dump_python(change, mode="json")}
        return await self._append(connection, job, body, state=state, **columns)

    async def _append(
        self, connection: AsyncConnection, job: Job, body: dict[str, Any], **columns: Any
    ) -> Job:
        sequence = await self._events.append(connection, job.name, body)
        row = (
            await connection.execute(
                sa.update(jobs)
                .where(*_is(job.name))
                .values(last_sequence=sequence, **columns)
                .returning(jobs)
            )
        ).one()
        return read_job(row)


def _is(name: Name) -> tuple[sa.ColumnElement[bool], ...]:
    return jobs.c.project == name.project, jobs.c.id == name.id


def _listed(job: Job) -> Job:
    """A job without the fields that can be long, because a page holds many jobs."""
    progress = job.progress
    if progress is not None:
        progress = replace(progress, detail=None)
    return replace(job, result=None, earlier=None, progress=progress)
