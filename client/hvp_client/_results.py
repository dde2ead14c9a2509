"""Records of what a job met and found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
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

_TELLING = 0.2  # a margin of this part of the largest value, or less, tells something

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


@dataclass(frozen=True, kw_only=True)
class Completeness:
    """What is known of eigenvalues that a search for k of them does not show.

    Attributes:
        shown: Counted from its end of the spectrum, the i-th wanted eigenvalue lies at most
            `margin` further out than the i-th of the pairs: none was missed, copies of repeated
            ones included.
        margin: In units of the eigenvalues: the tolerance, and the noise of the search; infinite
            where nothing is known.
        failure_probability: That `shown` is wrong, over the random starting vectors of the search
            for what was missed; 0 where the basis spanned the whole space.
        num_products: Operator products spent on it.
    """

    shown: bool
    margin: float
    failure_probability: float
    num_products: int


@dataclass(frozen=True, kw_only=True, eq=False)
class EigshResult(Generic[VectorT]):
    """k eigenpairs A y = λ y of an operator.

    Attributes:
        eigenvalues: (k,) float64, ascending: the Rayleigh quotients of the verifying products.
        residuals: (k,) float64, the norms ‖A y − λ y‖ / ‖y‖, each from a fresh product in float64.
        intervals: (k, 2) float64, each of which holds an eigenvalue of the exact operator, whatever
            precision the search ran in; infinitely wide where nothing is claimed. That none of the
            wanted was missed is `completeness`.
        completeness: Whether these are the k wanted ones, and how sure that is.
        eigenvectors: k orthonormal vectors on the server, in the order of `eigenvalues`. They are
            the job's and stay when their handles go.
        num_products: Operator products spent, those of the residuals included.
        outcome: `CONVERGED`: every pair meets the tolerance and none of the wanted was missed.
            `MULTIPLICITY_UNCERTAIN`: the latter could not be shown within the budget.
            `MAX_PRODUCTS`: the budget ran out before every pair met the tolerance.
            `NOISE_LIMIT`: the search converged and float64 does not confirm it; more products of
            this precision would not help. `UNVERIFIED`: there was no memory to verify in float64.
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
    intervals: NDArray[np.float64]
    completeness: Completeness
    eigenvectors: list[VectorT]
    num_products: int
    outcome: str
    symmetry_defect: float
    ritz_values: NDArray[np.float64]
    ritz_weights: NDArray[np.float64]
    loss: float
    provenance: Mapping[str, str]

    @property
    def claims(self) -> tuple[str, ...]:
        """What is certified and what is not, as sentences for people."""
        return (*self._interval_claims(), self._completeness_claim())

    def _interval_claims(self) -> tuple[str, ...]:
        if self.outcome == "UNVERIFIED" or not np.isfinite(self.intervals).all():
            return (
                "Nothing is claimed of the exact operator: there was no memory to verify the pairs "
                "in float64. Use more workers or fewer Lanczos vectors.",
            )
        held = "Each interval holds an eigenvalue of the exact operator."
        if self.outcome == "NOISE_LIMIT":
            return (
                held,
                "The products of the search were too coarse for the tolerance, and more of them "
                "would not help: use a wider precision.",
            )
        if self.outcome == "MAX_PRODUCTS":
            return (
                held,
                "The budget of products ran out before every pair met the tolerance: give more.",
            )
        return (held,)

    def _completeness_claim(self) -> str:
        known, count = self.completeness, len(self.residuals)
        size = float(np.abs(self.eigenvalues).max())
        if known.shown and known.margin > _TELLING * size:
            return (
                f"Where the eigenvalues of their places lie is shown only to {known.margin:.1e}, "
                "which is of the size of these values: use a smaller tolerance or a wider "
                "precision."
            )
        if known.shown:
            sure = (
                ""
                if known.failure_probability == 0
                else f", with a probability of at least {1 - known.failure_probability:.4g}"
            )
            return (
                f"None was missed{sure}: counted from its end, "
                f"{f'each of these {count}' if count > 1 else 'this one'} is the eigenvalue of its "
                f"place, to {known.margin:.1e}."
            )
        if self.outcome == "MULTIPLICITY_UNCERTAIN":
            return (
                "That none was missed could not be shown within the budget: repeated eigenvalues "
                "may lack copies. Give more products."
            )
        return "That none of the wanted was missed is not shown."

    def to_json(self) -> dict[str, Any]:
        """Make plain numbers, strings, lists and dicts of it; eigenvectors by name."""
        return {
            "eigenvalues": self.eigenvalues.tolist(),
            "residuals": self.residuals.tolist(),
            # JSON has no infinity: null is an end that is not known.
            "intervals": [[_finite(end) for end in interval] for interval in self.intervals],
            "completeness": {
                **asdict(self.completeness),
                "margin": _finite(self.completeness.margin),
            },
            "eigenvectors": [getattr(vector, "name", "") for vector in self.eigenvectors],
            "num_products": self.num_products,
            "outcome": self.outcome,
            "symmetry_defect": self.symmetry_defect,
            "ritz_values": self.ritz_values.tolist(),
            "ritz_weights": self.ritz_weights.tolist(),
            "loss": self.loss,
            "provenance": dict(self.provenance),
        }


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def certificate(
    message: job_pb2.EigshResult,
) -> tuple[NDArray[np.float64], Completeness]:
    """Read what a result claims.

    Args:
        message: A result; one of an older server claims nothing.

    Returns:
        Intervals (k, 2), and what is known of the eigenvalues that are not shown.
    """
    values = np.array(message.eigenvalues, np.float64)
    bounds = np.full(len(values), np.inf)
    if len(message.error_bounds) == len(values):
        bounds = np.array(message.error_bounds, np.float64)
    told = message.completeness
    known = message.HasField("completeness")
    return np.stack((values - bounds, values + bounds), axis=1), Completeness(
        shown=told.shown,
        margin=told.margin if known else np.inf,
        failure_probability=told.failure_probability if known else 1.0,
        num_products=told.num_products,
    )


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
