"""hvp.v1.KeyService."""

# ruff: noqa: N802, D102  (gRPC gives the methods their names, the protos their description)

from __future__ import annotations

from typing import Any, Protocol

from hvp_protos.v1 import key_pb2 as pb
from hvp_protos.v1 import key_pb2_grpc

from hvp_service.calls.names import parse, parse_parent
from hvp_service.identity.keys import KeyStore
from hvp_service.identity.messages import key_message, ttl_value


class HasKeys(Protocol):
    """What the RPCs work with: all that a server has, or its keys alone."""

    @property
    def keys(self) -> KeyStore:
        """The keys."""


class KeyServicer(key_pb2_grpc.KeyServiceServicer):
    """The RPCs on API keys."""

    def __init__(self, deps: HasKeys):
        self._keys = deps.keys

    async def CreateKey(self, request: pb.CreateKeyRequest, context: Any) -> pb.CreateKeyResponse:
        key, text = await self._keys.create(
            parse_parent(request.parent, all_too=True),
            request.role,
            label=request.label,
            ttl_s=ttl_value(request),
        )
        return pb.CreateKeyResponse(key=key_message(key), api_key=text)

    async def ListKeys(self, request: pb.ListKeysRequest, context: Any) -> pb.ListKeysResponse:
        keys = await self._keys.list(parse_parent(request.parent, all_too=True))
        return pb.ListKeysResponse(keys=[key_message(key) for key in keys])

    async def RevokeKey(self, request: pb.RevokeKeyRequest, context: Any) -> pb.RevokeKeyResponse:
        key = await self._keys.revoke(parse(request.name, "keys"))
        return pb.RevokeKeyResponse(key=key_message(key))
