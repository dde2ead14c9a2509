"""Jobs and their events as messages."""

from __future__ import annotations

from dataclasses import asdict

from hvp_protos.v1 import job_pb2 as pb
from hvp_protos.v1 import vector_pb2
from hvp_workers.backend import EigshProgress

from hvp_service.job_store import EigshJob, Job, JobError, JobEvent, JobResult, StateChange
from hvp_service.servicers.messages import operator_message, timestamp


def spec_message(spec: EigshJob) -> pb.JobSpec:
    """What a job does."""
    return pb.JobSpec(
        eigsh=pb.EigshSpec(
            operator=operator_message(spec.operator),
            k=spec.k,
            which=pb.EigshSpec.Which.Value(f"WHICH_{spec.which}"),
            tol=spec.tol,
            max_products=spec.max_products,
            seed=spec.seed,
            num_lanczos_vectors=spec.num_lanczos_vectors,
        )
    )


def progress_message(progress: EigshProgress) -> pb.JobProgress:
    """Where a job stands."""
    return pb.JobProgress(
        num_products=progress.num_products,
        max_products=progress.max_products,
        ritz_values=progress.ritz_values,
        residual_estimates=progress.residual_estimates,
        num_restarts=progress.num_restarts,
        stage=progress.stage,
        seconds_per_product=progress.seconds_per_product,
    )


def error_message(error: JobError) -> pb.JobError:
    """Why a job failed."""
    return pb.JobError(
        code=error.code, reason=error.reason, message=error.message, metadata=error.metadata
    )


def result_message(spec: EigshJob, result: JobResult) -> pb.JobResult:
    """What a job found."""
    found = result.eigsh
    return pb.JobResult(
        eigsh=pb.EigshResult(
            eigenvalues=found.eigenvalues,
            residuals=found.residuals,
            eigenvectors=[
                vector_pb2.Vector(
                    name=name,
                    checkpoint=spec.operator.checkpoint,
                    dtype=spec.operator.dtype,
                    num_elements=result.num_elements,
                    durable=True,
                    create_time=timestamp(result.eigenvector_time),
                )
                for name in result.eigenvectors
            ],
            num_products=found.num_products,
            outcome=pb.EigshResult.Outcome.Value(f"OUTCOME_{found.outcome}"),
            symmetry_defect=found.symmetry_defect,
            ritz_values=found.ritz_values,
            ritz_weights=found.ritz_weights,
            loss=found.loss,
            provenance=found.provenance,
            error_bounds=found.error_bounds,
            completeness=pb.EigshResult.Completeness(**asdict(found.completeness)),
        )
    )


def job_message(job: Job) -> pb.Job:
    """A job."""
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
    )


def event_message(event: JobEvent | None) -> pb.JobEvent:
    """An event, without a body when another version wrote it; None is a heartbeat."""
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
