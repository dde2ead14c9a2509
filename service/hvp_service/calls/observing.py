"""Counts every call and writes one line of it to the log, at its end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import AsyncIterator, Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import structlog

from hvp_service.calls.around import SERVED_PREFIX, AroundInterceptor, shape_of
from hvp_service.calls.limits import pool_of
from hvp_service.calls.names import IDENTIFIER, PROJECT
from hvp_service.calls.record import begin_call
from hvp_service.metrics.instruments import CallMeter

if TYPE_CHECKING:
    from hvp_service.calls.around import Continuation, Handler

_NAMES = {code.value[0]: code.name for code in grpc.StatusCode}
# What an operator of the server has to look into, and what shows that it has too much to do.
_ERRORS = frozenset({"INTERNAL", "UNKNOWN", "DATA_LOSS"})
_WARNINGS = frozenset({"UNAVAILABLE", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"})
_JOB = re.compile(f"projects/{PROJECT.pattern}/jobs/{IDENTIFIER.pattern}")

log = structlog.get_logger()


class ObservingInterceptor(AroundInterceptor):
    """The outermost of all: what it counts is what callers see.

    Args:
        generation: Gives the present generation of the ranks, for the lines of the log.
    """

    prefixes = ("/",)

    def __init__(self, generation: Callable[[], str]):
        self._generation = generation

    async def intercept_service(
        self, continuation: Continuation, details: grpc.HandlerCallDetails
    ) -> Handler:
        """Wrap the method's handler; called by gRPC."""
        handler = await super().intercept_service(continuation, details)
        return handler and _weighed(handler, details.method)

    def around_request(
        self, method: str, request: Any, context: grpc.aio.ServicerContext[Any, Any]
    ) -> contextlib.AbstractAsyncContextManager[None]:
        """See AroundInterceptor: it looks at the request for the names in it."""
        return self._observed(method, _resources(request), context)

    def around(
        self, method: str, context: grpc.aio.ServicerContext[Any, Any]
    ) -> contextlib.AbstractAsyncContextManager[None]:
        """See AroundInterceptor."""
        return self._observed(method, {}, context)

    @contextlib.asynccontextmanager
    async def _observed(
        self, method: str, resources: dict[str, str], context: Any
    ) -> AsyncIterator[None]:
        names = {"method": method.removeprefix(SERVED_PREFIX), "generation": self._generation()}
        call = begin_call(names | resources)
        meter = _meter(method)
        meter.started.inc()
        meter.in_flight.inc()
        started, code = time.perf_counter(), "OK"
        try:
            yield
        except BaseException as error:
            code = _code_of(error, context)
            raise
        finally:
            seconds = time.perf_counter() - started
            meter.in_flight.dec()
            meter.handled(code).inc()
            meter.seconds.observe(seconds)
            log.log(
                _level(method, code),
                "call",
                code=code,
                duration_s=round(seconds, 6),
                **call.refusal,
            )


def _level(method: str, code: str) -> int:
    """The level of a call's line."""
    if code in _ERRORS:
        return logging.ERROR
    if code in _WARNINGS:
        return logging.WARNING
    # Probes ask for the health every few seconds.
    return logging.INFO if method.startswith(SERVED_PREFIX) else logging.DEBUG


def _code_of(error: BaseException, context: Any) -> str:
    """Name of the status code with which a call ends that raises."""
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        left_s = context.time_remaining()
        return "DEADLINE_EXCEEDED" if left_s is not None and left_s <= 0 else "CANCELLED"
    code = context.code() if isinstance(error, grpc.aio.AbortError) else None
    return _NAMES.get(getattr(code, "value", (code,))[0], "UNKNOWN")


def _resources(request: Any) -> dict[str, str]:
    """The project, and the job if there is one, that a request names; nothing that is no name."""
    name = getattr(request, "name", "") or getattr(request, "parent", "")
    if not name and hasattr(request, "operator"):
        name = request.operator.checkpoint
    if not isinstance(name, str) or not name.startswith("projects/"):
        return {}
    project = name.split("/", 2)[1]
    if not PROJECT.fullmatch(project):
        return {}
    found = {"project": project}
    if _JOB.fullmatch(name):
        found["job"] = name
    return found


@cache  # of the methods that are served, of which there are a few dozen
def _meter(method: str) -> CallMeter:
    return CallMeter(method, pool_of(method))


def _weighed(handler: Any, method: str) -> Handler:
    """A handler that counts the bytes of its messages."""
    make, behaviour = shape_of(handler)
    received, sent = _meter(method).received_bytes, _meter(method).sent_bytes
    read, write = handler.request_deserializer, handler.response_serializer

    def deserialize(data: bytes) -> Any:
        received.inc(len(data))
        return data if read is None else read(data)

    def serialize(message: Any) -> bytes:
        data = message if write is None else write(message)
        sent.inc(len(data))
        return data  # type: ignore[no-any-return]

    return make(behaviour, request_deserializer=deserialize, response_serializer=serialize)
