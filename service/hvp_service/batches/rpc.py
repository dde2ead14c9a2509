"""hvp.v1.DataBatchService."""

# ruff: noqa: N802, D102  (gRPC gives the methods their names, the protos their description)

from __future__ import annotations

from typing import Any

from hvp_protos.v1 import data_batch_pb2 as pb
from hvp_protos.v1 import data_batch_pb2_grpc

from hvp_service.app.dependencies import Dependencies
from hvp_service.batches import service as batches
from hvp_service.batches.messages import batch_message
from hvp_service.blobs.messages import digest_value
from hvp_service.calls.messages import page_request
from hvp_service.calls.names import parse, parse_parent


class DataBatchServicer(data_batch_pb2_grpc.DataBatchServiceServicer):
    """The RPCs on data batches."""

    def __init__(self, deps: Dependencies):
        self._deps = deps

    async def CreateDataBatch(
        self, request: pb.CreateDataBatchRequest, context: Any
    ) -> pb.CreateDataBatchResponse:
        made = await self._deps.batches.create(
            parse_parent(request.parent), digest_value(request.digest)
        )
        return pb.CreateDataBatchResponse(data_batch=batch_message(made))

    async def GetDataBatch(
        self, request: pb.GetDataBatchRequest, context: Any
    ) -> pb.GetDataBatchResponse:
        found = await self._deps.batches.get(parse(request.name, "dataBatches"))
        return pb.GetDataBatchResponse(data_batch=batch_message(found))

    async def ListDataBatches(
        self, request: pb.ListDataBatchesRequest, context: Any
    ) -> pb.ListDataBatchesResponse:
        found, token = await self._deps.batches.list_page(
            parse_parent(request.parent), page_request(request)
        )
        return pb.ListDataBatchesResponse(
            data_batches=[batch_message(item) for item in found],
            next_page_token=token,
        )

    async def DeleteDataBatch(
        self, request: pb.DeleteDataBatchRequest, context: Any
    ) -> pb.DeleteDataBatchResponse:
        await batches.delete_batch(self._deps, parse(request.name, "dataBatches"))
        return pb.DeleteDataBatchResponse()
