"""The gRPC server. Imports grpc: import this only when the ranks are up."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection
from grpc_reflection.v1alpha._async import ReflectionServicer
from grpc_reflection.v1alpha.reflection_pb2_grpc import add_ServerReflectionServicer_to_server
from hvp_protos.v1 import (
    blob_pb2,
    blob_pb2_grpc,
    checkpoint_pb2,
    checkpoint_pb2_grpc,
    data_batch_pb2,
    data_batch_pb2_grpc,
    job_pb2,
    job_pb2_grpc,
    key_pb2,
    key_pb2_grpc,
    operator_pb2,
    operator_pb2_grpc,
    session_pb2,
    session_pb2_grpc,
    system_pb2,
    system_pb2_grpc,
    vector_pb2,
    vector_pb2_grpc,
)

from hvp_service.app.config import split_address
from hvp_service.app.dependencies import Dependencies
from hvp_service.app.drain import Drain
from hvp_service.app.tls import read_certificates
from hvp_service.batches.rpc import DataBatchServicer
from hvp_service.blobs.rpc import BlobServicer
from hvp_service.calls.draining import DrainingInterceptor
from hvp_service.calls.identities import IdentityInterceptor
from hvp_service.calls.limits import LimitInterceptor
from hvp_service.calls.observing import ObservingInterceptor
from hvp_service.calls.request_ids import RequestIdInterceptor
from hvp_service.calls.statuses import ErrorInterceptor
from hvp_service.checkpoints.rpc import CheckpointServicer
from hvp_service.group.rpc import SystemServicer
from hvp_service.group.supervisor import GroupState, GroupSupervisor
from hvp_service.identity.rpc import KeyServicer
from hvp_service.jobs.rpc import JobServicer
from hvp_service.operators.rpc import OperatorServicer
from hvp_service.sessions.rpc import SessionServicer
from hvp_service.vectors.rpc import VectorServicer

# Places for calls that answer at once, health among them, and for those that are just refused.
# Beyond these and the configured limits is gRPC's own guard: RESOURCE_EXHAUSTED without details.
PROMPT_CALLS = 1000
_PARTING_S = 1.0

_SERVICES = (
    (blob_pb2, "BlobService", blob_pb2_grpc.add_BlobServiceServicer_to_server, BlobServicer),
    (
        checkpoint_pb2,
        "CheckpointService",
        checkpoint_pb2_grpc.add_CheckpointServiceServicer_to_server,
        CheckpointServicer,
    ),
    (
        data_batch_pb2,
        "DataBatchService",
        data_batch_pb2_grpc.add_DataBatchServiceServicer_to_server,
        DataBatchServicer,
    ),
    (
        session_pb2,
        "SessionService",
        session_pb2_grpc.add_SessionServiceServicer_to_server,
        SessionServicer,
    ),
    (
        vector_pb2,
        "VectorService",
        vector_pb2_grpc.add_VectorServiceServicer_to_server,
        VectorServicer,
    ),
    (
        operator_pb2,
        "OperatorService",
        operator_pb2_grpc.add_OperatorServiceServicer_to_server,
        OperatorServicer,
    ),
    (job_pb2, "JobService", job_pb2_grpc.add_JobServiceServicer_to_server, JobServicer),
    (key_pb2, "KeyService", key_pb2_grpc.add_KeyServiceServicer_to_server, KeyServicer),
    (
        system_pb2,
        "SystemService",
        system_pb2_grpc.add_SystemServiceServicer_to_server,
        SystemServicer,
    ),
)


@dataclass(frozen=True)
class Transport:
    """A gRPC server that listens."""

    server: grpc.aio.Server
    health: HealthServicer
    drain: Drain
    following: asyncio.Task[None]  # keeps health true to the worker group
    address: str  # HOST:PORT with the port that was taken

    async def stop(self, grace_s: float) -> None:
        """End the server: NOT_SERVING at once, then the end of running calls within the grace.

        While they run new calls are let in, only to be refused with the reason.
        """
        self.following.cancel()
        self.drain.begin()
        await self.health.enter_graceful_shutdown()
        started = time.monotonic()
        await self.drain.idle(grace_s)
        # Answers are on their way; what lasts now are watches of the health.
        left_s = max(0.0, started + grace_s - time.monotonic())
        await self.server.stop(min(left_s, _PARTING_S))


async def start_transport(deps: Dependencies) -> Transport:
    """Listen at the configured address.

    Raises:
        OSError: The address cannot be had.
    """
    limit = deps.config.max_message_bytes
    server = grpc.aio.server(
        interceptors=[
            ObservingInterceptor(lambda: deps.group.backend.generation),
            ErrorInterceptor(),
            IdentityInterceptor(deps.authenticator, deps.audit),
            LimitInterceptor(
                max_waiting=deps.config.max_waiting_calls,
                max_working=deps.config.max_working_calls,
            ),
            DrainingInterceptor(deps.drain),
            RequestIdInterceptor(deps.request_log),
        ],
        options=[
            ("grpc.so_reuseport", 0),  # a second server on the port is an error, not a rival
            ("grpc.max_receive_message_length", limit),
            ("grpc.max_send_message_length", limit),
            # Clients ping every 30 s; the default would answer with GOAWAY.
            ("grpc.http2.min_ping_interval_without_data_ms", 20_000),
            ("grpc.http2.max_pings_without_data", 0),
            ("grpc.keepalive_permit_without_calls", 1),
        ],
        maximum_concurrent_rpcs=PROMPT_CALLS
        + deps.config.max_waiting_calls
        + deps.config.max_working_calls,
    )
    health = HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    names = [health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME]
    for module, service, add, servicer in _SERVICES:
        add(servicer(deps), server)  # type: ignore[no-untyped-call]
        names.append(module.DESCRIPTOR.services_by_name[service].full_name)
    add_ServerReflectionServicer_to_server(ReflectionServicer(names), server)
    host, _ = split_address(deps.config.address)
    certificates = read_certificates(deps.config)
    try:
        if certificates is None:
            port = server.add_insecure_port(deps.config.address)
        else:
            authorities = certificates.client_authorities
            credentials = grpc.ssl_server_credentials(
                [(certificates.key, certificates.chain)],
                root_certificates=authorities,
                require_client_auth=authorities is not None,
            )
            port = server.add_secure_port(deps.config.address, credentials)
    except RuntimeError as error:
        raise OSError(f"cannot listen on {deps.config.address}: {error}") from None
    await server.start()
    following = asyncio.create_task(_follow(deps.group, health, ["", *names]))
    shown = f"[{host}]" if ":" in host else host
    return Transport(
        server=server,
        health=health,
        drain=deps.drain,
        following=following,
        address=f"{shown}:{port}",
    )


async def _follow(group: GroupSupervisor, health: HealthServicer, names: Sequence[str]) -> None:
    """Say SERVING while the ranks can be called, and NOT_SERVING while they cannot."""
    while True:
        state: GroupState = group.state
        serving = health_pb2.HealthCheckResponse.ServingStatus.Value(
            "SERVING" if state == "READY" else "NOT_SERVING"
        )
        for name in names:
            await health.set(name, serving)
        await group.wait_other_than(state)
