"""Jobs that go on from the result of another one: what they take from it, and what may differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, final

from hvp_operations.operation import Extension, Result

from hvp_service.calls.errors import ServiceError
from hvp_service.calls.names import Name, parse
from hvp_service.jobs.store import Job, JobSpec, JobStore


@final
@dataclass(frozen=True, kw_only=True)
class Earlier:
    """The job that another one goes on from.

    Attributes:
        job: The job; None where a job is one of its own.
        values: Values of the spec that are its result's: names of vectors, by field.
        vectors: Names of the vectors that the algorithm needs beside the result, by its fields.
    """

    job: Job | None = None
    values: Mapping[str, Any] = field(default_factory=dict)
    vectors: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def check(self, asked: JobSpec) -> Result | None:
        """Check that a job asks what the earlier one did, as far as its extension says.

        Args:
            asked: The question of the job, checked.

        Returns:
            The result that its algorithm needs; None where it needs none.

        Raises:
            ServiceError: EXTENSION_MISMATCH; EXTENSION_UNSUPPORTED: the earlier result does not
                hold what is needed.
        """
        if self.job is None:
            return None
        before, extension = _question(self.job), _extension(self.job)
        found = _result(self.job)
        begins = {each.field for each in before.declared.inputs if each.taken_from}
        if asked.operator != before.operator:
            raise _mismatch("operator", self.job, "is about another operator than")
        for each in fields(asked.spec):
            given, was = getattr(asked.spec, each.name), getattr(before.spec, each.name)
            if given != was and each.name not in {*extension.fields, *begins}:
                may = ", ".join(extension.fields)
                raise _mismatch(
                    each.name, self.job, f"has another {each.name} than", f" only {may} may differ"
                )
        if extension.new_seed and asked.spec.seed == before.spec.seed:
            raise _mismatch("seed", self.job, "needs another seed than", " give one of its own")
        if why := extension.refusal(asked.spec, found):
            raise ServiceError("EXTENSION_UNSUPPORTED", f"{self.job.name}: {why}.", field="extends")
        return found if extension.takes_result else None


async def earlier_of(
    jobs: JobStore, project: str, extends: str, operation: str | None, values: Mapping[str, Any]
) -> Earlier:
    """Look up the job that another one is to go on from.

    Args:
        jobs: Store of the jobs.
        project: Project of the new job.
        extends: Name of the earlier job; "" for none.
        operation: Name of the new job's operation.
        values: Values of its spec by field.

    Raises:
        ServiceError: RESOURCE_NOT_FOUND, JOB_NOT_SUCCEEDED, EXTENSION_MISMATCH,
            EXTENSION_UNSUPPORTED.
    """
    if not extends:
        return Earlier()
    name: Name = parse(extends, "jobs")
    job = await jobs.get(name)
    if job.state != "SUCCEEDED" or job.result is None or job.spec is None:
        raise ServiceError(
            "JOB_NOT_SUCCEEDED",
            f"{name} is {job.state}; only a job that has succeeded can be extended.",
            field="extends",
            metadata={"state": job.state},
        )
    if name.project != project or job.spec.operation != operation:
        raise _mismatch("extends", job, f"asks for {operation}, which is another question than")
    needed = {each: _vectors(job, each) for each in _extension(job).vectors}
    taken = {}
    for each in job.spec.declared.inputs:
        if each.taken_from and not values.get(each.field):
            taken[each.field] = _vectors(job, each.taken_from)
    return Earlier(job=job, values=taken, vectors=needed)


def _question(job: Job) -> JobSpec:
    assert job.spec is not None  # looked at by `earlier_of`
    return job.spec


def _result(job: Job) -> Result:
    assert job.result is not None  # looked at by `earlier_of`
    return job.result.result


def _extension(job: Job) -> Extension[Any]:
    """How jobs of this operation are extended; ServiceError where they are not."""
    declared = _question(job).declared
    if declared.extension is None:
        raise ServiceError(
            "EXTENSION_UNSUPPORTED",
            f"{job.name}: a job of {declared.name} cannot be extended; ask anew.",
            field="extends",
        )
    return declared.extension


def _vectors(job: Job, wanted: str) -> tuple[str, ...]:
    """The vectors of a result in one of its fields."""
    assert job.result is not None
    start = 0
    for name, count in _result(job).vector_counts().items():
        if name == wanted:
            return job.result.vectors[start : start + count]
        start += count
    return ()


def _mismatch(name: str, earlier: Job, how: str, then: str = "") -> ServiceError:
    return ServiceError(
        "EXTENSION_MISMATCH",
        f"The extension {how} {earlier.name};{then or ' ask anew'}.",
        field="extends",
        metadata={"field": name},
    )
