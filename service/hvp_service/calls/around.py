"""An interceptor as a context manager around each call, whatever its shape."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any, ClassVar

import grpc
import grpc.aio
from hvp_protos.chunks import passing_text

if TYPE_CHECKING:  # the stubs are generic where the classes are not
    Handler = grpc.RpcMethodHandler[Any, Any]
    Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[Handler]]

SERVED_PREFIX = "/hvp.v1."  # health and reflection answer as their libraries wrote them
# Streams of theirs that last as long as the caller likes.
LIBRARY_STREAMS = ("/grpc.health.v1.Health/Watch", "/grpc.reflection.")


class AroundInterceptor(grpc.aio.ServerInterceptor, ABC):  # type: ignore[type-arg]
    """Enters `around` before a method's first step and leaves it after its last.

    Attributes:
        prefixes: Prefixes of the methods that it wraps.
    """

    prefixes: ClassVar[tuple[str, ...]] = (SERVED_PREFIX,)

    @abstractmethod
    def around(
        self, method: str, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AbstractAsyncContextManager[None]:
        """The context manager that one call runs in.

        Args:
            method: The method, `/package.Service/Method`.
            context: gRPC's context of the call.
        """

    def around_request(
        self, method: str, request: Any, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AbstractAsyncContextManager[None]:
        """As `around`, for one that also looks at the request, or at the iterator of requests."""
        return self.around(method, context)

    async def intercept_service(
        self,
        continuation: Continuation,
        details: grpc.HandlerCallDetails,
    ) -> Handler:
        """Wrap the method's handler; called by gRPC."""
        handler = await continuation(details)
        method = details.method
        if handler is None or not method.startswith(self.prefixes):
            return handler
        make, behaviour = shape_of(handler)
        wrapped: Any
        if handler.response_streaming:

            async def streaming(request: Any, context: Any) -> AsyncIterator[Any]:
                async with self.around_request(method, request, context):
                    responses = behaviour(request, context)
                    if inspect.isawaitable(responses):  # it writes to the context by itself
                        await responses
                        return
                    async for response in responses:
                        yield response

            wrapped = streaming
        else:

            async def single(request: Any, context: Any) -> Any:
                async with self.around_request(method, request, context):
                    return await behaviour(request, context)

            wrapped = single
        return make(
            wrapped,
            request_deserializer=handler.request_deserializer,
            response_serializer=(
                # A handler with large chunks gives the wire's text itself.
                passing_text(handler.response_serializer) if handler.response_serializer else None
            ),
        )


def shape_of(handler: Any) -> tuple[Callable[..., Handler], Callable[..., Any]]:
    """The gRPC constructor for a handler of the same shape, and the handler's function."""
    match bool(handler.request_streaming), bool(handler.response_streaming):
        case False, False:
            return grpc.unary_unary_rpc_method_handler, handler.unary_unary
        case False, True:
            return grpc.unary_stream_rpc_method_handler, handler.unary_stream
        case True, False:
            return grpc.stream_unary_rpc_method_handler, handler.stream_unary
        case _:
            return grpc.stream_stream_rpc_method_handler, handler.stream_stream
