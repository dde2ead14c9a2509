"""Errors as google.rpc.Status with details; the innermost of what callers see."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import Any

import grpc.aio
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status
from hvp_workers.backend import BackendError

from hvp_service.calls.around import LIBRARY_STREAMS, SERVED_PREFIX, AroundInterceptor
from hvp_service.calls.errors import DOMAIN, ServiceError, code_of, fault_message, is_fault
from hvp_service.calls.record import current_call
from hvp_service.metrics import instruments

# Status travels in HTTP/2 headers, of which gRPC takes 8 KiB unless told otherwise.
_MAX_MESSAGE = 1000
_MAX_VALUE = 300
_MAX_ENTRIES = 8


class ErrorInterceptor(AroundInterceptor):
    """Turns what handlers raise into statuses; what nobody foresaw is INTERNAL.

    What its caller is not told stands in the record of the call, and so in its line of the log.
    """

    prefixes = (SERVED_PREFIX, *LIBRARY_STREAMS)

    @contextlib.asynccontextmanager
    async def around(
        self, method: str, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[None]:
        """See the class."""
        call = current_call()
        try:
            yield
        except ServiceError as error:
            call.refusal |= {"reason": error.reason, "message": error.message}
            instruments.refused(error.reason)
            await _abort(context, service_status(error, call.request_id))
        except BackendError as error:
            call.refusal |= {"reason": error.reason, "message": error.message}
            instruments.refused(error.reason)
            status = backend_status(error, call.request_id)
            if is_fault(error.reason):
                call.refusal |= {"exception": error.trace or str(error)}
                status = internal_status(call.request_id)
            await _abort(context, status)
        except (grpc.aio.AbortError, asyncio.CancelledError, GeneratorExit):
            raise
        except Exception as error:
            call.refusal |= {"reason": "INTERNAL", "exc_info": error}
            instruments.refused("INTERNAL")
            await _abort(context, internal_status(call.request_id))


def service_status(error: ServiceError, call_id: str) -> status_pb2.Status:
    """The status of a refusal by the service."""
    details: list[Message] = []
    if error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=error.field, description=error.message[:_MAX_MESSAGE], reason=error.reason
        )
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.reason == "INPUT_MISSING":
        missing = error_details_pb2.PreconditionFailure.Violation(
            type="MISSING", subject=error.resource, description=error.message[:_MAX_MESSAGE]
        )
        details.append(error_details_pb2.PreconditionFailure(violations=[missing]))
    elif error.resource:
        details.append(
            error_details_pb2.ResourceInfo(
                resource_name=error.resource, description=error.message[:_MAX_MESSAGE]
            )
        )
    if error.retry_after_s is not None:
        delay = Duration()
        delay.FromMilliseconds(int(error.retry_after_s * 1000))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    return _status(error.code, error.reason, error.message, error.metadata, call_id, details)


def backend_status(error: BackendError, call_id: str) -> status_pb2.Status:
    """The status of a refusal by the workers."""
    return _status(code_of(error.reason), error.reason, error.message, error.metadata, call_id, [])


def internal_status(call_id: str) -> status_pb2.Status:
    """The status of a fault of this server, of which only the log has the details."""
    return _status(code_of("INTERNAL"), "INTERNAL", fault_message(call_id), {}, call_id, [])


def _status(
    code: int,
    reason: str,
    message: str,
    metadata: Mapping[str, str],
    call_id: str,
    details: list[Message],
) -> status_pb2.Status:
    info = error_details_pb2.ErrorInfo(
        reason=reason,
        domain=DOMAIN,
        metadata={
            key[:_MAX_VALUE]: value[:_MAX_VALUE]
            for key, value in list(metadata.items())[:_MAX_ENTRIES]
        },
    )
    request = error_details_pb2.RequestInfo(request_id=call_id)
    status = status_pb2.Status(code=code, message=message[:_MAX_MESSAGE])
    for detail in (info, *details, request):
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)
    return status


async def _abort(context: grpc.aio.ServicerContext[Any, Any], status: status_pb2.Status) -> None:
    # The abstract context lacks the method that the concrete one has.
    await context.abort_with_status(rpc_status.to_status(status))  # type: ignore[attr-defined]
