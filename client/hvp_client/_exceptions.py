"""The one tree of errors that this package raises.

HvpError
├── CallCancelledError         CANCELLED
├── UnknownError               UNKNOWN
├── InvalidArgumentError       INVALID_ARGUMENT        also a ValueError
├── DeadlineExceededError      DEADLINE_EXCEEDED       also a TimeoutError
├── NotFoundError              NOT_FOUND
├── AlreadyExistsError         ALREADY_EXISTS
├── PermissionDeniedError      PERMISSION_DENIED
├── ResourceExhaustedError     RESOURCE_EXHAUSTED
├── FailedPreconditionError    FAILED_PRECONDITION
├── AbortedError               ABORTED
├── OutOfRangeError            OUT_OF_RANGE
├── UnimplementedError         UNIMPLEMENTED
├── InternalError              INTERNAL
├── UnavailableError           UNAVAILABLE
│   └── ServerUnreachableError no server answers       also a ConnectionError
├── DataLossError              DATA_LOSS
├── UnauthenticatedError       UNAUTHENTICATED
├── JobFailedError             the job's own code
└── JobCancelledError          CANCELLED
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class HvpError(Exception):
    """A refusal or failure, said by the server or found before a call was made; can be pickled.

    Attributes:
        code: Name of the gRPC status, for example `INVALID_ARGUMENT`.
        reason: UPPER_SNAKE code to branch on, for example `SHAPE_MISMATCH`.
        message: What happened and what to do about it.
        field: The argument at fault, "" when there is none.
        metadata: Figures and names that belong to the reason.
        request_id: Names this call in the server's log, "" when it never got there.
        retry_after_s: Seconds that the server asks to wait before another try; None where it does
            not ask.
    """

    code: str = "UNKNOWN"

    def __init__(
        self,
        message: str,
        *,
        reason: str = "",
        code: str | None = None,
        field: str = "",
        metadata: Mapping[str, str] | None = None,
        request_id: str = "",
        retry_after_s: float | None = None,
    ):
        super().__init__(message)
        self.code = code or type(self).code
        self.reason = reason or self.code
        self.message = message
        self.field = field
        self.metadata = dict(metadata or {})
        self.request_id = request_id
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}"

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions rebuild themselves from positional arguments; ours are keywords.
        return _rebuild, (type(self), self.message, self.__getstate__())

    def __getstate__(self) -> dict[str, Any]:
        names = ("reason", "code", "field", "metadata", "request_id", "retry_after_s")
        return {name: getattr(self, name) for name in names}


def _rebuild(kind: type[HvpError], message: str, state: dict[str, Any]) -> HvpError:
    return kind(message, **state)


class CallCancelledError(HvpError):
    """The call was cancelled before it was answered."""

    code = "CANCELLED"


class UnknownError(HvpError):
    """The server's answer does not say what went wrong."""

    code = "UNKNOWN"


class InvalidArgumentError(HvpError, ValueError):
    """An argument can never be right; `field` names it."""

    code = "INVALID_ARGUMENT"


class DeadlineExceededError(HvpError, TimeoutError):
    """The time allowed was over; what was asked for may still happen."""

    code = "DEADLINE_EXCEEDED"


class NotFoundError(HvpError):
    """Nothing has this name."""

    code = "NOT_FOUND"


class AlreadyExistsError(HvpError):
    """A request id was used again for something else."""

    code = "ALREADY_EXISTS"


class PermissionDeniedError(HvpError):
    """The caller may not do this."""

    code = "PERMISSION_DENIED"


class ResourceExhaustedError(HvpError):
    """Memory, disk, queue or quota is full."""

    code = "RESOURCE_EXHAUSTED"


class FailedPreconditionError(HvpError):
    """Something else has to be done first; the message says what."""

    code = "FAILED_PRECONDITION"


class AbortedError(HvpError):
    """Another call, or damage on the way, ended this one."""

    code = "ABORTED"


class OutOfRangeError(HvpError):
    """A range leaves its object, or a result is not finite."""

    code = "OUT_OF_RANGE"


class UnimplementedError(HvpError):
    """The server does not serve this yet."""

    code = "UNIMPLEMENTED"


class InternalError(HvpError):
    """A bug in the server: report `request_id`."""

    code = "INTERNAL"


class UnavailableError(HvpError):
    """The server or its workers cannot answer now; a later try may succeed."""

    code = "UNAVAILABLE"


class ServerUnreachableError(UnavailableError, ConnectionError):
    """No server answers at the address."""


class DataLossError(HvpError):
    """Stored bytes are damaged."""

    code = "DATA_LOSS"


class UnauthenticatedError(HvpError):
    """Credentials are missing or no longer valid."""

    code = "UNAUTHENTICATED"


class JobFailedError(HvpError):
    """A job ended in state FAILED; code, reason and metadata are what its run met."""


class JobCancelledError(HvpError):
    """A job ended in state CANCELLED, so it has no result."""

    code = "CANCELLED"


# One row for every status that is an error.
BY_STATUS: Mapping[str, type[HvpError]] = {
    kind.code: kind
    for kind in (
        CallCancelledError,
        UnknownError,
        InvalidArgumentError,
        DeadlineExceededError,
        NotFoundError,
        AlreadyExistsError,
        PermissionDeniedError,
        ResourceExhaustedError,
        FailedPreconditionError,
        AbortedError,
        OutOfRangeError,
        UnimplementedError,
        InternalError,
        UnavailableError,
        DataLossError,
        UnauthenticatedError,
    )
}
