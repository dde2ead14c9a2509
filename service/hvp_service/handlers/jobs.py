"""Queueing, cancelling and following jobs."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace

from hvp_workers.backend import Which

from hvp_service.clock import now_us
from hvp_service.dependencies import Dependencies
from hvp_service.eigsh_limits import MAX_EIGENPAIRS, check_fits
from hvp_service.errors import ServiceError
from hvp_service.job_store import FINAL_STATES, EigshJob, Job, JobEvent, StateChange
from hvp_service.names import Name
from hvp_service.operator_resolver import OperatorRef

MAX_WAIT_S = 60.0
MAX_LABELS = 64
MAX_LABEL_LENGTH = 256

WHICHES: dict[str, Which] = {
    "WHICH_LA": "LA",
    "WHICH_SA": "SA",
    "WHICH_LM": "LM",
    "WHICH_BE": "BE",
}


def job_id(project: str, request_id: str) -> str:
    """The id that a request id always leads to: a retry after a crash finds the row."""
    if not request_id:
        return uuid.uuid4().hex
    return hashlib.sha256(f"{project}\0{request_id}".encode()).hexdigest()[:32]


def check_served(spec: str | None) -> None:
    """Refuse jobs of a kind that is not served.

    Args:
        spec: Field of the proto's JobSpec that is set.

    Raises:
        ServiceError: SPEC_MISSING, KIND_UNSUPPORTED.
    """
    if spec is None:
        raise ServiceError("SPEC_MISSING", "Say what the job does: eigsh.", field="spec")
    if spec != "eigsh":
        raise ServiceError(
            "KIND_UNSUPPORTED", f"{spec} jobs are not served yet; eigsh is.", field="spec"
        )


def check_eigsh(
    *,
    operator: OperatorRef,
    k: int,
    which: str,
    tol: float,
    max_products: int,
    seed: int,
    num_lanczos_vectors: int,
    num_parameters: int,
) -> EigshJob:
    """An eigenpair job that can run.

    Raises:
        ServiceError: K_INVALID, WHICH_UNSUPPORTED, TOL_INVALID, MAX_PRODUCTS_INVALID,
            NUM_LANCZOS_VECTORS_INVALID.
    """
    largest = min(num_parameters - 1, MAX_EIGENPAIRS)
    if not 1 <= k <= largest:
        raise ServiceError(
            "K_INVALID",
            f"k is {k}; of an operator of order {num_parameters}, 1 to {largest} eigenpairs can be "
            "asked in one job.",
            field="spec.eigsh.k",
            metadata={"k": str(k), "num_parameters": str(num_parameters)},
        )
    if which not in WHICHES:
        raise ServiceError(
            "WHICH_UNSUPPORTED",
            f"Say which eigenvalues: {', '.join(WHICHES)}.",
            field="spec.eigsh.which",
        )
    if not 0 <= tol < 1:
        raise ServiceError(
            "TOL_INVALID",
            f"tol is {tol}; 0 <= tol < 1 is possible. It is relative to the largest eigenvalue's "
            "magnitude: with 1, any vector would do.",
            field="spec.eigsh.tol",
        )
    if max_products < 0 or 0 < max_products < 2 * k:
        raise ServiceError(
            "MAX_PRODUCTS_INVALID",
            f"max_products is {max_products}; a basis of k = {k} and the k residuals take "
            f"{2 * k}, and 0 lets the server choose.",
            field="spec.eigsh.max_products",
        )
    if num_lanczos_vectors and not k < num_lanczos_vectors <= num_parameters:
        raise ServiceError(
            "NUM_LANCZOS_VECTORS_INVALID",
            f"num_lanczos_vectors is {num_lanczos_vectors}; {k + 1} to {num_parameters} are "
            "possible, and 0 lets the server choose.",
            field="spec.eigsh.num_lanczos_vectors",
        )
    return EigshJob(
        operator=operator,
        k=k,
        which=WHICHES[which],
        tol=tol,
        max_products=max_products,
        seed=seed,
        num_lanczos_vectors=num_lanczos_vectors,
    )


async def create(
    deps: Dependencies,
    name: Name,
    *,
    operator: OperatorRef,
    k: int,
    which: str,
    tol: float,
    max_products: int,
    seed: int,
    num_lanczos_vectors: int,
    labels: Mapping[str, str],
    validate_only: bool,
) -> Job:
    """Check an eigenpair job and queue it.

    Args:
        deps: Dependencies.
        name: Of the job; a job of this name and the same spec is answered as it stands.
        operator: As in `EigshJob`, like the following.
        k: See there.
        which: The enum value's name.
        tol: See there.
        max_products: See there.
        seed: See there.
        num_lanczos_vectors: See there.
        labels: The caller's own.
        validate_only: Check and answer without queueing.

    Raises:
        ServiceError: As `check_eigsh` and `OperatorResolver.resolve`, LABELS_INVALID, QUEUE_FULL,
            REQUEST_ID_REUSED, INSUFFICIENT_CLUSTER_MEMORY.
    """
    resolved = await deps.operators.resolve(operator, "spec.eigsh.operator")
    spec = check_eigsh(
        operator=replace(
            operator,
            dtype=resolved.operator.space.dtype,
            precision=resolved.operator.precision,
        ),
        k=k,
        which=which,
        tol=tol,
        max_products=max_products,
        seed=seed,
        num_lanczos_vectors=num_lanczos_vectors,
        num_parameters=resolved.num_parameters,
    )
    if len(labels) > MAX_LABELS or any(
        len(text) > MAX_LABEL_LENGTH for item in labels.items() for text in item
    ):
        raise ServiceError(
            "LABELS_INVALID",
            f"A job has at most {MAX_LABELS} labels of {MAX_LABEL_LENGTH} characters.",
            field="labels",
        )
    await check_fits(deps.group, spec, resolved)
    job = Job(
        name=name,
        spec=spec,
        labels=labels,
        max_attempts=deps.config.max_attempts,
        create_time=now_us(),
    )
    if validate_only:
        return job
    created = await deps.jobs.create(job, deps.config.max_queued_jobs)
    if created.spec != spec:
        raise ServiceError(
            "REQUEST_ID_REUSED",
            "This request id came before with another job; use a new one.",
            field="request_id",
        )
    deps.dispatcher.notice_work()
    return created


async def cancel(deps: Dependencies, name: Name) -> Job:
    """Ask a job to stop between two products.

    Raises:
        ServiceError: RESOURCE_NOT_FOUND.
    """
    job = await deps.jobs.cancel(name)
    deps.dispatcher.notice_cancel(name)
    return job


async def delete(deps: Dependencies, name: Name) -> None:
    """Forget an ended job, its events, and its eigenvectors but for those that are kept.

    Raises:
        ServiceError: RESOURCE_NOT_FOUND, JOB_NOT_ENDED.
    """
    # A job that has ended never begins again, so its vectors may go before the row that names them.
    if (await deps.jobs.get(name)).state in FINAL_STATES:
        await deps.vectors.delete_of_job(name)
    await deps.jobs.delete(name)


async def wait(deps: Dependencies, name: Name, timeout_s: float) -> Job:
    """The job when it has ended or the time is up.

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
