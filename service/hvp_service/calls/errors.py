"""Refusals: each has a reason, and each reason a status code; nothing here knows of gRPC."""

from __future__ import annotations

from collections.abc import Mapping

from google.rpc import code_pb2 as code
from hvp_operations.checking import reasons
from hvp_operations.registry import operations
from hvp_operations.wording import NAME, shown
from hvp_protos.v1 import errors_pb2

DOMAIN = "hvp.dev"


def _codes() -> dict[str, int]:
    """Every reason that leaves this server, and its google.rpc.Code."""
    own = {
        value.name.removeprefix("ERROR_REASON_"): code.Code.Value(
            value.GetOptions().Extensions[errors_pb2.status]
        )
        for value in errors_pb2.ErrorReason.DESCRIPTOR.values
        if value.number
    }
    specs = {reason for each in operations().values() for reason in reasons(each)}
    return own | dict.fromkeys(sorted(specs), code.INVALID_ARGUMENT)


CODES = _codes()

# A number that is not finite is the caller's mistake where it stands in a field of the request,
# and the model's everywhere else.
FIELD_CODES: dict[str, int] = {"NON_FINITE": code.INVALID_ARGUMENT}


def code_of(reason: str, *, names_field: bool = False) -> int:
    """The google.rpc.Code of a reason; INTERNAL for one that nobody has entered in the table."""
    if names_field and reason in FIELD_CODES:
        return FIELD_CODES[reason]
    return CODES.get(reason, CODES["INTERNAL"])


def is_fault(reason: str) -> bool:
    """Whether a reason says only that the server is at fault; its log then has the details."""
    return code_of(reason) == CODES["INTERNAL"]


def fault_message(where: str) -> str:
    """The message of a fault for the caller.

    Args:
        where: Name under which the log has the details.
    """
    return f"A fault of the server; its log has the details under {where}."


class ServiceError(Exception):
    """A refusal that the caller sees as it stands.

    Attributes:
        reason: UPPER_SNAKE code, a key of `CODES`.
        message: What happened and what to do about it.
        field: Path of the request's field at fault, or "".
        metadata: Figures and names that a program may want.
        resource: Name of the resource that is not there or in the way, or "".
        retry_after_s: Delay after which the same call may succeed, or None.
    """

    def __init__(
        self,
        reason: str,
        message: str,
        *,
        field: str = "",
        metadata: Mapping[str, str] | None = None,
        resource: str = "",
        retry_after_s: float | None = None,
    ):
        if reason not in CODES:
            raise ValueError(f"{reason} is not in the table of reasons")
        super().__init__(reason, message)
        self.reason = reason
        self.message = message
        self.field = field
        self.metadata = dict(metadata or {})
        self.resource = resource
        self.retry_after_s = retry_after_s

    @property
    def code(self) -> int:
        """The google.rpc.Code of the reason."""
        return code_of(self.reason, names_field=bool(self.field))

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}"


def not_found(resource: str, kind: str, why: str = "") -> ServiceError:
    """Make the refusal for a resource that does not exist.

    Args:
        resource: Name of the resource as the caller gave it.
        kind: Kind of the resource, for example `vector`.
        why: Sentences on what may have become of it and what to do.
    """
    return ServiceError(
        "RESOURCE_NOT_FOUND",
        f"There is no {kind} named {shown(resource, NAME)}. {why}".rstrip(),
        resource=resource,
    )


def session_expired(session: str) -> ServiceError:
    """Make the refusal for a session that has ended, or never was.

    Args:
        session: Name of the session.
    """
    return ServiceError(
        "SESSION_EXPIRED",
        f"{session} has ended, or nothing was heard of its client for its time to live, and its "
        "vectors are deleted; open another session and make them again.",
        resource=session,
    )
