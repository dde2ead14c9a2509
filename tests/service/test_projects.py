"""A project is not there for whoever may not see it, whatever is asked and guessed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, cast

import grpc
import grpc.aio
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from hvp_protos.v1 import (
    blob_pb2,
    checkpoint_pb2,
    data_batch_pb2,
    eigsh_pb2,
    job_pb2,
    key_pb2,
    operator_pb2,
    session_pb2,
    solve_pb2,
    system_pb2,
    vector_pb2,
)
from hvp_service.app.dependencies import Dependencies
from hvp_service.app.transport import _SERVICES, start_transport
from hvp_service.identity.caller import ROLES
from hvp_service.identity.roles import METHOD_ROLES

from tests.service import world
from tests.service.quadratic_backend import QuadraticBackend

METHODS = {
    f"{service}/{method.name}": method
    for module, service, _, _ in _SERVICES
    for method in module.DESCRIPTOR.services_by_name[service].methods
}


@dataclass(frozen=True)
class Names:
    """Resources of one project."""

    parent: str
    blob: str
    upload: str
    checkpoint: str
    batch: str
    vector: str
    session: str
    job: str
    key: str

    @property
    def operator(self) -> operator_pb2.OperatorSpec:
        return operator_pb2.OperatorSpec(
            checkpoint=self.checkpoint,
            data_batch=self.batch,
            kind=operator_pb2.OperatorSpec.KIND_HESSIAN,
            dtype="float64",
        )

    def guessed(self) -> Names:
        """Names of the same form that nothing has."""
        return Names(
            **{
                field: value if field == "parent" else f"{value[:-8]}{value[-8:][::-1]}"
                for field, value in vars(self).items()
            }
        )


Build = Callable[[Names, Names], Any]  # of theirs and of the caller's own


def _job(operator: operator_pb2.OperatorSpec) -> job_pb2.JobSpec:
    return job_pb2.JobSpec(eigsh=eigsh_pb2.EigshSpec(operator=operator, k=1))


def _mixed(theirs: Names, own: Names, **fields: str) -> operator_pb2.OperatorSpec:
    operator = own.operator
    for field in fields:
        setattr(operator, field, getattr(theirs, fields[field]))
    return operator


def _solve(theirs: Names, own: Names, field: str) -> job_pb2.CreateJobRequest:
    minres = solve_pb2.SolveSpec.METHOD_MINRES
    solve = solve_pb2.SolveSpec(
        operator=own.operator, b=[own.vector], method=minres, tol=1e-3, max_products=9
    )
    del getattr(solve, field)[:]
    getattr(solve, field).append(theirs.vector)
    return job_pb2.CreateJobRequest(parent=own.parent, spec=job_pb2.JobSpec(solve=solve))


def _vector(theirs: Names, own: Names, **fields: Any) -> vector_pb2.CreateVectorRequest:
    return vector_pb2.CreateVectorRequest(
        **{
            "parent": own.parent,
            "checkpoint": own.checkpoint,
            "dtype": "float64",
            "source": vector_pb2.VectorSource(zeros=vector_pb2.ZerosSource()),
            **fields,
        }
    )


#: Requests of `other` that name what is the project `default`'s; every method has one.
CASES: dict[str, list[Build]] = {
    "BlobService/FindMissingBlobs": [
        lambda t, o: blob_pb2.FindMissingBlobsRequest(parent=t.parent)
    ],
    "BlobService/StartUpload": [
        lambda t, o: blob_pb2.StartUploadRequest(
            parent=t.parent, expected=blob_pb2.Digest(sha256="0" * 64, size_bytes=3)
        )
    ],
    "BlobService/UploadBlob": [lambda t, o: [blob_pb2.UploadBlobRequest(upload=t.upload)]],
    "BlobService/GetUpload": [lambda t, o: blob_pb2.GetUploadRequest(name=t.upload)],
    "BlobService/CancelUpload": [lambda t, o: blob_pb2.CancelUploadRequest(name=t.upload)],
    "BlobService/DownloadBlob": [lambda t, o: blob_pb2.DownloadBlobRequest(name=t.blob)],
    "BlobService/GetBlob": [lambda t, o: blob_pb2.GetBlobRequest(name=t.blob)],
    "BlobService/ListBlobs": [lambda t, o: blob_pb2.ListBlobsRequest(parent=t.parent)],
    "BlobService/DeleteBlob": [lambda t, o: blob_pb2.DeleteBlobRequest(name=t.blob)],
    "CheckpointService/CreateCheckpoint": [
        lambda t, o: checkpoint_pb2.CreateCheckpointRequest(parent=t.parent, request_id="r")
    ],
    "CheckpointService/GetCheckpoint": [
        lambda t, o: checkpoint_pb2.GetCheckpointRequest(name=t.checkpoint)
    ],
    "CheckpointService/ListCheckpoints": [
        lambda t, o: checkpoint_pb2.ListCheckpointsRequest(parent=t.parent)
    ],
    "CheckpointService/UpdateCheckpoint": [
        lambda t, o: checkpoint_pb2.UpdateCheckpointRequest(
            checkpoint=checkpoint_pb2.Checkpoint(name=t.checkpoint),
            update_mask=FieldMask(paths=["labels"]),
        )
    ],
    "CheckpointService/DeleteCheckpoint": [
        lambda t, o: checkpoint_pb2.DeleteCheckpointRequest(name=t.checkpoint)
    ],
    "DataBatchService/CreateDataBatch": [
        lambda t, o: data_batch_pb2.CreateDataBatchRequest(parent=t.parent)
    ],
    "DataBatchService/GetDataBatch": [
        lambda t, o: data_batch_pb2.GetDataBatchRequest(name=t.batch)
    ],
    "DataBatchService/ListDataBatches": [
        lambda t, o: data_batch_pb2.ListDataBatchesRequest(parent=t.parent)
    ],
    "DataBatchService/DeleteDataBatch": [
        lambda t, o: data_batch_pb2.DeleteDataBatchRequest(name=t.batch)
    ],
    "SessionService/CreateSession": [
        lambda t, o: session_pb2.CreateSessionRequest(parent=t.parent)
    ],
    "SessionService/RenewSession": [lambda t, o: session_pb2.RenewSessionRequest(name=t.session)],
    "SessionService/EndSession": [lambda t, o: session_pb2.EndSessionRequest(name=t.session)],
    "VectorService/CreateVector": [
        lambda t, o: _vector(t, o, parent=t.parent, checkpoint=t.checkpoint),
        lambda t, o: _vector(t, o, checkpoint=t.checkpoint),
        lambda t, o: _vector(t, o, session=t.session),
        lambda t, o: _vector(t, o, data_batch=t.batch),
        lambda t, o: _vector(
            t,
            o,
            source=vector_pb2.VectorSource(
                combination=vector_pb2.LinearCombinationSource(
                    terms=[
                        vector_pb2.LinearCombinationSource.Term(coefficient=1.0, vector=t.vector)
                    ]
                )
            ),
        ),
    ],
    "VectorService/GetVector": [lambda t, o: vector_pb2.GetVectorRequest(name=t.vector)],
    "VectorService/ListVectors": [lambda t, o: vector_pb2.ListVectorsRequest(parent=t.parent)],
    "VectorService/DeleteVector": [lambda t, o: vector_pb2.DeleteVectorRequest(name=t.vector)],
    "VectorService/KeepVector": [lambda t, o: vector_pb2.KeepVectorRequest(name=t.vector)],
    "VectorService/ReduceVectors": [
        lambda t, o: vector_pb2.ReduceVectorsRequest(
            inner_products=[vector_pb2.ReduceVectorsRequest.Pair(left=t.vector, right=t.vector)]
        ),
        lambda t, o: vector_pb2.ReduceVectorsRequest(
            inner_products=[vector_pb2.ReduceVectorsRequest.Pair(left=o.vector, right=t.vector)]
        ),
    ],
    "VectorService/ReadVector": [lambda t, o: vector_pb2.ReadVectorRequest(name=t.vector)],
    "VectorService/WriteVector": [
        lambda t, o: [vector_pb2.WriteVectorRequest(create=_vector(t, o, parent=t.parent))],
        lambda t, o: [vector_pb2.WriteVectorRequest(create=_vector(t, o, checkpoint=t.checkpoint))],
    ],
    "OperatorService/DescribeOperator": [
        lambda t, o: operator_pb2.DescribeOperatorRequest(operator=t.operator),
        lambda t, o: operator_pb2.DescribeOperatorRequest(
            operator=_mixed(t, o, checkpoint="checkpoint")
        ),
        lambda t, o: operator_pb2.DescribeOperatorRequest(
            operator=_mixed(t, o, data_batch="batch")
        ),
        lambda t, o: operator_pb2.DescribeOperatorRequest(
            operator=_mixed(t, o, precondition="vector")
        ),
    ],
    "OperatorService/EvaluateLoss": [
        lambda t, o: operator_pb2.EvaluateLossRequest(operator=t.operator)
    ],
    "OperatorService/ComputeGradient": [
        lambda t, o: operator_pb2.ComputeGradientRequest(operator=t.operator, request_id="r"),
        lambda t, o: operator_pb2.ComputeGradientRequest(operator=o.operator, session=t.session),
    ],
    "OperatorService/EvaluateForms": [
        lambda t, o: operator_pb2.EvaluateFormsRequest(
            operator=o.operator,
            vectors=[t.vector],
            form=operator_pb2.EvaluateFormsRequest.FORM_QUADRATIC,
        ),
    ],
    "OperatorService/EvaluateLossAlong": [
        lambda t, o: operator_pb2.EvaluateLossAlongRequest(
            operator=o.operator, directions=[t.vector], coefficients=[0.0]
        ),
    ],
    "OperatorService/ApplyOperator": [
        lambda t, o: operator_pb2.ApplyOperatorRequest(operator=t.operator, vectors=[t.vector]),
        lambda t, o: operator_pb2.ApplyOperatorRequest(operator=o.operator, vectors=[t.vector]),
    ],
    "JobService/CreateJob": [
        lambda t, o: job_pb2.CreateJobRequest(
            parent=t.parent, spec=_job(t.operator), request_id="r"
        ),
        lambda t, o: job_pb2.CreateJobRequest(parent=o.parent, spec=_job(t.operator)),
        lambda t, o: job_pb2.CreateJobRequest(
            parent=o.parent, spec=_job(o.operator), extends=t.job
        ),
        *(lambda t, o, field=field: _solve(t, o, field) for field in ("b", "x0", "preconditioner")),
    ],
    "JobService/UpdateJob": [
        lambda t, o: job_pb2.UpdateJobRequest(
            job=job_pb2.Job(name=t.job), update_mask=FieldMask(paths=["labels"])
        )
    ],
    "JobService/GetJob": [lambda t, o: job_pb2.GetJobRequest(name=t.job)],
    "JobService/ListJobs": [lambda t, o: job_pb2.ListJobsRequest(parent=t.parent)],
    "JobService/CancelJob": [lambda t, o: job_pb2.CancelJobRequest(name=t.job)],
    "JobService/DeleteJob": [lambda t, o: job_pb2.DeleteJobRequest(name=t.job)],
    "JobService/WaitJob": [lambda t, o: job_pb2.WaitJobRequest(name=t.job)],
    "JobService/WatchJob": [lambda t, o: job_pb2.WatchJobRequest(name=t.job)],
    "KeyService/CreateKey": [
        lambda t, o: key_pb2.CreateKeyRequest(parent=t.parent, role="read"),
        lambda t, o: key_pb2.CreateKeyRequest(parent="projects/-", role="read"),
    ],
    "KeyService/ListKeys": [
        lambda t, o: key_pb2.ListKeysRequest(parent=t.parent),
        lambda t, o: key_pb2.ListKeysRequest(parent="projects/-"),
    ],
    "KeyService/RevokeKey": [
        lambda t, o: key_pb2.RevokeKeyRequest(name=t.key),
        lambda t, o: key_pb2.RevokeKeyRequest(name=t.key.replace("default", "-")),
    ],
    "SystemService/ListWorkerGroups": [
        lambda t, o: system_pb2.ListWorkerGroupsRequest(parent=t.parent)
    ],
    "SystemService/GetQueue": [lambda t, o: system_pb2.GetQueueRequest(parent=t.parent)],
}
#: What names no resource.
OPEN = {"SystemService/GetServerInfo", "SystemService/WhoAmI"}


def test_every_method_has_a_role_and_a_case() -> None:
    assert METHODS.keys() == METHOD_ROLES.keys()
    assert METHODS.keys() == CASES.keys() | OPEN
    for name in OPEN:
        assert not METHODS[name].input_type.fields


@dataclass(frozen=True)
class Caller:
    """Calls with credentials, or with none."""

    channel: grpc.aio.Channel
    metadata: tuple[tuple[str, str], ...] = ()

    async def call(self, method: str, request: Any) -> list[Any]:
        """Call `Service/Method` with a message, or a list of them, and give what it answers."""
        descriptor = METHODS[method]
        sends = "stream" if descriptor.client_streaming else "unary"
        gives = "stream" if descriptor.server_streaming else "unary"
        made: Any = getattr(self.channel, f"{sends}_{gives}")(
            f"/hvp.v1.{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=GetMessageClass(descriptor.output_type).FromString,
        )
        sent = iter(request) if descriptor.client_streaming else request
        answer = made(sent, metadata=self.metadata, timeout=20.0)
        if descriptor.server_streaming:
            return [message async for message in answer]
        return [await answer]

    async def refused(self, method: str, request: Any) -> tuple[str, str, str]:
        """Code, reason and message of a refusal."""
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            print(method, await self.call(method, request))
        status = rpc_status.from_call(caught.value)  # type: ignore[arg-type]
        assert status is not None, caught.value
        info = error_details_pb2.ErrorInfo()
        status.details[0].Unpack(info)
        return caught.value.code().name, info.reason, status.message


@pytest.fixture
async def channel(deps: Dependencies) -> AsyncIterator[grpc.aio.Channel]:
    transport = await start_transport(deps)
    async with grpc.aio.insecure_channel(transport.address) as channel:
        yield channel
    await transport.stop(1.0)


async def bearer(
    deps: Dependencies, channel: grpc.aio.Channel, project: str, role: str, **more: Any
) -> Caller:
    _, text = await deps.keys.create(project, role, **more)
    return Caller(channel, (("authorization", f"Bearer {text}"),))


async def populated(
    deps: Dependencies, everybody: Caller, project: str, monkeypatch: pytest.MonkeyPatch
) -> Names:
    """One of each resource of a project."""
    monkeypatch.setattr(world, "PROJECT", project)
    ref = await world.make_operator(deps)
    job = await world.create_job(deps, ref, request_id="a job")
    await everybody.call("JobService/WaitJob", job_pb2.WaitJobRequest(name=str(job.name)))
    upload = await deps.uploads.start(project, world.digest(b"not yet"))
    key, _ = await deps.keys.create(project, "read")
    empty = vector_pb2.VectorSource(zeros=vector_pb2.ZerosSource())
    (made,) = await everybody.call(
        "VectorService/CreateVector",
        vector_pb2.CreateVectorRequest(
            parent=f"projects/{project}", checkpoint=ref.checkpoint, dtype="float64", source=empty
        ),
    )
    return Names(
        parent=f"projects/{project}",
        blob=f"projects/{project}/blobs/{ref.data_batch[-64:]}",
        upload=str(upload.name),
        checkpoint=ref.checkpoint,
        batch=ref.data_batch,
        vector=made.vector.name,
        session=str((await deps.sessions.create(project, 60.0)).name),
        job=str(job.name),
        key=str(key.name),
    )


async def test_another_project_learns_nothing_by_any_method_whether_ids_are_known_or_guessed(
    deps: Dependencies, channel: grpc.aio.Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    everybody = Caller(channel)
    theirs = await populated(deps, everybody, "default", monkeypatch)
    own = await populated(deps, everybody, "other", monkeypatch)
    other = await bearer(deps, channel, "other", "admin")
    # What was asked before, by those who may, is not answered from memory to those who may not.
    await everybody.call(
        "OperatorService/ComputeGradient",
        operator_pb2.ComputeGradientRequest(operator=theirs.operator, request_id="r"),
    )
    before = await contents(everybody, theirs)
    for method, builds in CASES.items():
        for build in builds:
            answers = []
            for names in (theirs, theirs.guessed()):
                code, reason, message = await other.refused(method, build(names, own))
                for field, name in vars(names).items():
                    message = message.replace(name.rpartition("/")[2], f"<{field}>")
                answers.append((code, reason, message))
            assert answers[0] == answers[1], method
            assert answers[0][:2] == ("NOT_FOUND", "RESOURCE_NOT_FOUND"), (method, answers[0])
    assert await contents(everybody, theirs) == before
    (seen,) = await other.call("JobService/ListJobs", job_pb2.ListJobsRequest(parent=own.parent))
    assert [job.name for job in seen.jobs] == [own.job]


@pytest.mark.parametrize("role", ["read", "submit"])
async def test_a_role_may_do_what_its_methods_say_and_no_more(
    role: str, deps: Dependencies, channel: grpc.aio.Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = await populated(deps, Caller(channel), "other", monkeypatch)
    caller = await bearer(deps, channel, "other", role)
    for method, builds in CASES.items():
        request = builds[0](own.guessed(), own.guessed())
        if ROLES.index(METHOD_ROLES[method]) > ROLES.index(cast(Any, role)):
            code, reason, _ = await caller.refused(method, request)
            assert (code, reason) == ("PERMISSION_DENIED", "ROLE_REQUIRED"), method
        else:
            try:
                await caller.call(method, request)
            except grpc.aio.AioRpcError as error:
                assert error.code() is not grpc.StatusCode.PERMISSION_DENIED, method  # noqa: PT017


async def test_a_watch_ends_soon_after_its_key_is_revoked_or_has_expired(
    deps: Dependencies,
    channel: grpc.aio.Channel,
    backend: QuadraticBackend,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("hvp_service.identity.authentication._LOOKED_AFTER_S", 0.05)
    monkeypatch.setattr("hvp_service.identity.keys._REMEMBERED_S", 0.0)
    backend.gate.clear()  # the job waits until the end
    job = await world.create_job(deps, await world.make_operator(deps))
    watch = job_pb2.WatchJobRequest(name=str(job.name))

    key, text = await deps.keys.create("default", "read")
    shown = Caller(channel, (("authorization", f"Bearer {text}"),))
    watching = asyncio.create_task(shown.refused("JobService/WatchJob", watch))
    await asyncio.sleep(0.3)
    assert not watching.done()
    await deps.keys.revoke(key.name)
    assert (await watching)[:2] == ("UNAUTHENTICATED", "CREDENTIALS_INVALID")

    brief = await bearer(deps, channel, "default", "read", ttl_s=0.5)
    found = await brief.refused("JobService/WatchJob", watch)
    assert found[:2] == ("UNAUTHENTICATED", "CREDENTIALS_EXPIRED")
    backend.gate.set()


async def contents(caller: Caller, names: Names) -> list[bytes]:
    """What a project lists."""
    lists = [method for method in METHODS if method.partition("/")[2].startswith("List")]
    assert len(lists) == 7
    return [
        (await caller.call(method, build(names, names)))[0].SerializeToString(deterministic=True)
        for method in lists
        if method not in ("KeyService/ListKeys", "SystemService/ListWorkerGroups")
        for build in CASES[method]
    ]
