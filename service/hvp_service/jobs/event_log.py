"""Events of jobs as rows, and those who wait for the next one."""

from __future__ import annotations

import asyncio
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from hvp_service.calls.errors import not_found
from hvp_service.calls.names import Name
from hvp_service.jobs.rows import read_event
from hvp_service.jobs.store import EVENTS_PER_PAGE, JobEvent
from hvp_service.storage.database import Database, job_events, jobs


class EventLog:
    """Events in the table `job_events`, those of each job numbered from 1 without a gap.

    Args:
        database: The database that holds the rows.
    """

    def __init__(self, database: Database):
        self._database = database

    async def append(self, connection: AsyncConnection, name: Name, body: dict[str, Any]) -> int:
        """Store an event of a job.

        Args:
            connection: Connection of an open transaction that holds the job's row.
            name: Name of the job.
            body: The event's body, as `read_event` reads it.

        Returns:
            The event's number.
        """
        # Asked of the events themselves: a damaged row of the job does not know.
        latest = sa.select(sa.func.max(job_events.c.sequence)).where(*_of(name))
        sequence: int = ((await connection.execute(latest)).scalar() or 0) + 1
        await connection.execute(
            job_events.insert().values(
                project=name.project,
                job_id=name.id,
                sequence=sequence,
                time=self._database.now(),
                body=body,
            )
        )
        self._database.tell(connection, _topic(name))
        return sequence

    async def forget(self, connection: AsyncConnection, name: Name) -> None:
        """Delete the events of a job."""
        await connection.execute(sa.delete(job_events).where(*_of(name)))

    async def after(self, name: Name, sequence: int, timeout_s: float) -> list[JobEvent]:
        """See JobStore.events_after."""
        changed = self._database.signals.event(_topic(name))
        events = await self._read(name, sequence)
        if events or timeout_s <= 0:
            return events
        try:
            await asyncio.wait_for(changed.wait(), timeout_s)
        except TimeoutError:
            return []
        return await self._read(name, sequence)

    async def _read(self, name: Name, sequence: int) -> list[JobEvent]:
        job = sa.select(jobs.c.id).where(jobs.c.project == name.project, jobs.c.id == name.id)
        async with self._database.reading() as connection:
            if (await connection.execute(job)).first() is None:
                raise not_found(str(name), "job")
            rows = await connection.execute(
                sa.select(job_events)
                .where(*_of(name), job_events.c.sequence > sequence)
                .order_by(job_events.c.sequence)
                .limit(EVENTS_PER_PAGE)
            )
            return [read_event(row) for row in rows]


def _topic(name: Name) -> str:
    return f"events of {name}"


def _of(name: Name) -> tuple[sa.ColumnElement[bool], ...]:
    return job_events.c.project == name.project, job_events.c.job_id == name.id
