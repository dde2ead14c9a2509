"""Records of what a job met and found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Generic, Literal, TypeVar

import numpy as np
from hvp_protos.v1 import job_pb2
from numpy.typing import NDArray

from hvp_client._enums import plain_name
from hvp_client._exceptions import (
    BY_STATUS,
    HvpError,
    InvalidArgumentError,
    UnknownError,
)
from hvp_client._times import from_timestamp

VectorT = TypeVar("VectorT")

ENDED_STATES = frozenset({"SUCCEEDED", "FAILED", "CANCELLED"})


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands.

    Attributes:
        stage: `loading`, `iterating`, `verifying` or `saving`.
        num_products: Operator products done in this attempt.
        max_products: Their upper bound.
        num_restarts: Times the Krylov basis was compressed.
        ritz_values: At the wanted end or ends, ascending.
        residual_estimates: One for each Ritz value.
        seconds_per_product: Median so far.
    """

    stage: str
    num_products: int
    max_products: int
    num_restarts: int
    ritz_values: tuple[float, ...]
    residual_estimates: tuple[float, ...]
    seconds_per_product: float


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened to a job.

    Attributes:
        type: `state` or `progress`.
        sequence: Place in the job's history, dense from 1; `watch(after_sequence=...)` goes on
            from here.
        time: When, UTC.
        state: What the job went into, on a `state` event.
        cancelling: On a `state` event RUNNING: whether this is a running job's being asked to stop.
        attempt: Which run, on a `state` event; 0 otherwise.
        error: Why it failed, on the `state` event FAILED.
        progress: On a `progress` event.
    """

    type: Literal["state", "progress"]
    sequence: int
    time: datetime
    state: str = ""
    cancelling: bool = False
    attempt: int = 0
    error: HvpError | None = None
    progress: Progress | None = None

    @property
    def num_products(self) -> int:
        """The progress's; 0 on a `state` event."""
        return self.progress.num_products if self.progress else 0

    @property
    def ritz_values(self) -> tuple[float, ...]:
        """The progress's; empty on a `state` event."""
        return self.progress.ritz_values if self.progress else ()

    @property
    def residual_estimates(self) -> tuple[float, ...]:
        """The progress's; empty on a `state` event."""
        return self.progress.residual_estimates if self.progress else ()


@dataclass(frozen=True, kw_only=True, eq=False)
class EigshResult(Generic[VectorT]):
    """k eigenpairs A y = λ y of an operator.

    Attributes:
        eigenvalues: (k,) float64, ascending.
        residuals: (k,) float64, the norms ‖A y − λ y‖, each from a fresh product.
        eigenvectors: k orthonormal vectors on the server, in the order of `eigenvalues`. They are
            the job's and stay when their handles go.
        num_products: Operator products spent, those of the residuals included.
        outcome: `CONVERGED`, or `MAX_PRODUCTS` when the budget ran out: the pairs are then the
            best so far and `residuals` say how good.
        symmetry_defect: |u·Av − v·Au| / (‖Au‖ ‖v‖) over the run's own vectors; rounding shows
            here first.
        ritz_values: (m,) float64, of the last basis.
        ritz_weights: (m,) float64, squared first components of T's eigenvectors: with
            `ritz_values` the picture of the spectral density.
        loss: L(θ), nats.
        provenance: What the figures rest on: versions, digests, dtype, seed.
    """

    eigenvalues: NDArray[np.float64]
    residuals: NDArray[np.float64]
    eigenvectors: list[VectorT]
    num_products: int
    outcome: str
    symmetry_defect: float
    ritz_values: NDArray[np.float64]
    ritz_weights: NDArray[np.float64]
    loss: float
    provenance: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """Make plain numbers, strings, lists and dicts of it; eigenvectors by name."""
        return {
            "eigenvalues": self.eigenvalues.tolist(),
            "residuals": self.residuals.tolist(),
            "eigenvectors": [getattr(vector, "name", "") for vector in self.eigenvectors],
            "num_products": self.num_products,
            "outcome": self.outcome,
            "symmetry_defect": self.symmetry_defect,
            "ritz_values": self.ritz_values.tolist(),
            "ritz_weights": self.ritz_weights.tolist(),
            "loss": self.loss,
            "provenance": dict(self.provenance),
        }


def state_name(state: job_pb2.Job.State.ValueType) -> str:
    """Plain name of a state, as in `RUNNING`, which a job asked to stop still is."""
    if state == job_pb2.Job.STATE_CANCELLING:
        return "RUNNING"
    return plain_name(job_pb2.Job.State, state, "STATE_")


def state_values(name: str) -> list[job_pb2.Job.State.ValueType]:
    """What a state of this name is on the wire, the inverse of `state_name`.

    Args:
        name: In upper or lower case.

    Returns:
        One value, or for RUNNING two.

    Raises:
        InvalidArgumentError: `STATE_UNKNOWN`.
    """
    values = [
        value
        for value in job_pb2.Job.State.values()
        if value != job_pb2.Job.STATE_UNSPECIFIED and state_name(value) == name.upper()
    ]
    if not values:
        raise InvalidArgumentError(
            f"no job state {name!r}; there are QUEUED, RUNNING, SUCCEEDED, FAILED and CANCELLED",
            reason="STATE_UNKNOWN",
            field="states",
        )
    return values


def progress_from_proto(message: job_pb2.JobProgress) -> Progress:
    """Make the record of a message."""
    return Progress(
        stage=message.stage,
        num_products=message.num_products,
        max_products=message.max_products,
        num_restarts=message.num_restarts,
        ritz_values=tuple(message.ritz_values),
        residual_estimates=tuple(message.residual_estimates),
        seconds_per_product=message.seconds_per_product,
    )


def error_from_proto(
    message: job_pb2.JobError, kind: type[HvpError] | None = None, job: str = ""
) -> HvpError:
    """Make an exception of why a job failed.

    Args:
        message: The job's error.
        kind: Class to make; default that of the status.
        job: Name of the job, added to the metadata.

    Returns:
        The exception, not raised.
    """
    code = _CODE_NAMES.get(message.code, "UNKNOWN")
    metadata = dict(message.metadata)
    if job:
        metadata["job"] = job
    return (kind or BY_STATUS.get(code, UnknownError))(
        message.message, code=code, reason=message.reason, metadata=metadata
    )


# google.rpc.Code
_CODE_NAMES = {
    1: "CANCELLED",
    2: "UNKNOWN",
    3: "INVALID_ARGUMENT",
    4: "DEADLINE_EXCEEDED",
    5: "NOT_FOUND",
    6: "ALREADY_EXISTS",
    7: "PERMISSION_DENIED",
    8: "RESOURCE_EXHAUSTED",
    9: "FAILED_PRECONDITION",
    10: "ABORTED",
    11: "OUT_OF_RANGE",
    12: "UNIMPLEMENTED",
    13: "INTERNAL",
    14: "UNAVAILABLE",
    15: "DATA_LOSS",
    16: "UNAUTHENTICATED",
}


def event_from_proto(message: job_pb2.JobEvent) -> Event | None:
    """Make the record of an event; None of a heartbeat, and of a kind new to this client."""
    if message.HasField("progress"):
        return Event(
            type="progress",
            sequence=message.sequence,
            time=from_timestamp(message.time),
            progress=progress_from_proto(message.progress),
        )
    if not message.HasField("state_change"):
        return None
    change = message.state_change
    return Event(
        type="state",
        sequence=message.sequence,
        time=from_timestamp(message.time),
        state=state_name(change.state),
        cancelling=change.state == job_pb2.Job.STATE_CANCELLING,
        attempt=change.attempt,
        error=error_from_proto(change.error) if change.HasField("error") else None,
    )
