"""Python SDK and command line of the `hvp` service.

    from hvp_client import Client

    with Client("127.0.0.1:8471") as client:
        checkpoint = client.upload_checkpoint("model")
        batch = client.upload_batch({"input_ids": ids})
        H = client.operator(checkpoint, batch)
        result = H.eigsh(k=4, which="BE").result()

`Client` blocks; `AsyncClient` offers the same names to be awaited.
"""

from hvp_client._async_client import AsyncClient
from hvp_client._batches import Batch
from hvp_client._checkpoints import Checkpoint, ParameterTensor
from hvp_client._client import Client
from hvp_client._exceptions import (
    AbortedError,
    AlreadyExistsError,
    CallCancelledError,
    DataLossError,
    DeadlineExceededError,
    FailedPreconditionError,
    HvpError,
    InternalError,
    InvalidArgumentError,
    JobCancelledError,
    JobFailedError,
    NotFoundError,
    OutOfRangeError,
    PermissionDeniedError,
    ResourceExhaustedError,
    ServerUnreachableError,
    UnauthenticatedError,
    UnavailableError,
    UnimplementedError,
    UnknownError,
)
from hvp_client._handles import Job, Operator, Vector
from hvp_client._jobs import AsyncJob
from hvp_client._operators import AsyncOperator
from hvp_client._results import EigshResult, Event, Progress
from hvp_client._settings import Retry, Timeout
from hvp_client._system import Rank, ServerInfo, WorkerGroup
from hvp_client._vectors import AsyncVector

__all__ = [
    "AbortedError",
    "AlreadyExistsError",
    "AsyncClient",
    "AsyncJob",
    "AsyncOperator",
    "AsyncVector",
    "Batch",
    "CallCancelledError",
    "Checkpoint",
    "Client",
    "DataLossError",
    "DeadlineExceededError",
    "EigshResult",
    "Event",
    "FailedPreconditionError",
    "HvpError",
    "InternalError",
    "InvalidArgumentError",
    "Job",
    "JobCancelledError",
    "JobFailedError",
    "NotFoundError",
    "Operator",
    "OutOfRangeError",
    "ParameterTensor",
    "PermissionDeniedError",
    "Progress",
    "Rank",
    "ResourceExhaustedError",
    "Retry",
    "ServerInfo",
    "ServerUnreachableError",
    "Timeout",
    "UnauthenticatedError",
    "UnavailableError",
    "UnimplementedError",
    "UnknownError",
    "Vector",
    "WorkerGroup",
]
