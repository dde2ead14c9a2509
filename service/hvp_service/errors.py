"""What goes wrong, as a reason with one status code each; nothing here knows of gRPC."""

from __future__ import annotations

from collections.abc import Mapping

from google.rpc import code_pb2 as code

DOMAIN = "hvp.dev"

# Every reason that leaves this server, and its google.rpc.Code.
CODES: dict[str, int] = {
    "ARCHITECTURE_UNKNOWN": code.INVALID_ARGUMENT,
    "ATTEMPTS_EXHAUSTED": code.UNAVAILABLE,
    "BATCH_EMPTY": code.INVALID_ARGUMENT,
    "BATCH_FIELD_INVALID": code.INVALID_ARGUMENT,
    "BLOB_DIGEST_MISMATCH": code.FAILED_PRECONDITION,
    "CHECKPOINT_FILES_INVALID": code.INVALID_ARGUMENT,
    "CHUNK_CHECKSUM_MISMATCH": code.ABORTED,
    "CHUNK_TOO_LARGE": code.INVALID_ARGUMENT,
    "CONFIG_INVALID": code.INVALID_ARGUMENT,
    "DIGEST_MALFORMED": code.INVALID_ARGUMENT,
    "DISK_FULL": code.RESOURCE_EXHAUSTED,
    "DISTRIBUTION_UNSPECIFIED": code.INVALID_ARGUMENT,
    "DOUBLE_BACKWARD_UNSUPPORTED": code.FAILED_PRECONDITION,
    "DTYPE_UNSUPPORTED": code.INVALID_ARGUMENT,
    "INPUT_MISSING": code.FAILED_PRECONDITION,
    "INSUFFICIENT_CLUSTER_MEMORY": code.FAILED_PRECONDITION,
    "INTERNAL": code.INTERNAL,
    "JOB_NOT_ENDED": code.FAILED_PRECONDITION,
    "JOB_UNREADABLE": code.FAILED_PRECONDITION,
    "CHECKPOINT_UNREADABLE": code.FAILED_PRECONDITION,
    "KIND_UNSPECIFIED": code.INVALID_ARGUMENT,
    "KIND_UNSUPPORTED": code.UNIMPLEMENTED,
    "K_INVALID": code.INVALID_ARGUMENT,
    "LABELS_INVALID": code.INVALID_ARGUMENT,
    "MAX_PRODUCTS_INVALID": code.INVALID_ARGUMENT,
    "METHOD_NOT_SERVED": code.UNIMPLEMENTED,
    "MICRO_BATCH_INVALID": code.INVALID_ARGUMENT,
    "MODEL_UNSUPPORTED": code.FAILED_PRECONDITION,
    "NON_FINITE": code.OUT_OF_RANGE,
    "NO_TARGETS": code.INVALID_ARGUMENT,
    "NUM_LANCZOS_VECTORS_INVALID": code.INVALID_ARGUMENT,
    "OUT_OF_MEMORY": code.RESOURCE_EXHAUSTED,
    "PAGE_SIZE_INVALID": code.INVALID_ARGUMENT,
    "PAGE_TOKEN_INVALID": code.INVALID_ARGUMENT,
    "PARENT_INVALID": code.INVALID_ARGUMENT,
    "PICKLE_REFUSED": code.INVALID_ARGUMENT,
    "PRECISION_UNSUPPORTED": code.INVALID_ARGUMENT,
    "QUANTIZATION_UNSUPPORTED": code.INVALID_ARGUMENT,
    "QUEUE_FULL": code.RESOURCE_EXHAUSTED,
    "READ_RANGE_INVALID": code.OUT_OF_RANGE,
    "REMOTE_CODE_REFUSED": code.INVALID_ARGUMENT,
    "REQUEST_ID_INVALID": code.INVALID_ARGUMENT,
    "REQUEST_ID_REUSED": code.ALREADY_EXISTS,
    "RESOURCE_IN_USE": code.FAILED_PRECONDITION,
    "RESOURCE_NOT_FOUND": code.NOT_FOUND,
    "SAFETENSORS_INVALID": code.INVALID_ARGUMENT,
    "SEQUENCE_TOO_LONG": code.INVALID_ARGUMENT,
    "SERVER_DRAINING": code.UNAVAILABLE,
    "SESSION_EXPIRED": code.FAILED_PRECONDITION,
    "SHAPE_MISMATCH": code.INVALID_ARGUMENT,
    "SIZE_EXCEEDED": code.INVALID_ARGUMENT,
    "SIZE_INVALID": code.INVALID_ARGUMENT,
    "SOURCE_MISSING": code.INVALID_ARGUMENT,
    "SPEC_MISSING": code.INVALID_ARGUMENT,
    "STATE_DIR_BUSY": code.UNAVAILABLE,
    "TASK_UNSUPPORTED": code.INVALID_ARGUMENT,
    "TENSOR_MISSING": code.INVALID_ARGUMENT,
    "TENSOR_SHAPE_MISMATCH": code.INVALID_ARGUMENT,
    "TIMEOUT_INVALID": code.INVALID_ARGUMENT,
    "TOKEN_ID_OUT_OF_RANGE": code.INVALID_ARGUMENT,
    "TOL_INVALID": code.INVALID_ARGUMENT,
    "TOO_MANY_CALLS": code.RESOURCE_EXHAUSTED,
    "TTL_INVALID": code.INVALID_ARGUMENT,
    "UPLOAD_SUPERSEDED": code.ABORTED,
    "VECTORS_MISSING": code.INVALID_ARGUMENT,
    "VECTOR_MEMORY": code.RESOURCE_EXHAUSTED,
    "VECTOR_SPACE_MISMATCH": code.INVALID_ARGUMENT,
    "WHICH_UNSUPPORTED": code.INVALID_ARGUMENT,
    "WORKER_GROUP_LOST": code.UNAVAILABLE,
    "WORKER_GROUP_START_FAILED": code.UNAVAILABLE,
    "WRITE_OFFSET_GAP": code.OUT_OF_RANGE,
}

# A number that is not finite is the caller's mistake where it stands in a field of the request,
# and the model's everywhere else.
FIELD_CODES: dict[str, int] = {"NON_FINITE": code.INVALID_ARGUMENT}


def code_of(reason: str, *, names_field: bool = False) -> int:
    """The google.rpc.Code of a reason; INTERNAL for one that nobody has entered in the table."""
    if names_field and reason in FIELD_CODES:
        return FIELD_CODES[reason]
    return CODES.get(reason, CODES["INTERNAL"])


def is_fault(reason: str) -> bool:
    """Whether a reason says only that this side is at fault, which the log explains."""
    return code_of(reason) == CODES["INTERNAL"]


def fault_message(where: str) -> str:
    """What a caller hears of a fault.

    Args:
        where: Name under which the log has the details.
    """
    return f"A fault of the server; its log has the details under {where}."


class ServiceError(Exception):
    """A refusal that the caller sees as it stands.

    Attributes:
        reason: Key of `CODES`.
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
        """google.rpc.Code."""
        return code_of(self.reason, names_field=bool(self.field))

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}"


def not_found(resource: str, kind: str, why: str = "") -> ServiceError:
    """A resource that does not exist.

    Args:
        resource: Its name as the caller gave it.
        kind: What it would have been, for example `vector`.
        why: What may have become of it and what to do, in sentences.
    """
    return ServiceError(
        "RESOURCE_NOT_FOUND",
        f"There is no {kind} named {resource!r}. {why}".rstrip(),
        resource=resource,
    )


def session_expired(session: str) -> ServiceError:
    """A session that has ended, or never was.

    Args:
        session: Its name.
    """
    return ServiceError(
        "SESSION_EXPIRED",
        f"{session} has ended, or nothing was heard of its client for its time to live, and its "
        "vectors are deleted; open another session and make them again.",
        resource=session,
    )


def not_served(method: str, instead: str) -> ServiceError:
    """A method of the protos that this version does not serve.

    Args:
        method: Its name.
        instead: Why, or what to do.
    """
    return ServiceError("METHOD_NOT_SERVED", f"{method} is not served yet: {instead}.")
