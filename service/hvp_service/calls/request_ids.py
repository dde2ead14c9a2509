"""Gives a repeated call its first answer, for every unary method that has a request id."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
from google.protobuf.message import Message

from hvp_service.calls.around import SERVED_PREFIX
from hvp_service.calls.names import PROJECT, require_project
from hvp_service.calls.request_log import RequestLog

if TYPE_CHECKING:
    from hvp_service.calls.around import Continuation, Handler


class RequestIdInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Gives a repeated call the answer of the first one.

    It is the innermost interceptor, so that a remembered answer has passed every other check.
    """

    def __init__(self, request_log: RequestLog):
        self._request_log = request_log

    async def intercept_service(
        self,
        continuation: Continuation,
        details: grpc.HandlerCallDetails,
    ) -> Handler:
        """Wrap the method's handler; called by gRPC."""
        handler = await continuation(details)
        method = details.method
        if (
            handler is None
            or not method.startswith(SERVED_PREFIX)
            or handler.request_streaming
            or handler.response_streaming
        ):
            return handler
        behaviour: Any = handler.unary_unary

        async def remembered(request: Message, context: Any) -> bytes:
            async def respond() -> bytes:
                response: Message = await behaviour(request, context)
                return response.SerializeToString()

            # A call that only asks whether it could be made has nothing to remember.
            request_id = getattr(request, "request_id", "")
            if not request_id or getattr(request, "validate_only", False):
                return await respond()
            payload = type(request)()
            payload.CopyFrom(request)
            payload.ClearField("request_id")
            # A remembered answer is for those who may see it.
            project = _project(request)
            if PROJECT.fullmatch(project):  # of anything else the method says what is wrong
                require_project(project)
            key = (project, method.rpartition("/")[2], request_id)
            return await self._request_log.once(
                key, payload.SerializeToString(deterministic=True), respond
            )

        return grpc.unary_unary_rpc_method_handler(
            remembered,
            request_deserializer=handler.request_deserializer,
            response_serializer=None,  # `remembered` gives bytes
        )


def _project(request: Any) -> str:
    """Project that a request names, in its parent or in its operator; unchecked, a key only."""
    name: str = request.parent if hasattr(request, "parent") else request.operator.checkpoint
    return name.split("/")[1].replace("\0", "?") if "/" in name else ""
