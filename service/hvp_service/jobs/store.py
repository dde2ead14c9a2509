"""Jobs as rows: the states that they pass through, and the contract of their store."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from hvp_operations.operation import EARLIER, Operation, Result
from hvp_operations.registry import operations
from hvp_workers.backend import RunProgress

from hvp_service.calls.errors import code_of
from hvp_service.calls.names import Name, parse
from hvp_service.calls.paging import PageRequest
from hvp_service.operators.resolver import OperatorRef

JobState = Literal["QUEUED", "RUNNING", "CANCELLING", "SUCCEEDED", "FAILED", "CANCELLED"]
FINAL_STATES: frozenset[JobState] = frozenset({"SUCCEEDED", "FAILED", "CANCELLED"})
EVENTS_PER_PAGE = 500
HELD_STATES: frozenset[JobState] = frozenset({"RUNNING", "CANCELLING"})


class StaleLeaseError(Exception):
    """The job is no longer this attempt's: it was claimed again, or has ended."""


#: Where a question's operator names a vector; no field of a spec has a dot in its name.
PRECONDITION = "operator.precondition"


@dataclass(frozen=True, kw_only=True)
class JobSpec:
    """A question about an operator.

    Attributes:
        operation: Name of the operation.
        operator: The operator that the question is about.
        spec: The operation's own spec, checked.
        earlier: Names of the vectors of the result that the question goes on from and needs, by
            that result's fields.
    """

    operation: str
    operator: OperatorRef
    spec: Any
    earlier: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def declared(self) -> Operation[Any]:
        """The operation's declaration."""
        return operations()[self.operation]

    @property
    def inputs(self) -> Mapping[str, tuple[Name, ...]]:
        """The vectors that the question needs.

        Those that it names are by field, its operator's under PRECONDITION, and those of the result
        that it goes on from behind EARLIER.

        Raises:
            ServiceError: RESOURCE_NOT_FOUND: no vector could ever have that name.
        """
        named = dict(self.declared.named(self.spec))
        named |= {f"{EARLIER}{field}": names for field, names in self.earlier.items()}
        if self.operator.precondition:
            named[PRECONDITION] = (self.operator.precondition,)
        return {
            field: tuple(parse(name, "vectors") for name in names) for field, names in named.items()
        }


@dataclass(frozen=True, kw_only=True)
class JobError:
    """Why a job failed, in the terms in which a call would be refused."""

    code: int  # google.rpc.Code
    reason: str
    message: str
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class JobResult:
    """The result of a job, with the vectors that belong to it.

    Attributes:
        result: The operation's own result.
        vectors: Names of the job's vectors, in the result's order.
        num_elements: Number of elements of each vector of the operator's domain.
        output_shape: Shape of those of its codomain, where these are outputs.
        argument_shape: Shape of those of its domain, where these are activations.
        vector_time: When the vectors were made, in microseconds.
    """

    result: Result
    vectors: tuple[str, ...] = ()
    num_elements: int = 0
    output_shape: tuple[int, ...] = ()
    argument_shape: tuple[int, ...] = ()
    vector_time: int = 0


@dataclass(frozen=True, kw_only=True)
class Job:
    """One job, read from its row as far as this version can."""

    name: Name
    spec: JobSpec | None  # None: another version's
    extends: str = ""  # name of the job that this one goes on from
    earlier: Result | None = None  # its result, until this one has ended
    labels: Mapping[str, str]
    state: JobState = "QUEUED"
    attempt: int = 0
    max_attempts: int
    progress: RunProgress | None = None
    result: JobResult | None = None
    error: JobError | None = None
    last_sequence: int = 0
    create_time: int  # microseconds, as the others
    start_time: int | None = None
    end_time: int | None = None

    @property
    def inputs(self) -> frozenset[Name]:
        """The vectors that the job needs until it has ended."""
        named = {} if self.spec is None else self.spec.inputs
        return frozenset(name for names in named.values() for name in names)

    @property
    def lease(self) -> Lease:
        """The lease of the present attempt."""
        return Lease(self.name, self.attempt)

    def uses(self, resource: Name) -> bool:
        """Whether the job's operator names this checkpoint or data batch."""
        if self.spec is None:
            return False
        operator = self.spec.operator
        return str(resource) in (operator.checkpoint, operator.data_batch)


@dataclass(frozen=True)
class Lease:
    """The right to write to one attempt of one job; every write of a runner carries it."""

    name: Name
    attempt: int


@dataclass(frozen=True, kw_only=True)
class StateChange:
    """The event that a job has come to a state."""

    state: JobState
    attempt: int
    error: JobError | None = None


@dataclass(frozen=True, kw_only=True)
class JobEvent:
    """Something that happened to a job."""

    sequence: int  # dense from 1
    time: int  # microseconds
    body: StateChange | RunProgress | None  # None: of a kind that this version does not know


class JobStore(ABC):
    """Rows of jobs and of their events.

    Laws:
        Every change of state is an event, and events are numbered densely from 1.
        A final state never changes.
        Of the attempts of a job only the newest can write; others raise StaleLeaseError.
        What a method has returned survives a crash.
        A row that this version cannot read is shown as far as it can be, changes nothing for
        others, and FAILED with JOB_UNREADABLE when its turn to run comes.
        When the rows cannot be reached, a method raises DatabaseBusyError and has done nothing.
    """

    @abstractmethod
    async def create(self, job: Job, max_queued: int) -> Job:
        """Queue a job; when one of that name is there, answer it as it is.

        The vectors that the job names stay until the job has ended.

        Raises:
            ServiceError: QUEUE_FULL; RESOURCE_NOT_FOUND for a vector that was deleted meanwhile.
        """

    @abstractmethod
    async def get(self, name: Name) -> Job:
        """Look up a job by its name.

        Raises:
            ServiceError: RESOURCE_NOT_FOUND.
        """

    @abstractmethod
    async def list_page(
        self, project: str, states: Sequence[JobState], page: PageRequest
    ) -> tuple[list[Job], str]:
        """One page of jobs, newest first and without results, and the next page's token.

        An empty collection of states means all.
        """

    @abstractmethod
    async def delete(self, name: Name) -> None:
        """Forget an ended job and its events.

        Raises:
            ServiceError: RESOURCE_NOT_FOUND, JOB_NOT_ENDED.
        """

    @abstractmethod
    async def ended_before(self, time_us: int) -> list[Name]:
        """Jobs of all projects that ended before a time, the oldest first; at most a thousand."""

    @abstractmethod
    async def forget(self, name: Name) -> None:
        """Forget an ended job and its events, whatever its row holds; no error without one."""

    @abstractmethod
    async def unfinished(self, project: str) -> list[Job]:
        """Jobs of a project that have not ended."""

    @abstractmethod
    async def tally(self) -> Mapping[tuple[JobState, str], int]:
        """Number of jobs of all projects that have not ended, by state and operation.

        Questions that this version does not know count as `unknown`.
        """

    @abstractmethod
    async def pace(self, project: str, operator: OperatorRef) -> float:
        """Seconds per product of the latest job on this very operator; 0 where there was none."""

    @abstractmethod
    async def claim(self) -> Job | None:
        """Begin the next attempt of the oldest queued job; None where no job is queued.

        Jobs whose lease ran out are settled first, as `recover` does.
        """

    @abstractmethod
    async def renew(self, lease: Lease) -> JobState:
        """Hold an attempt for another lease's time.

        Returns:
            The job's state: CANCELLING where its run is to stop.

        Raises:
            StaleLeaseError: The job is no longer this attempt's.
        """

    @abstractmethod
    async def report(self, lease: Lease, progress: RunProgress) -> JobState:
        """Store where an attempt stands, as an event and as the job's progress.

        Returns:
            The job's state: CANCELLING where its run is to stop.

        Raises:
            StaleLeaseError: The job is no longer this attempt's.
        """

    @abstractmethod
    async def finish(self, lease: Lease, end: JobResult | JobError | None) -> Job:
        """End a job: a result SUCCEEDED, an error FAILED, None CANCELLED.

        Raises:
            StaleLeaseError: The job is no longer this attempt's.
        """

    @abstractmethod
    async def give_back(self, lease: Lease, *, counted: bool = True) -> Job:
        """Queue an attempt's job again at its old place; one being cancelled is CANCELLED.

        Args:
            lease: Lease of the attempt.
            counted: Whether the attempt counts, as a lost one does and one cut short does not.

        Raises:
            StaleLeaseError: The job is no longer this attempt's.
        """

    @abstractmethod
    async def cancel(self, name: Name) -> Job:
        """Ask a job to stop: QUEUED is CANCELLED, RUNNING is CANCELLING, others stay.

        Raises:
            ServiceError: RESOURCE_NOT_FOUND.
        """

    @abstractmethod
    async def relabel(self, name: Name, labels: Mapping[str, str], etag: str) -> Job:
        """Give a job other labels, if its present ones have this tag or the tag is "".

        Raises:
            ServiceError: RESOURCE_NOT_FOUND, ETAG_MISMATCH.
        """

    @abstractmethod
    async def recover(self) -> list[Job]:
        """Settle the jobs that servers now gone were running; called once, at start.

        Gone is every other server where only one can use the rows at a time, and else one whose
        lease has run out.

        RUNNING becomes QUEUED, or FAILED with ATTEMPTS_EXHAUSTED or JOB_UNREADABLE; CANCELLING
        becomes CANCELLED.
        """

    @abstractmethod
    async def events_after(self, name: Name, sequence: int, timeout_s: float) -> list[JobEvent]:
        """Events behind a sequence number, waiting for the first; [] when the time is up.

        At most `EVENTS_PER_PAGE` come at once, the oldest: ask again behind the last of them.

        Raises:
            ServiceError: RESOURCE_NOT_FOUND.
        """


def attempts_exhausted(job: Job, cause: str) -> JobError:
    """The end of a job that has lost its server or ranks too often."""
    return JobError(
        code=code_of("ATTEMPTS_EXHAUSTED"),
        reason="ATTEMPTS_EXHAUSTED",
        message=f"All {job.max_attempts} attempts were lost; the last one: {cause}",
        metadata={"attempts": str(job.attempt)},
    )


def unreadable(name: Name) -> JobError:
    """The end of a job whose row this version cannot read."""
    return JobError(
        code=code_of("JOB_UNREADABLE"),
        reason="JOB_UNREADABLE",
        message=f"The row of {name} was written by another version of the server, or is damaged. "
        "Run that version to see it, or delete this job and make it again.",
    )
