"""Jobs and their events as messages."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

from hvp_operations.codec import to_message, to_values
from hvp_operations.registry import operations
from hvp_protos.v1 import job_pb2 as pb
from hvp_protos.v1 import operator_pb2, vector_pb2
from hvp_workers.backend import RunProgress

from hvp_service.calls.labels import etag_of
from hvp_service.calls.messages import timestamp
from hvp_service.jobs.plan import Plan
from hvp_service.jobs.store import Job, JobError, JobEvent, JobResult, JobSpec, StateChange
from hvp_service.operators.messages import operator_message, operator_value
from hvp_service.operators.resolver import OperatorRef


def asked_values(message: pb.JobSpec) -> tuple[str | None, OperatorRef, Mapping[str, Any]]:
    """The question of a spec: the operation (None if unknown), its operator, and its values."""
    name = message.WhichOneof("spec")
    if name is None:
        return None, operator_value(operator_pb2.OperatorSpec()), {}
    spec = getattr(message, name)
    return name, operator_value(spec.operator), to_values(spec, operations()[name].spec)


def spec_message(asked: JobSpec) -> pb.JobSpec:
    """Make the message of a job's spec."""
    message = pb.JobSpec()
    spec = getattr(message, asked.operation)
    spec.operator.CopyFrom(operator_message(asked.operator))
    to_message(asked.spec, spec)
    return message


def plan_message(plan: Plan) -> pb.JobPlan:
    """Make the message of a plan."""
    return pb.JobPlan(
        max_products=plan.cost.max_products,
        seconds_per_product=plan.seconds_per_product,
        max_seconds=plan.seconds_per_product * plan.cost.max_products,
        num_ranks=plan.num_ranks,
        least_bytes_per_rank=plan.least_bytes,
        wished_bytes_per_rank=plan.wished_bytes,
        available_bytes_per_rank=plan.available_bytes,
        fits=not plan.problem,
        problem=plan.problem,
    )


def progress_message(progress: RunProgress) -> pb.JobProgress:
    """Make the message of a run's progress."""
    message = pb.JobProgress(
        stage=progress.stage,
        num_products=progress.num_products,
        max_products=progress.max_products,
        seconds_per_product=progress.seconds_per_product,
    )
    if progress.detail is not None:
        detail = getattr(message, progress.operation)
        detail.SetInParent()
        to_message(progress.detail, detail)
    return message


def error_message(error: JobError) -> pb.JobError:
    """Make the message of a job's error."""
    return pb.JobError(
        code=error.code, reason=error.reason, message=error.message, metadata=error.metadata
    )


def result_message(asked: JobSpec, found: JobResult) -> pb.JobResult:
    """Make the message of a job's result."""
    message = pb.JobResult()
    result = getattr(message, asked.operation)
    result.SetInParent()
    to_message(found.result, result)
    names = iter(found.vectors)
    for field, count in found.result.vector_counts().items():
        of_codomain = field in found.result.of_codomain
        vectors = [
            _vector_message(asked, found, name, of_codomain=of_codomain)
            for name in itertools.islice(names, count)
        ]
        if result.DESCRIPTOR.fields_by_name[field].is_repeated:
            getattr(result, field).extend(vectors)
        else:
            getattr(result, field).CopyFrom(*vectors)
    return message


def _vector_message(
    asked: JobSpec, found: JobResult, name: str, *, of_codomain: bool
) -> vector_pb2.Vector:
    """The message of one of a result's vectors."""
    operator = asked.operator
    of_outputs = found.output_shape if of_codomain else found.argument_shape
    shape = of_outputs or (found.num_elements,)
    module = operator.output_module if of_codomain or operator.own_input else operator.input_module
    return vector_pb2.Vector(
        name=name,
        checkpoint=operator.checkpoint,
        dtype=operator.dtype,
        num_elements=math.prod(shape),
        durable=True,
        create_time=timestamp(found.vector_time),
        data_batch=operator.data_batch if of_outputs else "",
        shape=shape,
        parameters=() if of_outputs else operator.parameters,
        module=module if of_outputs else "",
        of_input=bool(of_outputs) and operator.own_input and not of_codomain,
    )


def job_message(job: Job) -> pb.Job:
    """Make the message of a job."""
    return pb.Job(
        name=str(job.name),
        spec=None if job.spec is None else spec_message(job.spec),
        state=pb.Job.State.Value(f"STATE_{job.state}"),
        error=None if job.error is None else error_message(job.error),
        result=(
            None if job.spec is None or job.result is None else result_message(job.spec, job.result)
        ),
        progress=None if job.progress is None else progress_message(job.progress),
        attempt=job.attempt,
        max_attempts=job.max_attempts,
        create_time=timestamp(job.create_time),
        start_time=timestamp(job.start_time),
        end_time=timestamp(job.end_time),
        labels=job.labels,
        etag=etag_of(job.labels),
        extends=job.extends,
    )


def event_message(event: JobEvent | None) -> pb.JobEvent:
    """Make the message of an event; None gives a heartbeat.

    An event of a kind that this version does not know has no body.
    """
    if event is None:
        return pb.JobEvent(heartbeat=pb.JobEvent.Heartbeat())
    body = event.body
    if body is None:
        return pb.JobEvent(sequence=event.sequence, time=timestamp(event.time))
    if isinstance(body, StateChange):
        return pb.JobEvent(
            sequence=event.sequence,
            time=timestamp(event.time),
            state_change=pb.JobEvent.StateChange(
                state=pb.Job.State.Value(f"STATE_{body.state}"),
                attempt=body.attempt,
                error=None if body.error is None else error_message(body.error),
            ),
        )
    return pb.JobEvent(
        sequence=event.sequence, time=timestamp(event.time), progress=progress_message(body)
    )
