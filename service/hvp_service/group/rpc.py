"""hvp.v1.SystemService."""

# ruff: noqa: N802, D102  (gRPC gives the methods their names, the protos their description)

from __future__ import annotations

from typing import Any

from hvp_protos.v1 import operator_pb2, system_pb2_grpc
from hvp_protos.v1 import system_pb2 as pb

from hvp_service.app.dependencies import Dependencies
from hvp_service.calls.messages import timestamp
from hvp_service.calls.names import parse_parent
from hvp_service.group import service as system
from hvp_service.identity import caller
from hvp_service.identity.messages import identity_message
from hvp_service.operators.resolver import DTYPES, PRECISIONS

KINDS = operator_pb2.OperatorSpec.Kind.keys()


class SystemServicer(system_pb2_grpc.SystemServiceServicer):
    """The RPCs that tell of the server and its workers."""

    def __init__(self, deps: Dependencies):
        self._deps = deps

    async def GetServerInfo(
        self, request: pb.GetServerInfoRequest, context: Any
    ) -> pb.GetServerInfoResponse:
        return pb.GetServerInfoResponse(
            version=self._deps.version,
            dtypes=DTYPES,
            operator_kinds=[kind for kind in KINDS if kind != "KIND_UNSPECIFIED"],
            precisions=sorted(PRECISIONS[self._deps.operators.device]),
            max_chunk_bytes=self._deps.config.max_chunk_bytes,
            max_message_bytes=self._deps.config.max_message_bytes,
            start_time=timestamp(self._deps.start_time),
        )

    async def ListWorkerGroups(
        self, request: pb.ListWorkerGroupsRequest, context: Any
    ) -> pb.ListWorkerGroupsResponse:
        group = await system.report_group(self._deps, parse_parent(request.parent))
        return pb.ListWorkerGroupsResponse(
            worker_groups=[
                pb.WorkerGroup(
                    name=str(group.name),
                    state=pb.WorkerGroup.State.Value(f"STATE_{group.state}"),
                    generation=group.generation,
                    num_ranks=group.num_ranks,
                    device=group.device,
                    ranks=[
                        pb.RankInfo(
                            rank=rank.rank,
                            hostname=rank.hostname,
                            pid=rank.pid,
                            resident_bytes=rank.resident_bytes,
                            num_threads=rank.num_threads,
                        )
                        for rank in group.ranks
                    ],
                )
            ]
        )

    async def GetQueue(self, request: pb.GetQueueRequest, context: Any) -> pb.GetQueueResponse:
        queued, running = await system.queue(self._deps, parse_parent(request.parent))
        return pb.GetQueueResponse(num_queued=queued, num_running=running)

    async def WhoAmI(self, request: pb.WhoAmIRequest, context: Any) -> pb.WhoAmIResponse:
        return identity_message(caller.identity())
