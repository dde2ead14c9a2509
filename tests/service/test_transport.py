"""The service behind a real socket: statuses and details, double calls, disconnects, nonsense."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import socket
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import google_crc32c
import grpc.aio
import numpy as np
import pytest
import structlog
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status
from hvp_protos.v1 import (
    blob_pb2,
    blob_pb2_grpc,
    checkpoint_pb2,
    checkpoint_pb2_grpc,
    data_batch_pb2,
    data_batch_pb2_grpc,
    density_pb2,
    eigsh_pb2,
    job_pb2,
    job_pb2_grpc,
    operator_pb2,
    operator_pb2_grpc,
    session_pb2,
    session_pb2_grpc,
    system_pb2,
    system_pb2_grpc,
    vector_pb2,
    vector_pb2_grpc,
)
from hvp_service.app.config import ServerConfig
from hvp_service.app.dependencies import Dependencies, open_dependencies
from hvp_service.app.transport import _SERVICES, Transport, start_transport
from hvp_service.calls.limits import _PROMPT, _WAITING, MOST_OPEN, pool_of
from hvp_service.calls.record import add_call
from hvp_service.storage.state_dir import StateDir
from hvp_service.storage.troubles import DatabaseBusyError
from hvp_service.vectors import service as vectors
from hvp_workers.backend import BackendError
from safetensors.numpy import save

from tests.service.quadratic_backend import QuadraticBackend
from tests.service.world import CONFIG, make_operator, quadratic

PARENT = "projects/default"


@dataclass(frozen=True)
class Wire:
    """Stubs on one channel."""

    transport: Transport
    blobs: Any
    checkpoints: Any
    batches: Any
    sessions: Any
    vectors: Any
    operators: Any
    jobs: Any
    system: Any
    health: Any
    reflection: Any


@dataclass(frozen=True)
class Crowded:
    """A server with work that does not end."""

    wire: Wire
    deps: Dependencies
    operator: operator_pb2.OperatorSpec


@pytest.fixture
async def wire(deps: Dependencies) -> AsyncIterator[Wire]:
    async with connected(deps) as wire:
        yield wire


@contextlib.asynccontextmanager
async def connected(deps: Dependencies) -> AsyncIterator[Wire]:
    """A server and stubs on one channel to it."""
    transport = await start_transport(deps)
    async with grpc.aio.insecure_channel(transport.address) as channel:
        yield Wire(
            transport,
            *(
                stub(channel)
                for stub in (
                    blob_pb2_grpc.BlobServiceStub,
                    checkpoint_pb2_grpc.CheckpointServiceStub,
                    data_batch_pb2_grpc.DataBatchServiceStub,
                    session_pb2_grpc.SessionServiceStub,
                    vector_pb2_grpc.VectorServiceStub,
                    operator_pb2_grpc.OperatorServiceStub,
                    job_pb2_grpc.JobServiceStub,
                    system_pb2_grpc.SystemServiceStub,
                    health_pb2_grpc.HealthStub,
                    reflection_pb2_grpc.ServerReflectionStub,
                )
            ),
        )
    await transport.stop(1.0)


async def refusal(call: Any) -> tuple[grpc.StatusCode, dict[str, Any]]:
    """Status of a failed call and its details by type name."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    error = caught.value
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    details: dict[str, Any] = {}
    for packed in status.details if status else ():
        message: Message = getattr(error_details_pb2, packed.TypeName().rpartition(".")[2])()
        packed.Unpack(message)
        details[type(message).__name__] = message
    return error.code(), details


def blob_digest(data: bytes) -> blob_pb2.Digest:
    return blob_pb2.Digest(sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data))


async def start_upload(wire: Wire, data: bytes) -> blob_pb2.UploadSession:
    request = blob_pb2.StartUploadRequest(parent=PARENT, expected=blob_digest(data))
    session: blob_pb2.UploadSession = (await wire.blobs.StartUpload(request)).upload
    return session


def messages(name: str, data: bytes, start: int = 0) -> list[blob_pb2.UploadBlobRequest]:
    size = 1 << 20
    return [
        blob_pb2.UploadBlobRequest(
            upload=name if offset == start else "",
            write_offset=offset,
            data=data[offset : offset + size],
            crc32c=google_crc32c.value(data[offset : offset + size]),
            finish=offset + size >= len(data),
        )
        for offset in range(start, len(data), size)
    ]


async def upload(wire: Wire, data: bytes) -> blob_pb2.Digest:
    session = await start_upload(wire, data)
    if not session.HasField("blob"):
        await wire.blobs.UploadBlob(iter(messages(session.name, data)))
    return blob_digest(data)


async def spec(deps: Dependencies) -> operator_pb2.OperatorSpec:
    ref = await make_operator(deps)
    return operator_pb2.OperatorSpec(
        checkpoint=ref.checkpoint,
        data_batch=ref.data_batch,
        kind=operator_pb2.OperatorSpec.KIND_HESSIAN,
        dtype="float64",
    )


def eigsh(operator: operator_pb2.OperatorSpec, k: int = 2) -> job_pb2.JobSpec:
    which = eigsh_pb2.EigshSpec.WHICH_BE
    return job_pb2.JobSpec(eigsh=eigsh_pb2.EigshSpec(operator=operator, k=k, which=which))


async def serving(wire: Wire) -> bool:
    reply = await wire.health.Check(health_pb2.HealthCheckRequest(), timeout=5)
    return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)


async def test_the_whole_way_from_files_to_eigenvalues(wire: Wire) -> None:
    files = {"config.json": CONFIG, "model.safetensors": save(quadratic())}
    checkpoint = (
        await wire.checkpoints.CreateCheckpoint(
            checkpoint_pb2.CreateCheckpointRequest(
                parent=PARENT,
                files=[
                    checkpoint_pb2.CheckpointFile(path=path, digest=await upload(wire, data))
                    for path, data in files.items()
                ],
            )
        )
    ).checkpoint
    assert checkpoint.num_parameters == 6
    data = save({"input_ids": np.arange(8).reshape(2, 4)})
    batch = (
        await wire.batches.CreateDataBatch(
            data_batch_pb2.CreateDataBatchRequest(parent=PARENT, digest=await upload(wire, data))
        )
    ).data_batch
    operator = operator_pb2.OperatorSpec(
        checkpoint=checkpoint.name,
        data_batch=batch.name,
        kind=operator_pb2.OperatorSpec.KIND_HESSIAN,
        dtype="float64",
    )
    values = np.random.default_rng(0).standard_normal(6)
    head = vector_pb2.CreateVectorRequest(
        parent=PARENT, checkpoint=checkpoint.name, dtype="float64"
    )
    pieces = [
        vector_pb2.WriteVectorRequest(
            create=head if start == 0 else None,
            element_offset=start,
            data=values[start : start + 4].tobytes(),
            crc32c=google_crc32c.value(values[start : start + 4].tobytes()),
        )
        for start in (0, 4)
    ]
    vector = (await wire.vectors.WriteVector(iter(pieces))).vector
    applied = await wire.operators.ApplyOperator(
        operator_pb2.ApplyOperatorRequest(operator=operator, vectors=[vector.name])
    )
    read = wire.vectors.ReadVector(vector_pb2.ReadVectorRequest(name=applied.products[0].name))
    product = np.frombuffer(b"".join([piece.data async for piece in read]))
    np.testing.assert_allclose(product, quadratic()["A"] @ values, rtol=1e-12)
    job = (
        await wire.jobs.CreateJob(job_pb2.CreateJobRequest(parent=PARENT, spec=eigsh(operator)))
    ).job
    watch = wire.jobs.WatchJob(job_pb2.WatchJobRequest(name=job.name))
    events = [response.event async for response in watch]
    assert events[-1].state_change.state == job_pb2.Job.STATE_SUCCEEDED
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    done = (await wire.jobs.GetJob(job_pb2.GetJobRequest(name=job.name))).job
    np.testing.assert_allclose(done.result.eigsh.eigenvalues, [1, 6], rtol=1e-10)
    assert done.result.eigsh.eigenvectors[0].durable
    listed = await wire.jobs.ListJobs(
        job_pb2.ListJobsRequest(parent=PARENT, states=[job_pb2.Job.STATE_SUCCEEDED])
    )
    assert [job.name for job in listed.jobs] == [done.name]


async def test_errors_carry_reason_field_and_request_info(wire: Wire, deps: Dependencies) -> None:
    operator = await spec(deps)
    code, details = await refusal(
        wire.jobs.CreateJob(job_pb2.CreateJobRequest(parent=PARENT, spec=eigsh(operator, k=7)))
    )
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert (details["ErrorInfo"].reason, details["ErrorInfo"].domain) == ("K_INVALID", "hvp.dev")
    assert details["BadRequest"].field_violations[0].field == "spec.eigsh.k"
    assert details["RequestInfo"].request_id
    code, details = await refusal(wire.jobs.GetJob(job_pb2.GetJobRequest(name="x")))
    assert code == grpc.StatusCode.NOT_FOUND
    assert details["ResourceInfo"].resource_name == "x"
    away = blob_digest(b"away")
    code, details = await refusal(
        wire.batches.CreateDataBatch(
            data_batch_pb2.CreateDataBatchRequest(parent=PARENT, digest=away)
        )
    )
    assert code == grpc.StatusCode.FAILED_PRECONDITION
    assert details["PreconditionFailure"].violations[0].type == "MISSING"
    code, details = await refusal(
        wire.blobs.ListBlobs(blob_pb2.ListBlobsRequest(parent="nonsense"))
    )
    assert details["ErrorInfo"].reason == "PARENT_INVALID"


async def test_a_lost_group_is_unavailable_with_a_delay(
    wire: Wire, deps: Dependencies, backend: QuadraticBackend
) -> None:
    operator = await spec(deps)
    backend.lose_after = 0
    request = operator_pb2.EvaluateLossRequest(operator=operator)
    code, details = await refusal(wire.operators.EvaluateLoss(request))
    assert code == grpc.StatusCode.UNAVAILABLE
    assert details["ErrorInfo"].reason == "WORKER_GROUP_LOST"
    assert details["RetryInfo"].retry_delay.seconds > 0
    await deps.group.wait_ready()
    assert (await wire.operators.EvaluateLoss(request)).num_targets == 6


async def test_a_fault_of_the_server_is_internal_and_tells_nothing(
    wire: Wire, deps: Dependencies, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: Any) -> None:
        raise KeyError("secret")

    monkeypatch.setattr(deps.jobs, "get", broken)
    request = job_pb2.GetJobRequest(name=f"{PARENT}/jobs/1")
    code, details = await refusal(wire.jobs.GetJob(request))
    assert code == grpc.StatusCode.INTERNAL
    assert details["ErrorInfo"].reason == "INTERNAL"
    assert not details["ErrorInfo"].metadata


async def test_a_fault_of_a_rank_is_internal_with_an_id_under_which_the_log_has_its_traceback(
    wire: Wire, deps: Dependencies, backend: QuadraticBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    operator = await spec(deps)

    async def broken(*_: Any) -> None:
        trace = "Traceback (most recent call last): in a rank"
        raise BackendError("INTERNAL", "KeyError: 'secret'", {"exception": "KeyError"}, trace)

    monkeypatch.setattr(backend, "loss", broken)
    request = operator_pb2.EvaluateLossRequest(operator=operator)
    with structlog.testing.capture_logs([add_call]) as lines:
        code, details = await refusal(wire.operators.EvaluateLoss(request))
    assert code == grpc.StatusCode.INTERNAL
    assert details["ErrorInfo"].reason == "INTERNAL"
    assert "secret" not in str(details)
    (line,) = [line for line in lines if line["log_level"] == "error"]
    assert "in a rank" in line["exception"]
    assert line["request_id"] == details["RequestInfo"].request_id


async def test_a_busy_database_is_said_to_be_busy_and_worth_another_try(
    wire: Wire, deps: Dependencies, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def busy(name: object) -> None:
        raise DatabaseBusyError("locked")

    monkeypatch.setattr(deps.jobs, "get", busy)
    name = f"projects/default/jobs/{'0' * 32}"
    code, details = await refusal(wire.jobs.GetJob(job_pb2.GetJobRequest(name=name)))
    assert code == grpc.StatusCode.UNAVAILABLE
    assert details["ErrorInfo"].reason == "STATE_DIR_BUSY"
    assert details["RetryInfo"].retry_delay.seconds > 0


async def calls(wire: Wire, deps: Dependencies) -> dict[str, tuple[Any, Any, Any]]:
    """Each mutating method: stub, request, another payload."""
    operator = await spec(deps)
    other = operator_pb2.OperatorSpec()
    other.CopyFrom(operator)
    other.micro_batch_size = 1
    files = {"config.json": CONFIG, "model.safetensors": save(quadratic(5))}
    checkpoint_files = [
        checkpoint_pb2.CheckpointFile(path=path, digest=await upload(wire, data))
        for path, data in files.items()
    ]
    first, second = [
        await upload(wire, save({"input_ids": np.full((1, 3), value)})) for value in (1, 2)
    ]
    vector = (
        await wire.vectors.CreateVector(
            vector_pb2.CreateVectorRequest(
                parent=PARENT,
                checkpoint=operator.checkpoint,
                source=vector_pb2.VectorSource(zeros=vector_pb2.ZerosSource()),
                dtype="float64",
            )
        )
    ).vector.name

    def seeded(seed: int) -> vector_pb2.CreateVectorRequest:
        return vector_pb2.CreateVectorRequest(
            parent=PARENT,
            checkpoint=operator.checkpoint,
            source=vector_pb2.VectorSource(
                seeded=vector_pb2.SeededSource(
                    seed=seed, distribution=vector_pb2.SeededSource.DISTRIBUTION_GAUSSIAN
                )
            ),
        )

    return {
        "StartUpload": (
            wire.blobs.StartUpload,
            blob_pb2.StartUploadRequest(parent=PARENT, expected=blob_digest(b"new")),
            blob_pb2.StartUploadRequest(parent=PARENT, expected=blob_digest(b"newer")),
        ),
        "CreateCheckpoint": (
            wire.checkpoints.CreateCheckpoint,
            checkpoint_pb2.CreateCheckpointRequest(parent=PARENT, files=checkpoint_files),
            checkpoint_pb2.CreateCheckpointRequest(parent=PARENT, files=checkpoint_files[:1]),
        ),
        "CreateDataBatch": (
            wire.batches.CreateDataBatch,
            data_batch_pb2.CreateDataBatchRequest(parent=PARENT, digest=first),
            data_batch_pb2.CreateDataBatchRequest(parent=PARENT, digest=second),
        ),
        "CreateSession": (
            wire.sessions.CreateSession,
            session_pb2.CreateSessionRequest(parent=PARENT),
            session_pb2.CreateSessionRequest(parent=PARENT, ttl=Duration(seconds=5)),
        ),
        "CreateVector": (wire.vectors.CreateVector, seeded(1), seeded(2)),
        "ComputeGradient": (
            wire.operators.ComputeGradient,
            operator_pb2.ComputeGradientRequest(operator=operator),
            operator_pb2.ComputeGradientRequest(operator=other),
        ),
        "ApplyOperator": (
            wire.operators.ApplyOperator,
            operator_pb2.ApplyOperatorRequest(operator=operator, vectors=[vector]),
            operator_pb2.ApplyOperatorRequest(operator=operator, vectors=[vector, vector]),
        ),
        "CreateJob": (
            wire.jobs.CreateJob,
            job_pb2.CreateJobRequest(parent=PARENT, spec=eigsh(operator)),
            job_pb2.CreateJobRequest(parent=PARENT, spec=eigsh(operator, k=1)),
        ),
    }


METHODS = [
    "StartUpload",
    "CreateCheckpoint",
    "CreateDataBatch",
    "CreateSession",
    "CreateVector",
    "ComputeGradient",
    "ApplyOperator",
    "CreateJob",
]


@pytest.mark.parametrize("method", METHODS)
async def test_a_call_repeated_with_its_request_id_has_one_effect(
    wire: Wire, deps: Dependencies, method: str
) -> None:
    call, request, other = (await calls(wire, deps))[method]
    request.request_id = other.request_id = str(uuid.uuid4())
    together = await asyncio.gather(*(call(request) for _ in range(4)))
    later = await call(request)
    assert all(answer == later for answer in together)
    code, details = await refusal(call(other))
    assert code == grpc.StatusCode.ALREADY_EXISTS
    assert details["ErrorInfo"].reason == "REQUEST_ID_REUSED"


async def test_a_reused_request_id_is_refused_while_the_first_call_runs(
    wire: Wire, deps: Dependencies, backend: QuadraticBackend
) -> None:
    call, request, other = (await calls(wire, deps))["ApplyOperator"]
    request.request_id = other.request_id = str(uuid.uuid4())
    backend.gate.clear()
    first = asyncio.ensure_future(call(request))
    await asyncio.sleep(0.2)
    code, _ = await refusal(call(other))
    assert code == grpc.StatusCode.ALREADY_EXISTS
    second = asyncio.ensure_future(call(request))
    await asyncio.sleep(0.05)
    backend.gate.set()
    assert await first == await second


async def test_without_a_request_id_every_call_counts(wire: Wire, deps: Dependencies) -> None:
    call, request, _ = (await calls(wire, deps))["CreateVector"]
    assert (await call(request)).vector.name != (await call(request)).vector.name


async def test_writing_a_vector_twice_with_one_request_id_makes_one(
    wire: Wire, deps: Dependencies
) -> None:
    operator = await spec(deps)

    async def write(values: Any) -> Any:
        data = np.asarray(values, np.float64).tobytes()
        head = vector_pb2.CreateVectorRequest(
            parent=PARENT, checkpoint=operator.checkpoint, dtype="float64", request_id="w1"
        )
        message = vector_pb2.WriteVectorRequest(
            create=head, data=data, crc32c=google_crc32c.value(data)
        )
        return await wire.vectors.WriteVector(iter([message]))

    assert await write(np.ones(6)) == await write(np.ones(6))
    code, _ = await refusal(write(np.zeros(6)))
    assert code == grpc.StatusCode.ALREADY_EXISTS


async def test_a_client_that_vanishes_in_mid_upload_resumes_where_it_was(
    wire: Wire, deps: Dependencies
) -> None:
    data = os.urandom(3 << 20)
    session = await start_upload(wire, data)
    requests = messages(session.name, data)
    async with grpc.aio.insecure_channel(wire.transport.address) as channel:
        call = blob_pb2_grpc.BlobServiceStub(channel).UploadBlob()  # type: ignore[no-untyped-call]
        await call.write(requests[0])
        await call.write(requests[1])
        for _ in range(200):
            state = await wire.blobs.GetUpload(blob_pb2.GetUploadRequest(name=session.name))
            if state.upload.committed_size >= 2 << 20:
                break
            await asyncio.sleep(0.01)
    state = await wire.blobs.GetUpload(blob_pb2.GetUploadRequest(name=session.name))
    start = state.upload.committed_size
    assert start == 2 << 20
    done = await wire.blobs.UploadBlob(iter(messages(session.name, data, start)))
    download = wire.blobs.DownloadBlob(blob_pb2.DownloadBlobRequest(name=done.upload.blob.name))
    pieces = [piece async for piece in download]
    assert b"".join(piece.data for piece in pieces) == data
    assert all(google_crc32c.value(piece.data) == piece.crc32c for piece in pieces)


async def test_a_client_that_vanishes_from_a_watch_leaves_the_job_alone(
    wire: Wire, deps: Dependencies, backend: QuadraticBackend
) -> None:
    backend.gate.clear()
    request = job_pb2.CreateJobRequest(parent=PARENT, spec=eigsh(await spec(deps)))
    job = (await wire.jobs.CreateJob(request)).job
    watch = wire.jobs.WatchJob(job_pb2.WatchJobRequest(name=job.name))
    await watch.read()
    watch.cancel()
    backend.gate.set()
    wait = job_pb2.WaitJobRequest(name=job.name)
    wait.timeout.FromSeconds(30)
    done = (await wire.jobs.WaitJob(wait)).job
    assert done.state == job_pb2.Job.STATE_SUCCEEDED


async def test_cancelling_twice_answers_the_state(
    wire: Wire, deps: Dependencies, backend: QuadraticBackend
) -> None:
    backend.gate.clear()
    request = job_pb2.CreateJobRequest(parent=PARENT, spec=eigsh(await spec(deps)))
    job = (await wire.jobs.CreateJob(request)).job
    for _ in range(2):
        cancelled = await wire.jobs.CancelJob(job_pb2.CancelJobRequest(name=job.name))
        assert cancelled.job.state in (
            job_pb2.Job.STATE_CANCELLING,
            job_pb2.Job.STATE_CANCELLED,
        )
    backend.gate.set()
    watch = wire.jobs.WatchJob(job_pb2.WatchJobRequest(name=job.name))
    events = [response.event async for response in watch]
    assert events[-1].state_change.state == job_pb2.Job.STATE_CANCELLED


async def test_a_message_beyond_the_limit_is_refused_and_the_server_goes_on(wire: Wire) -> None:
    big = blob_pb2.UploadBlobRequest(upload="x", data=bytes(5 << 20))
    code, _ = await refusal(wire.blobs.UploadBlob(iter([big])))
    assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert await serving(wire)


async def test_a_job_of_an_operation_that_this_server_does_not_know_is_refused(wire: Wire) -> None:
    newer = job_pb2.JobSpec.FromString(b"\x9a\x06\x00")  # a field of a client to come
    for spec in (newer, job_pb2.JobSpec()):
        _, details = await refusal(
            wire.jobs.CreateJob(job_pb2.CreateJobRequest(parent=PARENT, spec=spec))
        )
        assert details["ErrorInfo"].reason == "SPEC_MISSING"


async def test_a_plan_tells_what_a_job_takes_and_queues_nothing(
    wire: Wire, deps: Dependencies
) -> None:
    operator = await spec(deps)
    request = job_pb2.CreateJobRequest(parent=PARENT, spec=eigsh(operator), validate_only=True)
    answer = await wire.jobs.CreateJob(request)
    plan = answer.plan
    assert (plan.fits, plan.problem, plan.num_ranks) == (True, "", 1)
    assert plan.max_products == 60  # ten times the operator's order
    # A basis of six rows, and beside it two eigenvectors and four vectors to work with, in four
    # fifths of what is free.
    assert plan.wished_bytes_per_rank == (6 + 2 + 4) * 6 * 8 * 5 // 4
    assert (plan.seconds_per_product, plan.max_seconds) == (0, 0)
    assert answer.job.spec.eigsh.operator.precision == "full"
    assert await deps.jobs.unfinished("default") == []

    create = job_pb2.CreateJobRequest(parent=PARENT, spec=eigsh(operator))
    created = await wire.jobs.CreateJob(create)
    await wire.jobs.WaitJob(
        job_pb2.WaitJobRequest(name=created.job.name, timeout=Duration(seconds=30))
    )
    assert created.plan == plan
    plan = (await wire.jobs.CreateJob(request)).plan
    assert plan.seconds_per_product == 0.25  # of the job before
    assert plan.max_seconds == 60 * 0.25

    bad = job_pb2.CreateJobRequest(parent=PARENT, spec=eigsh(operator, k=7), validate_only=True)
    _, details = await refusal(wire.jobs.CreateJob(bad))
    assert details["ErrorInfo"].reason == "K_INVALID"
    assert details["BadRequest"].field_violations[0].field == "spec.eigsh.k"


async def test_what_has_no_room_is_planned_with_the_reason_and_not_queued(
    wire: Wire, deps: Dependencies, backend: QuadraticBackend
) -> None:
    backend.memory_bytes = 64
    operator = await spec(deps)
    request = job_pb2.CreateJobRequest(parent=PARENT, spec=eigsh(operator), validate_only=True)
    plan = (await wire.jobs.CreateJob(request)).plan
    assert not plan.fits
    assert plan.least_bytes_per_rank > plan.available_bytes_per_rank == 64
    assert "use more workers or float32" in plan.problem

    # A deterministic operator's job has all that it wishes, or does not begin.
    for flag in (False, True):
        operator.deterministic = flag
        asked = job_pb2.JobSpec(
            density=density_pb2.DensitySpec(operator=operator, num_probes=8, num_steps=4)
        )
        request = job_pb2.CreateJobRequest(parent=PARENT, spec=asked, validate_only=True)
        plan = (await wire.jobs.CreateJob(request)).plan
        is_all = plan.least_bytes_per_rank == plan.wished_bytes_per_rank
        assert is_all == flag
    request = job_pb2.CreateJobRequest(parent=PARENT, spec=asked)
    _, details = await refusal(wire.jobs.CreateJob(request))
    assert details["ErrorInfo"].reason == "DETERMINISTIC_MEMORY"
    assert details["ErrorInfo"].metadata["needed_bytes"] == str(plan.least_bytes_per_rank)


async def test_a_question_of_symmetric_matrices_is_not_asked_of_a_jacobian(
    wire: Wire, deps: Dependencies
) -> None:
    operator = await spec(deps)
    operator.kind = operator_pb2.OperatorSpec.KIND_JACOBIAN
    create = job_pb2.CreateJobRequest(parent=PARENT, spec=eigsh(operator))
    _, details = await refusal(wire.jobs.CreateJob(create))
    assert details["ErrorInfo"].reason == "OPERATOR_NOT_SYMMETRIC"
    assert details["BadRequest"].field_violations[0].field == "spec.eigsh.operator"

    described = await wire.operators.DescribeOperator(
        operator_pb2.DescribeOperatorRequest(operator=operator)
    )
    assert list(described.domain_shape) == [6]
    assert len(described.codomain_shape) == 3
    assert described.operator.micro_batch_size == 0
    operator.micro_batch_size = 2
    _, details = await refusal(
        wire.operators.DescribeOperator(operator_pb2.DescribeOperatorRequest(operator=operator))
    )
    assert details["ErrorInfo"].reason == "MICRO_BATCH_INVALID"


async def test_labels_alone_can_be_changed_and_an_old_etag_changes_nothing(
    wire: Wire, deps: Dependencies
) -> None:
    operator = await spec(deps)
    create = job_pb2.CreateJobRequest(parent=PARENT, spec=eigsh(operator), labels={"who": "me"})
    job = (await wire.jobs.CreateJob(create)).job
    checkpoint = (
        await wire.checkpoints.GetCheckpoint(
            checkpoint_pb2.GetCheckpointRequest(name=operator.checkpoint)
        )
    ).checkpoint
    mask = FieldMask(paths=["labels"])

    def update_job(etag: str, mask: FieldMask = mask, **labels: str) -> Any:
        changed = job_pb2.Job(name=job.name, labels=labels)
        request = job_pb2.UpdateJobRequest(job=changed, update_mask=mask, etag=etag)
        return wire.jobs.UpdateJob(request)

    def update_checkpoint(etag: str, mask: FieldMask = mask, **labels: str) -> Any:
        changed = checkpoint_pb2.Checkpoint(name=checkpoint.name, labels=labels)
        request = checkpoint_pb2.UpdateCheckpointRequest(
            checkpoint=changed, update_mask=mask, etag=etag
        )
        return wire.checkpoints.UpdateCheckpoint(request)

    for update, before, field in (
        (update_job, job, "job"),
        (update_checkpoint, checkpoint, "checkpoint"),
    ):
        changed = getattr(await update(before.etag, run="7"), field)
        assert dict(changed.labels) == {"run": "7"}
        assert changed.etag != before.etag
        code, details = await refusal(update(before.etag, run="8"))
        assert (code, details["ErrorInfo"].reason) == (grpc.StatusCode.ABORTED, "ETAG_MISMATCH")
        assert dict(getattr(await update("", run="9"), field).labels) == {"run": "9"}
        for paths in ([], ["state"], ["labels", "state"]):
            _, details = await refusal(update("", FieldMask(paths=paths), run="1"))
            assert details["ErrorInfo"].reason == "FIELD_MASK_INVALID"
        _, details = await refusal(update("", run="x" * 257))
        assert details["ErrorInfo"].reason == "LABELS_INVALID"
        assert details["BadRequest"].field_violations[0].field == f"{field}.labels"
    read = await wire.checkpoints.GetCheckpoint(
        checkpoint_pb2.GetCheckpointRequest(name=checkpoint.name)
    )
    assert dict(read.checkpoint.labels) == {"run": "9"}


async def test_the_server_tells_what_it_is(wire: Wire, deps: Dependencies) -> None:
    info = await wire.system.GetServerInfo(system_pb2.GetServerInfoRequest())
    assert info.version == deps.version
    assert list(info.dtypes) == ["float32", "float64"]
    assert list(info.operator_kinds) == [
        *("KIND_HESSIAN", "KIND_GGN"),
        *("KIND_EMPIRICAL_FISHER_TOKEN", "KIND_EMPIRICAL_FISHER_SEQUENCE"),
        "KIND_JACOBIAN",
        *("KIND_GRADIENT_COVARIANCE_TOKEN", "KIND_GRADIENT_COVARIANCE_SEQUENCE"),
        "KIND_FISHER",
    ]
    assert list(info.precisions) == ["bfloat16", "full"]
    groups = await wire.system.ListWorkerGroups(system_pb2.ListWorkerGroupsRequest(parent=PARENT))
    (group,) = groups.worker_groups
    assert group.state == system_pb2.WorkerGroup.STATE_READY
    assert group.generation == deps.group.backend.generation
    assert group.ranks[0].pid == os.getpid()
    queue = await wire.system.GetQueue(system_pb2.GetQueueRequest(parent=PARENT))
    assert (queue.num_queued, queue.num_running) == (0, 0)


async def test_health_and_reflection_name_every_service(wire: Wire) -> None:
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    replies = wire.reflection.ServerReflectionInfo(iter([request]))
    (reply,) = [reply async for reply in replies]
    names = [service.name for service in reply.list_services_response.service]
    assert sum(name.startswith("hvp.v1.") for name in names) == len(_SERVICES)
    for name in ["", *(name for name in names if name.startswith("hvp."))]:
        check = await wire.health.Check(health_pb2.HealthCheckRequest(service=name))
        assert check.status == health_pb2.HealthCheckResponse.SERVING


async def test_strangers_who_watch_the_health_take_nobody_elses_place(
    wire: Wire, deps: Dependencies
) -> None:
    job = (
        await wire.jobs.CreateJob(
            job_pb2.CreateJobRequest(parent=PARENT, spec=eigsh(await spec(deps)))
        )
    ).job
    streams = [wire.health.Watch(health_pb2.HealthCheckRequest()) for _ in range(MOST_OPEN)]
    for stream in streams:
        await stream.read()
    code, details = await refusal(wire.health.Watch(health_pb2.HealthCheckRequest()).read())
    assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert details["ErrorInfo"].reason == "TOO_MANY_CALLS"
    assert await serving(wire)
    assert (await wire.jobs.WaitJob(job_pb2.WaitJobRequest(name=job.name))).job.name == job.name
    for stream in streams:
        stream.cancel()


@pytest.fixture
async def crowded(config: ServerConfig, state_dir: StateDir) -> AsyncIterator[Crowded]:
    """A server with few places for calls that last, and a product that does not end."""
    backend = QuadraticBackend()
    few = config.model_copy(
        update={"max_waiting_calls": 100, "max_working_calls": 3, "heartbeat_s": 15.0}
    )
    deps = await open_dependencies(few, state_dir, backend)
    async with connected(deps) as wire:
        operator = await spec(deps)
        backend.gate.clear()
        yield Crowded(wire, deps, operator)
        backend.gate.set()
    await deps.close()


async def test_watchers_beyond_the_limit_are_refused_and_leave_room_for_everybody_else(
    crowded: Crowded,
) -> None:
    wire = crowded.wire
    request = job_pb2.CreateJobRequest(parent=PARENT, spec=eigsh(crowded.operator))
    job = (await wire.jobs.CreateJob(request)).job
    watch = job_pb2.WatchJobRequest(name=job.name)
    watches = [wire.jobs.WatchJob(watch) for _ in range(1000)]
    first = await asyncio.gather(*(call.read() for call in watches), return_exceptions=True)
    refused = [answer for answer in first if isinstance(answer, grpc.aio.AioRpcError)]
    assert len(first) - len(refused) == 100
    for extra in (
        wire.jobs.WatchJob(watch).read(),
        wire.jobs.WaitJob(job_pb2.WaitJobRequest(name=job.name)),
    ):
        code, details = await refusal(extra)
        assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert details["ErrorInfo"].reason == "TOO_MANY_CALLS"
        assert details["RetryInfo"].retry_delay.seconds > 0
    assert await serving(wire)
    assert (await wire.jobs.GetJob(job_pb2.GetJobRequest(name=job.name))).job.name == job.name
    assert (await start_upload(wire, b"new")).name
    cancelled = await wire.jobs.CancelJob(job_pb2.CancelJobRequest(name=job.name))
    assert cancelled.job.state == job_pb2.Job.STATE_CANCELLING
    for call in watches:
        call.cancel()


async def test_calls_that_wait_for_the_ranks_leave_room_too(crowded: Crowded) -> None:
    wire, operator = crowded.wire, crowded.operator
    zeros = vectors.ZerosSource()
    vector = await vectors.create(
        crowded.deps, "default", operator.checkpoint, operator.dtype, zeros
    )
    apply = operator_pb2.ApplyOperatorRequest(operator=operator, vectors=[str(vector.name)])
    running = [asyncio.ensure_future(wire.operators.ApplyOperator(apply)) for _ in range(3)]
    await asyncio.sleep(0.3)
    code, details = await refusal(wire.operators.ApplyOperator(apply))
    assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert details["ErrorInfo"].reason == "TOO_MANY_CALLS"
    queue = await wire.system.GetQueue(system_pb2.GetQueueRequest(parent=PARENT))
    assert queue.num_queued == 0
    for call in running:
        call.cancel()


def test_only_calls_that_the_protos_have_are_taken_for_prompt() -> None:
    files = [module.DESCRIPTOR for module, *_ in _SERVICES]
    methods = {
        f"/{service.full_name}/{method.name}": method
        for file in files
        for service in file.services_by_name.values()
        for method in service.methods
    }
    assert {f"/hvp.v1.{name}" for name in _PROMPT | _WAITING} <= methods.keys()
    for name, method in methods.items():
        streams = method.client_streaming or method.server_streaming
        assert not (streams and pool_of(name) == "prompt")


async def test_draining_refuses_new_calls_and_ends_watches(
    wire: Wire, deps: Dependencies, backend: QuadraticBackend
) -> None:
    backend.gate.clear()
    request = job_pb2.CreateJobRequest(parent=PARENT, spec=eigsh(await spec(deps)))
    job = (await wire.jobs.CreateJob(request)).job
    watch = wire.jobs.WatchJob(job_pb2.WatchJobRequest(name=job.name, after_sequence=99))

    async def follow() -> None:
        async for _ in watch:
            pass

    following = asyncio.ensure_future(follow())
    await asyncio.sleep(0.1)
    deps.drain.begin()
    code, details = await refusal(following)
    assert (code, details["ErrorInfo"].reason) == (
        grpc.StatusCode.UNAVAILABLE,
        "SERVER_DRAINING",
    )
    code, details = await refusal(wire.jobs.GetJob(job_pb2.GetJobRequest(name=job.name)))
    assert code == grpc.StatusCode.UNAVAILABLE
    assert details["RetryInfo"].retry_delay.seconds > 0
    await wire.transport.health.enter_graceful_shutdown()
    assert not await serving(wire)
    backend.gate.set()


async def test_bytes_that_are_no_http_leave_the_server_serving(wire: Wire) -> None:
    host, port = wire.transport.address.rsplit(":", 1)
    generator = np.random.default_rng(0)
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

    def throw(data: bytes) -> None:
        with socket.create_connection((host, int(port)), timeout=5) as connection:
            try:
                connection.sendall(data)
                connection.shutdown(socket.SHUT_WR)
                connection.settimeout(0.2)
                connection.recv(1000)
            except OSError:
                pass  # the server may hang up on nonsense at any time

    for start in (b"", preface, preface + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])):
        for size in (0, 1, 9, 100, 5000):
            await asyncio.to_thread(throw, start + generator.bytes(size))
    assert await serving(wire)


async def test_messages_that_are_no_protobuf_leave_the_server_serving(wire: Wire) -> None:
    generator = np.random.default_rng(1)
    async with grpc.aio.insecure_channel(wire.transport.address) as channel:
        for path in ("/hvp.v1.JobService/CreateJob", "/hvp.v1.VectorService/CreateVector"):
            call: Any = channel.unary_unary(path)  # type: ignore[call-arg]
            for size in (1, 10, 100):
                with pytest.raises(grpc.aio.AioRpcError):
                    await call(b"\xff" + generator.bytes(size))
    assert await serving(wire)


async def test_a_second_server_on_the_port_is_an_error(wire: Wire, deps: Dependencies) -> None:
    from dataclasses import replace

    config = deps.config.model_copy(update={"address": wire.transport.address})
    with pytest.raises(OSError, match="cannot listen"):
        await start_transport(replace(deps, config=config))
