"""Python SDK and command line of the `hvp` service.

    from hvp_client import Client

    with Client("127.0.0.1:8471") as client:
        checkpoint = client.upload_checkpoint("model")
        batch = client.upload_batch({"input_ids": ids})
        H = client.operator(checkpoint, batch)
        result = H.density(num_probes=4).result()

`Client` blocks; `AsyncClient` offers the same names to be awaited.
"""

# ruff: noqa: F403, F405  the names are those of _surface, and a test compares the two lists

from typing import TYPE_CHECKING, Any

from hvp_client import _records

if TYPE_CHECKING:
    from hvp_client._surface import *

__all__ = [
    "AbortedError",
    "AlreadyExistsError",
    "ApiKey",
    "AsyncClient",
    "AsyncJacobian",
    "AsyncJob",
    "AsyncOperator",
    "AsyncVector",
    "Batch",
    "Blob",
    "CallCancelledError",
    "Caller",
    "Checkpoint",
    "Client",
    "DataLossError",
    "DeadlineExceededError",
    "Event",
    "FailedPreconditionError",
    "HvpError",
    "InternalError",
    "InvalidArgumentError",
    "Jacobian",
    "Job",
    "JobCancelledError",
    "JobFailedError",
    "JobStatus",
    "LossAlong",
    "NotFoundError",
    "Operator",
    "OutOfRangeError",
    "OverData",
    "ParameterTensor",
    "PermissionDeniedError",
    "Plan",
    "Progress",
    "Rank",
    "ResourceExhaustedError",
    "Retry",
    "ServerInfo",
    "ServerUnreachableError",
    "Timeout",
    "Tls",
    "UnauthenticatedError",
    "UnavailableError",
    "UnimplementedError",
    "UnknownError",
    "Vector",
    "Verification",
    "WorkerGroup",
]
__all__ += _records.__all__
__all__.sort()


def __getattr__(name: str) -> Any:
    # numpy and gRPC take half a second to import, which `hvp --help` need not spend.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from hvp_client import _surface

    return getattr(_surface, name)


def __dir__() -> list[str]:
    return __all__
