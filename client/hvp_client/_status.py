"""From a gRPC status with its details to an exception of this package."""

from __future__ import annotations

from typing import cast

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from hvp_client._exceptions import BY_STATUS, HvpError, ServerUnreachableError


def error_from_rpc(error: grpc.aio.AioRpcError, *, address: str, request_id: str = "") -> HvpError:
    """Make an exception of a failed call.

    Args:
        error: The call's failure; its trailing metadata may hold google.rpc details.
        address: Address of the server that was called.
        request_id: The call's own id, for an answer that does not name one.

    Returns:
        The status's class with reason, field, metadata and retry delay from the details. A server
        always sends a reason with UNAVAILABLE, so that status without one means that none answered.
    """
    code = error.code().name
    message = error.details() or ""
    reason, field, retry_after_s = "", "", None
    metadata: dict[str, str] = {}
    for detail in _details(error):
        if isinstance(detail, error_details_pb2.ErrorInfo):
            reason = detail.reason
            metadata = dict(detail.metadata)
        elif isinstance(detail, error_details_pb2.BadRequest) and detail.field_violations:
            field = detail.field_violations[0].field
        elif isinstance(detail, error_details_pb2.RetryInfo):
            delay = detail.retry_delay
            retry_after_s = delay.seconds + delay.nanos * 1e-9
        elif isinstance(detail, error_details_pb2.RequestInfo):
            request_id = detail.request_id
    if code == "UNAVAILABLE" and not reason:
        return ServerUnreachableError(
            f"no server answers at {address}; start one with `hvp serve`, correct the address, or, "
            "where a server listens there, see that both sides have certificates that the other "
            f"believes, or neither has any ({message})",
            reason="SERVER_UNREACHABLE",
            metadata={"address": address},
            request_id=request_id,
        )
    if code == "INTERNAL" and not reason and message.startswith("Internal error from Core"):
        # A write that fails as the call ends replaces whatever status had come (grpc issue 36066).
        reason = "STATUS_LOST"
        message = f"the connection broke, and with it went the reason; try again ({message})"
    return BY_STATUS.get(code, HvpError)(
        message or f"the server answered {code}",
        code=code,
        reason=reason,
        field=field,
        metadata=metadata,
        request_id=request_id,
        retry_after_s=retry_after_s,
    )


_DETAIL_KINDS = (
    error_details_pb2.ErrorInfo,
    error_details_pb2.BadRequest,
    error_details_pb2.RetryInfo,
    error_details_pb2.RequestInfo,
)


def _details(error: grpc.aio.AioRpcError) -> list[object]:
    """The details that are of a known kind; none when they cannot be read."""
    try:
        # The error has the methods of a call that this asks for.
        status = rpc_status.from_call(cast("grpc.Call", error))
    except (ValueError, DecodeError):
        # The library refuses details that contradict the status they came with.
        return []
    details: list[object] = []
    for packed in status.details if status is not None else ():
        for kind in _DETAIL_KINDS:
            if packed.Is(kind.DESCRIPTOR):
                details.append(kind.FromString(packed.value))
    return details
