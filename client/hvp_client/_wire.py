"""Connections to one server, and calls on them with deadlines and second tries."""

from __future__ import annotations

import asyncio
import os
import random
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any, ClassVar, TypeVar, final

import grpc
from google.protobuf.message import Message

from hvp_client._channels import Way
from hvp_client._exceptions import (
    AbortedError,
    FailedPreconditionError,
    HvpError,
    ResourceExhaustedError,
    ServerUnreachableError,
    UnavailableError,
)
from hvp_client._settings import Retry, Timeout
from hvp_client._status import error_from_rpc

Response = TypeVar("Response", bound=Message)
Result = TypeVar("Result")

CHUNK_BYTES = 1 << 20  # payload of one streamed message
_MESSAGE_BYTES = 4 << 20
_BULK_CONNECTIONS = 4  # one connection's flow control and one core's framing bound one stream

_OPTIONS = (
    ("grpc.max_send_message_length", _MESSAGE_BYTES),
    ("grpc.max_receive_message_length", _MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # Channels of equal arguments would otherwise share one socket.
    ("grpc.use_local_subchannel_pool", 1),
    # After a refused connection gRPC fails every call without trying until its own pause is over.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # Never through a proxy of the environment: traffic may be plain text, of this host to itself.
    ("grpc.enable_http_proxy", 0),
)


def is_transient(error: HvpError) -> bool:
    """Tell whether the same call may succeed later."""
    if isinstance(error, UnavailableError):
        return True
    return isinstance(error, (ResourceExhaustedError, AbortedError)) and (
        error.retry_after_s is not None
    )


# Damage on the way; a stream that started too far on because the server lost what it had not made
# durable; a stream that broke and took its reason along.
_RESUMABLE = frozenset({"CHUNK_CHECKSUM_MISMATCH", "WRITE_OFFSET_GAP", "STATUS_LOST"})


def is_resumable(error: HvpError) -> bool:
    """Tell whether a stream that failed so may go on later."""
    return is_transient(error) or error.reason in _RESUMABLE


@final
class Wire:
    """Calls to one server. Belongs to the event loop in which it is used first."""

    # gRPC's own threads do not live on in a forked child; calls there hang or abort the process,
    # on new channels too, unless the parent's were all gone.
    _live: ClassVar[weakref.WeakSet[grpc.aio.Channel]] = weakref.WeakSet()
    _inherited: ClassVar[bool] = False

    def __init__(self, way: Way, timeout: Timeout, retry: Retry):
        self._way = way
        self.address = self._way.address
        self.timeout = timeout
        self.retry = retry
        # The first channel is for small calls, so that bulk data cannot delay them.
        self._channels: list[grpc.aio.Channel] = []
        self._methods: dict[tuple[int, str], Callable[..., Any]] = {}
        self._next_bulk = 0
        self._closed = False
        self._reached = False  # whether the server has ever answered

    async def unary(
        self,
        method: str,
        request: Message,
        response: type[Response],
        *,
        timeout_s: float | None = None,
        patience_s: float | None = None,
    ) -> Response:
        """Call `Service/Method`, trying again while that can help.

        Args:
            method: Service and method, as in `JobService/GetJob`.
            request: Message to send; the same bytes on every try.
            response: Class of the answer.
            timeout_s: Deadline of each try; default `Timeout.call_s`.
            patience_s: How long to try; default `Retry.patience_s`.

        Returns:
            The answer.

        Raises:
            HvpError: The last try's failure.
        """
        call = self._method(0, method, "unary_unary", type(request), response)
        deadline_s = self.timeout.call_s if timeout_s is None else timeout_s

        async def once() -> Response:
            try:
                answer: Response = await call(
                    request, timeout=deadline_s, metadata=self._way.metadata()
                )
            except grpc.aio.AioRpcError as error:
                raise self.translate(error, request) from error
            return answer

        return await self.try_again(once, patience_s=patience_s)

    async def client_stream(
        self,
        method: str,
        requests: AsyncIterator[bytes],
        response: type[Response],
        *,
        silence_s: float,
        answer_s: float,
        asked: Message | None = None,
    ) -> Response:
        """Send a stream of messages; one that stands still counts as broken.

        Args:
            method: Service and method.
            requests: The wire's text of the messages to send (`hvp_protos.chunks`).
            response: Class of the answer.
            silence_s: Longest time until the server has room for the next message.
            answer_s: Longest time from the last message to the answer.
            asked: What the stream asks for, whose request id an error names.

        Returns:
            The answer.

        Raises:
            HvpError: The call failed; UnavailableError `STREAM_SILENT` when it stood still.
        """
        send = self._method(self._bulk(), method, "stream_unary", None, response)
        loop = asyncio.get_running_loop()
        limit = asyncio.timeout(silence_s)
        under_way = True

        async def noted() -> AsyncIterator[bytes]:
            async for message in requests:
                if under_way:  # gRPC may ask once more for a call that has ended
                    limit.reschedule(loop.time() + silence_s)
                yield message
            if under_way:
                limit.reschedule(loop.time() + answer_s)

        try:
            async with limit:
                answer: Response = await send(noted(), metadata=self._way.metadata())
                return answer
        except TimeoutError:
            raise UnavailableError(
                f"{self.address} has taken nothing for {silence_s:g} s or given no answer for "
                f"{answer_s:g} s; look into the server's log, and call again",
                reason="STREAM_SILENT",
            ) from None
        except grpc.aio.AioRpcError as error:
            raise self.translate(error, asked) from error
        finally:
            under_way = False

    async def server_stream(
        self,
        method: str,
        request: Message,
        response: type[Response],
        *,
        bulk: bool,
        silence_s: float,
    ) -> AsyncGenerator[Response, None]:
        """Give the messages of a stream; a stream that falls silent counts as broken.

        Args:
            method: Service and method.
            request: Message to send.
            response: Class of the messages.
            bulk: Whether to take a connection for bulk data.
            silence_s: Longest wait for the next message.

        Yields:
            Messages in order.

        Raises:
            HvpError: The stream broke; UnavailableError `STREAM_SILENT` when it fell silent.
        """
        channel = self._bulk() if bulk else 0
        start = self._method(channel, method, "unary_stream", type(request), response)
        call = start(request, metadata=self._way.metadata())
        messages = aiter(call)
        try:
            while True:
                async with asyncio.timeout(silence_s):
                    message = await anext(messages, None)
                if message is None:
                    return
                yield message
        except TimeoutError:
            raise UnavailableError(
                f"nothing came from {self.address} for {silence_s:g} s",
                reason="STREAM_SILENT",
            ) from None
        except grpc.aio.AioRpcError as error:
            raise self.translate(error, request) from error
        finally:
            call.cancel()

    async def try_again(
        self, once: Callable[[], Awaitable[Result]], *, patience_s: float | None = None
    ) -> Result:
        """Await `once()` until it succeeds, its failure is final, or patience is over."""
        pauses: Pauses | None = None
        while True:
            try:
                result = await once()
            except HvpError as error:
                if not is_transient(error):
                    raise
                if pauses is None:
                    pauses = Pauses(self.retry, self._patience_s(patience_s))
                await pauses.after(error)
            else:
                self._reached = True
                return result

    def _patience_s(self, asked_s: float | None) -> float:
        patience_s = self.retry.patience_s if asked_s is None else asked_s
        # An address that has never answered is more likely wrong than between two servers.
        return patience_s if self._reached else min(patience_s, self.retry.contact_s)

    def translate(self, error: grpc.aio.AioRpcError, request: Message | None = None) -> HvpError:
        """Make this package's exception of a call's failure."""
        request_id = getattr(request, "request_id", "")
        translated = error_from_rpc(error, address=self.address, request_id=request_id)
        self._reached |= not isinstance(translated, ServerUnreachableError)
        return translated

    async def close(self) -> None:
        """Close every connection; calls under way end with an error."""
        self._closed = True
        for channel in self._channels:
            await channel.close(None)
        self._channels.clear()
        self._methods.clear()  # they hold the channels

    @classmethod
    def note_fork(cls) -> None:
        """Remember, in a forked child, whether the parent had open channels."""
        cls._inherited = len(cls._live) > 0

    def _bulk(self) -> int:
        self._next_bulk = self._next_bulk % _BULK_CONNECTIONS + 1
        return self._next_bulk

    def _method(
        self,
        channel: int,
        method: str,
        shape: str,
        request: type[Message] | None,
        response: type[Message],
    ) -> Callable[..., Any]:
        """A method on a channel; of no class of requests, it takes their text."""
        if self._closed:
            raise FailedPreconditionError(
                "this client is closed; open another", reason="CLIENT_CLOSED"
            )
        if self._inherited:
            raise FailedPreconditionError(
                "this process was forked while its parent had a client open, which gRPC cannot "
                "stand; start it with multiprocessing's 'spawn', or close the client first",
                reason="CLIENT_FORKED",
            )
        # Channels belong to the running loop, so they cannot be opened in __init__.
        if not self._channels:
            self._channels = [
                self._way.awaited_channel(_OPTIONS) for _ in range(1 + _BULK_CONNECTIONS)
            ]
            self._live.update(self._channels)
        if (channel, method) not in self._methods:
            self._methods[channel, method] = getattr(self._channels[channel], shape)(
                f"/hvp.v1.{method}",
                request_serializer=None if request is None else request.SerializeToString,
                response_deserializer=response.FromString,
            )
        return self._methods[channel, method]


os.register_at_fork(after_in_child=Wire.note_fork)


@final
class Pauses:
    """Pauses between tries of one thing, until patience is over."""

    def __init__(self, retry: Retry, patience_s: float):
        self._retry = retry
        self._patience_s = patience_s
        self._failures = 0
        self._end_s = 0.0

    def reset(self) -> None:
        """Note progress: patience, and the pauses, start anew."""
        self._failures = 0

    async def after(self, error: HvpError) -> None:
        """Pause after a failure, as long as the server asks for or longer each time.

        Raises:
            HvpError: `error`, when the pause would outlast patience.
        """
        now_s = asyncio.get_running_loop().time()
        if self._failures == 0:
            self._end_s = now_s + self._patience_s
        self._failures += 1
        # Jitter keeps many clients of one restarted server from coming back in step.
        pause_s = self._retry.backoff_s(self._failures) * random.uniform(0.5, 1.0)
        pause_s = max(pause_s, error.retry_after_s or 0.0)
        if now_s + pause_s > self._end_s:
            raise error
        await asyncio.sleep(pause_s)
