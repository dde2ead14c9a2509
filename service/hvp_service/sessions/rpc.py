"""hvp.v1.SessionService."""

# ruff: noqa: N802, D102  (gRPC gives the methods their names, the protos their description)

from __future__ import annotations

from typing import Any

from google.protobuf.duration_pb2 import Duration
from hvp_protos.v1 import session_pb2 as pb
from hvp_protos.v1 import session_pb2_grpc

from hvp_service.app.dependencies import Dependencies
from hvp_service.calls.messages import timestamp
from hvp_service.calls.names import parse, parse_parent
from hvp_service.sessions.store import Session


class SessionServicer(session_pb2_grpc.SessionServiceServicer):
    """The RPCs on sessions."""

    def __init__(self, deps: Dependencies):
        self._deps = deps

    async def CreateSession(
        self, request: pb.CreateSessionRequest, context: Any
    ) -> pb.CreateSessionResponse:
        ttl = request.ttl
        session = await self._deps.sessions.create(
            parse_parent(request.parent),
            ttl.seconds + ttl.nanos / 1e9 if request.HasField("ttl") else None,
        )
        return pb.CreateSessionResponse(session=_session_message(session))

    async def RenewSession(
        self, request: pb.RenewSessionRequest, context: Any
    ) -> pb.RenewSessionResponse:
        session = await self._deps.sessions.renew(parse(request.name, "sessions"))
        return pb.RenewSessionResponse(session=_session_message(session))

    async def EndSession(
        self, request: pb.EndSessionRequest, context: Any
    ) -> pb.EndSessionResponse:
        await self._deps.sessions.end(parse(request.name, "sessions"))
        return pb.EndSessionResponse()


def _session_message(session: Session) -> pb.Session:
    ttl = Duration()
    ttl.FromMicroseconds(session.ttl_us)
    return pb.Session(
        name=str(session.name),
        create_time=timestamp(session.create_time),
        expire_time=timestamp(session.expire_time),
        ttl=ttl,
    )
