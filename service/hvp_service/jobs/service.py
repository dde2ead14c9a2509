"""Queueing, cancelling and following jobs."""

from __future__ import annotations

import contextlib
import hashlib
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from hvp_operations.checking import checked
from hvp_operations.operation import SpecError
from hvp_operations.registry import operations

from hvp_service.app.dependencies import Dependencies
from hvp_service.calls.errors import ServiceError
from hvp_service.calls.labels import check_labels, check_mask
from hvp_service.calls.names import Name
from hvp_service.calls.record import current_call
from hvp_service.jobs.extension import earlier_of
from hvp_service.jobs.inputs import using_inputs
from hvp_service.jobs.plan import Plan, plan_of, require_room
from hvp_service.jobs.store import FINAL_STATES, Job, JobEvent, JobSpec, StateChange
from hvp_service.operators.resolver import OperatorRef, ResolvedOperator
from hvp_service.storage.clock import now_us
from hvp_service.vectors.rows import Vector

MAX_WAIT_S = 60.0


def job_id(project: str, request_id: str) -> str:
    """The job's id for a request id, always the same: a retry after a crash finds the row."""
    if not request_id:
        return uuid.uuid4().hex
    return hashlib.sha256(f"{project}\0{request_id}".encode()).hexdigest()[:32]


@contextlib.asynccontextmanager
async def _asked(
    deps: Dependencies,
    operation: str | None,
    operator: OperatorRef,
    values: Mapping[str, Any],
    earlier: Mapping[str, tuple[str, ...]],
) -> AsyncIterator[tuple[JobSpec, ResolvedOperator, list[Vector]]]:
    """Check a question, for a block until whose end the files of its operator and its vectors stay.

    Raises:
        ServiceError: SPEC_MISSING, the operation's own reasons, as `OperatorResolver.resolve`;
            RESOURCE_NOT_FOUND, VECTOR_SPACE_MISMATCH or INPUT_MISSING for a vector that it names.
    """
    if operation is None:
        raise ServiceError(
            "SPEC_MISSING", f"Say what the job does: {', '.join(operations())}.", field="spec"
        )
    where = f"spec.{operation}"
    async with deps.operators.using(operator, f"{where}.operator") as resolved:
        try:
            spec = checked(operations()[operation], values, resolved.facts)
        except SpecError as error:
            raise ServiceError(
                error.reason,
                error.message,
                field=f"{where}.{error.field}",
                metadata=error.metadata,
            ) from None
        asked = JobSpec(
            operation=operation, operator=resolved.filled(operator), spec=spec, earlier=earlier
        )
        async with using_inputs(deps.vectors, asked, resolved) as inputs:
            yield asked, resolved, [each for some in inputs.values() for each in some]


async def create(
    deps: Dependencies,
    name: Name,
    *,
    operation: str | None,
    operator: OperatorRef,
    values: Mapping[str, Any],
    labels: Mapping[str, str],
    validate_only: bool,
    extends: str = "",
) -> tuple[Job, Plan]:
    """Check a question about an operator, plan it and queue it.

    Args:
        deps: The server's stores, settings and ranks.
        name: Name of the job; a job of this name and the same spec is answered as it stands.
        operation: Name of the operation; None where this version does not know it.
        operator: The operator that the question is about.
        values: Values of the operation's spec by field, unchecked.
        labels: The caller's own texts by name.
        validate_only: Queue nothing; a job that does not fit is then told by the plan and not
            refused.
        extends: Name of the job whose result this one goes on from; "" for none.

    Returns:
        The job and its plan.

    Raises:
        ServiceError: SPEC_MISSING, the operation's own reasons, as `OperatorResolver.resolve`,
            RESOURCE_NOT_FOUND, VECTOR_SPACE_MISMATCH or INPUT_MISSING for a vector that the
            question names, LABELS_INVALID, QUEUE_FULL, REQUEST_ID_REUSED,
            INSUFFICIENT_CLUSTER_MEMORY; JOB_NOT_SUCCEEDED, EXTENSION_MISMATCH or
            EXTENSION_UNSUPPORTED for the job to be extended.
    """
    earlier = await earlier_of(deps.jobs, name.project, extends, operation, values)
    values = {**values, **earlier.values}
    asking = _asked(deps, operation, operator, values, earlier.vectors)
    async with asking as (asked, resolved, inputs):
        result = earlier.check(asked)
        check_labels(labels)
        pace = await deps.jobs.pace(name.project, asked.operator)
        planned = await plan_of(deps.group, asked, resolved, pace)
        job = Job(
            name=name,
            spec=asked,
            extends=extends,
            earlier=result,
            labels=labels,
            max_attempts=deps.config.max_attempts,
            create_time=now_us(),
        )
        if validate_only:
            return job, planned
        require_room(asked, planned)
        if deps.database.is_shared:  # and another server's ranks, which lack them, may run the job
            for product in [vector for vector in inputs if not vector.durable]:
                await deps.vectors.retain(product, product.lifetime)
        created = await deps.jobs.create(job, deps.config.max_queued_jobs)
        current_call().names["job"] = str(created.name)
        if created.spec != asked or created.extends != extends:
            raise ServiceError(
                "REQUEST_ID_REUSED",
                "This request id came before with another job; use a new one.",
                field="request_id",
            )
    return created, planned


async def update(
    deps: Dependencies, name: Name, labels: Mapping[str, str], mask: Sequence[str], etag: str
) -> Job:
    """Change a job's labels.

    Args:
        deps: The server's stores, settings and ranks.
        name: Name of the job.
        labels: Labels that the job is to have.
        mask: Names of the fields to change.
        etag: Tag of the labels to replace; "" replaces whatever labels there are.

    Raises:
        ServiceError: RESOURCE_NOT_FOUND, FIELD_MASK_INVALID, LABELS_INVALID, ETAG_MISMATCH.
    """
    check_mask(mask)
    check_labels(labels, "job.labels")
    return await deps.jobs.relabel(name, labels, etag)


async def cancel(deps: Dependencies, name: Name) -> Job:
    """Ask a job to stop between two products.

    Raises:
        ServiceError: RESOURCE_NOT_FOUND.
    """
    job = await deps.jobs.cancel(name)
    deps.dispatcher.notice_cancel(name)
    if job.state in FINAL_STATES and job.inputs:
        await deps.vectors.collect()  # deleted ones that it needed
    return job


async def delete(deps: Dependencies, name: Name) -> None:
    """Delete an ended job, its events, and its vectors but for those that are kept.

    Raises:
        ServiceError: RESOURCE_NOT_FOUND, JOB_NOT_ENDED.
    """
    # A job that has ended never begins again, so its vectors may go before the row that names them.
    if (await deps.jobs.get(name)).state in FINAL_STATES:
        await deps.vectors.delete_of_job(name)
    await deps.jobs.delete(name)


async def wait(deps: Dependencies, name: Name, timeout_s: float) -> Job:
    """Return the job when it has ended or the time is up.

    Raises:
        ServiceError: RESOURCE_NOT_FOUND, TIMEOUT_INVALID, SERVER_DRAINING.
    """
    if timeout_s < 0:
        raise ServiceError("TIMEOUT_INVALID", "A timeout is 0 s or more.", field="timeout")
    end_time = now_us() + int(min(timeout_s, MAX_WAIT_S) * 1e6)
    while True:
        job = await deps.jobs.get(name)
        left_s = (end_time - now_us()) / 1e6
        if job.state in FINAL_STATES or left_s <= 0:
            return job
        await deps.drain.or_refuse(deps.jobs.events_after(name, job.last_sequence, left_s))


async def watch(
    deps: Dependencies, name: Name, after_sequence: int
) -> AsyncIterator[JobEvent | None]:
    """Replay stored events, then follow; None is a heartbeat.

    Raises:
        ServiceError: RESOURCE_NOT_FOUND, SERVER_DRAINING.
    """
    job = await deps.jobs.get(name)
    if job.state in FINAL_STATES and after_sequence >= job.last_sequence:
        return
    while True:
        events = await deps.drain.or_refuse(
            deps.jobs.events_after(name, after_sequence, deps.config.heartbeat_s)
        )
        if not events:
            job = await deps.jobs.get(name)
            if job.state in FINAL_STATES and after_sequence >= job.last_sequence:
                return  # it has ended in a way that no event of this version tells
            yield None
        for event in events:
            yield event
            after_sequence = event.sequence
            body = event.body
            if isinstance(body, StateChange) and body.state in FINAL_STATES:
                return
