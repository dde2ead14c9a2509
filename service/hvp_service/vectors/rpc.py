"""hvp.v1.VectorService."""

# ruff: noqa: N802, D102  (gRPC gives the methods their names, the protos their description)

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from hvp_protos.chunks import encoded
from hvp_protos.v1 import vector_pb2 as pb
from hvp_protos.v1 import vector_pb2_grpc

from hvp_service.app.dependencies import Dependencies
from hvp_service.blobs.messages import digest_value
from hvp_service.calls.messages import enum_name, page_request
from hvp_service.calls.names import parse, parse_parent
from hvp_service.vectors import service as vectors
from hvp_service.vectors import transfer
from hvp_service.vectors.messages import vector_message
from hvp_service.vectors.transfer import VectorPiece


class VectorServicer(vector_pb2_grpc.VectorServiceServicer):
    """The RPCs on vectors, of parameter space and of outputs."""

    def __init__(self, deps: Dependencies):
        self._deps = deps

    async def CreateVector(
        self, request: pb.CreateVectorRequest, context: Any
    ) -> pb.CreateVectorResponse:
        made = await vectors.create(
            self._deps,
            parse_parent(request.parent),
            request.checkpoint,
            request.dtype,
            _source(request.source),
            request.session,
            request.data_batch,
            request.parameters,
            request.module,
            request.of_input,
        )
        return pb.CreateVectorResponse(vector=vector_message(made))

    async def GetVector(self, request: pb.GetVectorRequest, context: Any) -> pb.GetVectorResponse:
        found = await self._deps.vectors.get(parse(request.name, "vectors"))
        return pb.GetVectorResponse(vector=vector_message(found))

    async def ListVectors(
        self, request: pb.ListVectorsRequest, context: Any
    ) -> pb.ListVectorsResponse:
        found, token = await self._deps.vectors.list_page(
            parse_parent(request.parent), page_request(request)
        )
        return pb.ListVectorsResponse(
            vectors=[vector_message(item) for item in found],
            next_page_token=token,
        )

    async def DeleteVector(
        self, request: pb.DeleteVectorRequest, context: Any
    ) -> pb.DeleteVectorResponse:
        await self._deps.vectors.delete(parse(request.name, "vectors"))
        return pb.DeleteVectorResponse()

    async def KeepVector(
        self, request: pb.KeepVectorRequest, context: Any
    ) -> pb.KeepVectorResponse:
        kept = await vectors.keep(self._deps, parse(request.name, "vectors"))
        return pb.KeepVectorResponse(vector=vector_message(kept))

    async def ReduceVectors(
        self, request: pb.ReduceVectorsRequest, context: Any
    ) -> pb.ReduceVectorsResponse:
        pairs = [(pair.left, pair.right) for pair in request.inner_products]
        return pb.ReduceVectorsResponse(
            inner_products=await vectors.inner_products(self._deps, pairs)
        )

    async def ReadVector(self, request: pb.ReadVectorRequest, context: Any) -> AsyncIterator[bytes]:
        async for piece in transfer.read(
            self._deps,
            parse(request.name, "vectors"),
            request.element_offset,
            request.element_limit,
        ):
            head = pb.ReadVectorResponse(element_offset=piece.offset, crc32c=piece.crc32c)
            yield encoded(head, piece.data)

    async def WriteVector(
        self, request_iterator: AsyncIterator[pb.WriteVectorRequest], context: Any
    ) -> pb.WriteVectorResponse:
        first = await anext(request_iterator, pb.WriteVectorRequest())
        made = await transfer.write(
            self._deps,
            parse_parent(first.create.parent),
            first.create.checkpoint,
            first.create.dtype,
            first.create.request_id,
            _pieces(first, request_iterator),
            first.create.session,
            first.create.data_batch,
            first.create.parameters,
            first.create.module,
            first.create.of_input,
        )
        return pb.WriteVectorResponse(vector=vector_message(made))


async def _pieces(
    first: pb.WriteVectorRequest, rest: AsyncIterator[pb.WriteVectorRequest]
) -> AsyncIterator[VectorPiece]:
    yield _piece(first)
    async for message in rest:
        yield _piece(message)


def _piece(message: pb.WriteVectorRequest) -> VectorPiece:
    return VectorPiece(
        element_offset=message.element_offset, data=message.data, crc32c=message.crc32c
    )


def _source(message: pb.VectorSource) -> vectors.VectorSource:
    match message.WhichOneof("source"):
        case "seeded":
            return vectors.SeededSource(
                seed=message.seeded.seed,
                distribution=enum_name(pb.SeededSource.Distribution, message.seeded.distribution),
            )
        case "blob":
            return digest_value(message.blob)
        case "combination":
            return vectors.CombinationSource(
                terms=tuple((term.coefficient, term.vector) for term in message.combination.terms)
            )
        case "zeros":
            return vectors.ZerosSource()
        case "parameters":
            return vectors.ParametersSource()
    return None
