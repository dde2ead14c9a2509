"""hvp.v1.BlobService."""

# ruff: noqa: N802, D102  (gRPC gives the methods their names, the protos their description)

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from hvp_protos.chunks import encoded
from hvp_protos.v1 import blob_pb2 as pb
from hvp_protos.v1 import blob_pb2_grpc

from hvp_service.app.dependencies import Dependencies
from hvp_service.blobs import service as blobs
from hvp_service.blobs.messages import blob_message, digest_message, digest_value, upload_message
from hvp_service.calls.messages import page_request
from hvp_service.calls.names import parse, parse_parent
from hvp_service.uploads.chunks import Chunk


class BlobServicer(blob_pb2_grpc.BlobServiceServicer):
    """The RPCs on blobs and on resumable uploads."""

    def __init__(self, deps: Dependencies):
        self._deps = deps

    async def FindMissingBlobs(
        self, request: pb.FindMissingBlobsRequest, context: Any
    ) -> pb.FindMissingBlobsResponse:
        missing = await self._deps.blobs.missing(
            parse_parent(request.parent), [digest_value(d) for d in request.digests]
        )
        return pb.FindMissingBlobsResponse(missing=[digest_message(d) for d in missing])

    async def StartUpload(
        self, request: pb.StartUploadRequest, context: Any
    ) -> pb.StartUploadResponse:
        upload = await self._deps.uploads.start(
            parse_parent(request.parent), digest_value(request.expected)
        )
        return pb.StartUploadResponse(upload=upload_message(upload, self._deps.config))

    async def UploadBlob(
        self, request_iterator: AsyncIterator[pb.UploadBlobRequest], context: Any
    ) -> pb.UploadBlobResponse:
        chunks = (
            Chunk(
                upload=message.upload,
                write_offset=message.write_offset,
                data=message.data,
                crc32c=message.crc32c,
                finish=message.finish,
            )
            async for message in request_iterator
        )
        upload = await self._deps.uploads.write(chunks)
        return pb.UploadBlobResponse(upload=upload_message(upload, self._deps.config))

    async def GetUpload(self, request: pb.GetUploadRequest, context: Any) -> pb.GetUploadResponse:
        upload = await self._deps.uploads.get(parse(request.name, "uploads"))
        return pb.GetUploadResponse(upload=upload_message(upload, self._deps.config))

    async def CancelUpload(
        self, request: pb.CancelUploadRequest, context: Any
    ) -> pb.CancelUploadResponse:
        await self._deps.uploads.cancel(parse(request.name, "uploads"))
        return pb.CancelUploadResponse()

    async def DownloadBlob(
        self, request: pb.DownloadBlobRequest, context: Any
    ) -> AsyncIterator[bytes]:
        async for piece in blobs.download(
            self._deps, parse(request.name, "blobs"), request.read_offset, request.read_limit
        ):
            head = pb.DownloadBlobResponse(offset=piece.offset, crc32c=piece.crc32c)
            yield encoded(head, piece.data)

    async def GetBlob(self, request: pb.GetBlobRequest, context: Any) -> pb.GetBlobResponse:
        blob = await self._deps.blobs.get(parse(request.name, "blobs"))
        return pb.GetBlobResponse(blob=blob_message(blob))

    async def ListBlobs(self, request: pb.ListBlobsRequest, context: Any) -> pb.ListBlobsResponse:
        found, token = await self._deps.blobs.list_page(
            parse_parent(request.parent), page_request(request)
        )
        return pb.ListBlobsResponse(
            blobs=[blob_message(blob) for blob in found], next_page_token=token
        )

    async def DeleteBlob(
        self, request: pb.DeleteBlobRequest, context: Any
    ) -> pb.DeleteBlobResponse:
        await self._deps.blobs.delete(parse(request.name, "blobs"))
        return pb.DeleteBlobResponse()
