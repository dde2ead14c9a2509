"""hvp.v1.CheckpointService."""

# ruff: noqa: N802, D102  (gRPC gives the methods their names, the protos their description)

from __future__ import annotations

from typing import Any

from hvp_protos.v1 import checkpoint_pb2 as pb
from hvp_protos.v1 import checkpoint_pb2_grpc

from hvp_service.app.dependencies import Dependencies
from hvp_service.blobs.messages import digest_value
from hvp_service.calls.messages import page_request
from hvp_service.calls.names import parse, parse_parent
from hvp_service.checkpoints import service as checkpoints
from hvp_service.checkpoints.messages import checkpoint_message
from hvp_service.checkpoints.store import CheckpointFile


class CheckpointServicer(checkpoint_pb2_grpc.CheckpointServiceServicer):
    """The RPCs on checkpoints."""

    def __init__(self, deps: Dependencies):
        self._deps = deps

    async def CreateCheckpoint(
        self, request: pb.CreateCheckpointRequest, context: Any
    ) -> pb.CreateCheckpointResponse:
        files = [
            CheckpointFile(path=file.path, digest=digest_value(file.digest))
            for file in request.files
        ]
        made = await self._deps.checkpoints.create(parse_parent(request.parent), files)
        return pb.CreateCheckpointResponse(
            checkpoint=checkpoint_message(made), ignored_files=made.ignored_files
        )

    async def GetCheckpoint(
        self, request: pb.GetCheckpointRequest, context: Any
    ) -> pb.GetCheckpointResponse:
        found = await self._deps.checkpoints.get(parse(request.name, "checkpoints"))
        return pb.GetCheckpointResponse(checkpoint=checkpoint_message(found))

    async def ListCheckpoints(
        self, request: pb.ListCheckpointsRequest, context: Any
    ) -> pb.ListCheckpointsResponse:
        found, token = await self._deps.checkpoints.list_page(
            parse_parent(request.parent), page_request(request)
        )
        return pb.ListCheckpointsResponse(
            checkpoints=[checkpoint_message(item, parameters=False) for item in found],
            next_page_token=token,
        )

    async def UpdateCheckpoint(
        self, request: pb.UpdateCheckpointRequest, context: Any
    ) -> pb.UpdateCheckpointResponse:
        changed = await checkpoints.update_checkpoint(
            self._deps,
            parse(request.checkpoint.name, "checkpoints"),
            dict(request.checkpoint.labels),
            request.update_mask.paths,
            request.etag,
        )
        return pb.UpdateCheckpointResponse(checkpoint=checkpoint_message(changed, parameters=False))

    async def DeleteCheckpoint(
        self, request: pb.DeleteCheckpointRequest, context: Any
    ) -> pb.DeleteCheckpointResponse:
        await checkpoints.delete_checkpoint(self._deps, parse(request.name, "checkpoints"))
        return pb.DeleteCheckpointResponse()
