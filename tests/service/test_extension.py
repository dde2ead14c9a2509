"""Jobs that go on from the result of another one, whatever becomes of that one."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import sqlalchemy as sa
from hvp_operations.density import DensityResult
from hvp_operations.diagonal import DiagonalSpec
from hvp_service.app.config import ServerConfig
from hvp_service.app.dependencies import Dependencies, open_dependencies
from hvp_service.calls.errors import ServiceError
from hvp_service.calls.names import Name
from hvp_service.calls.paging import PageRequest
from hvp_service.jobs import service as jobs
from hvp_service.jobs.messages import job_message
from hvp_service.jobs.rows import read_spec, spec_row
from hvp_service.jobs.store import Job, JobSpec
from hvp_service.operators.resolver import OperatorRef
from hvp_service.storage.database import jobs as rows
from hvp_service.storage.state_dir import StateDir

from tests.service.quadratic_backend import QuadraticBackend
from tests.service.test_dispatcher import until
from tests.service.test_job_inputs import ask, seeded
from tests.service.world import PROJECT, create_job, make_operator


async def density(
    deps: Dependencies, ref: OperatorRef, num_probes: int, extends: Job | None = None, **other: Any
) -> Job:
    return await create_job(
        deps,
        ref,
        operation="density",
        extends="" if extends is None else str(extends.name),
        **{"num_probes": num_probes, "num_steps": 6, "seed": 3, **other},
    )


async def found(deps: Dependencies, job: Job) -> DensityResult:
    done = await until(deps, job.name, "SUCCEEDED")
    assert done.result is not None
    assert isinstance(done.result.result, DensityResult)
    return done.result.result


async def test_an_extended_job_makes_only_the_products_that_are_new(
    deps: Dependencies, backend: QuadraticBackend
) -> None:
    ref = await make_operator(deps)
    short = await density(deps, ref, 3)
    first = await found(deps, short)
    longer = await density(deps, ref, 5, extends=short)
    result = await found(deps, longer)
    assert (backend.num_products, result.num_products) == (5, 2)
    assert result.quadratures[:3] == first.quadratures
    again = await density(deps, ref, 6, extends=longer)
    assert len((await found(deps, again)).quadratures) == 6
    assert backend.num_products == 6
    whole = await found(deps, await density(deps, ref, 6))
    assert (await found(deps, again)).quadratures == whole.quadratures
    message = job_message(await deps.jobs.get(again.name))
    assert message.extends == str(longer.name)
    assert not job_message(await deps.jobs.get(short.name)).extends


async def test_the_earlier_job_may_go_and_attempts_may_be_lost(
    deps: Dependencies, backend: QuadraticBackend
) -> None:
    ref = await make_operator(deps)
    short = await density(deps, ref, 2)
    first = await found(deps, short)
    backend.gate.clear()
    longer = await density(deps, ref, 5, extends=short)
    await until(deps, longer.name, "RUNNING")
    await jobs.delete(deps, short.name)
    await backend.close()  # the ranks are lost, and started anew
    backend.gate.set()
    result = await found(deps, longer)
    assert result.quadratures[:2] == first.quadratures
    assert (await deps.jobs.get(longer.name)).attempt == 2
    assert result.num_products == 3
    with pytest.raises(ServiceError, match="RESOURCE_NOT_FOUND"):
        await density(deps, ref, 5, extends=short)


async def test_an_extended_job_goes_on_at_the_next_server(
    config: ServerConfig, state_dir: StateDir
) -> None:
    backend = QuadraticBackend()
    deps = await open_dependencies(config, state_dir, backend)
    ref = await make_operator(deps)
    short = await density(deps, ref, 2)
    first = await found(deps, short)
    backend.gate.clear()
    longer = await density(deps, ref, 4, extends=short)
    await until(deps, longer.name, "RUNNING")
    await jobs.delete(deps, short.name)
    await deps.close()
    deps = await open_dependencies(config, state_dir, backend := QuadraticBackend())
    try:
        result = await found(deps, longer)
        assert result.quadratures[:2] == first.quadratures
        assert backend.num_products == 2
        async with deps.database.reading() as connection:
            kept = (await connection.execute(sa.select(rows.c.earlier))).scalars().all()
        assert kept == [None]  # a job that has ended needs it no more
    finally:
        await deps.close()


async def test_a_list_does_not_hold_what_jobs_go_on_from(
    deps: Dependencies, backend: QuadraticBackend
) -> None:
    ref = await make_operator(deps)
    short = await density(deps, ref, 2)
    await found(deps, short)
    backend.gate.clear()
    longer = await density(deps, ref, 4, extends=short)
    listed, _ = await deps.jobs.list_page(PROJECT, (), PageRequest())
    assert [job.name for job in listed] == [longer.name, short.name]
    assert all(job.earlier is None for job in listed)
    assert (await deps.jobs.get(longer.name)).earlier is not None
    backend.gate.set()


async def test_a_search_begins_with_the_eigenvectors_of_the_job_that_it_extends(
    deps: Dependencies, backend: QuadraticBackend
) -> None:
    ref = await make_operator(deps)
    job = await until(deps, (await create_job(deps, ref)).name, "SUCCEEDED")
    assert job.result is not None
    backend.gate.clear()
    longer = await create_job(deps, ref, extends=str(job.name), seed=2, tol=1e-9)
    assert longer.spec is not None
    assert longer.spec.spec.v0 == job.result.vectors
    assert longer.earlier is None  # its vectors are all that is needed
    await jobs.delete(deps, job.name)  # and stay as long as they are
    backend.gate.set()
    await until(deps, longer.name, "SUCCEEDED")
    with pytest.raises(ServiceError, match="RESOURCE_NOT_FOUND"):
        await create_job(deps, ref, extends=str(job.name), seed=3)


async def test_a_solve_begins_with_the_solutions_of_the_job_that_it_extends(
    deps: Dependencies,
) -> None:
    ref = await make_operator(deps)
    b = await seeded(deps, ref)
    job = await until(deps, (await ask(deps, ref, b)).name, "SUCCEEDED")
    assert job.result is not None
    longer = await create_job(
        deps, ref, operation="solve", b=[str(b.name)], tol=1e-9, extends=str(job.name)
    )
    assert longer.spec is not None
    assert longer.spec.spec.x0 == job.result.vectors
    await until(deps, longer.name, "SUCCEEDED")


async def test_what_is_another_question_is_no_extension(
    deps: Dependencies, backend: QuadraticBackend
) -> None:
    ref = await make_operator(deps)
    short = await density(deps, ref, 3)
    search = await create_job(deps, ref)
    await found(deps, short)
    await until(deps, search.name, "SUCCEEDED")
    refused: list[tuple[str, str, Any]] = [
        ("num_steps", "EXTENSION_MISMATCH", density(deps, ref, 5, short, num_steps=5)),
        ("seed", "EXTENSION_MISMATCH", density(deps, ref, 5, short, seed=4)),
        ("operator", "EXTENSION_MISMATCH", density(deps, replace(ref, dtype="float32"), 5, short)),
        ("extends", "EXTENSION_MISMATCH", create_job(deps, ref, extends=str(short.name))),
        ("seed", "EXTENSION_MISMATCH", create_job(deps, ref, extends=str(search.name))),
        (
            "which",
            "EXTENSION_MISMATCH",
            create_job(deps, ref, extends=str(search.name), seed=2, which="LA"),
        ),
    ]
    for field, reason, asked in refused:
        with pytest.raises(ServiceError, match=reason) as caught:
            await asked
        assert caught.value.metadata == {"field": field}
        assert caught.value.field == "extends"
    with pytest.raises(ServiceError, match="EXTENSION_UNSUPPORTED") as caught:
        await density(deps, ref, 3, short)
    assert "has 3 already; ask for more" in caught.value.message
    with pytest.raises(ServiceError, match="EXTENSION_UNSUPPORTED") as caught:
        await create_job(deps, ref, extends=str(search.name), seed=2, k=1)
    assert "k is 1, and the job has 2 already; ask for 2 or more" in caught.value.message
    with pytest.raises(ServiceError, match="RESOURCE_NOT_FOUND"):
        await create_job(deps, ref, extends="no name")
    with pytest.raises(ServiceError, match="RESOURCE_NOT_FOUND"):
        await create_job(deps, ref, extends=str(Name(PROJECT, "jobs", "none")))
    backend.gate.clear()
    running = await density(deps, ref, 2)
    with pytest.raises(ServiceError, match="JOB_NOT_SUCCEEDED") as caught:
        await density(deps, ref, 4, running)
    assert "only a job that has succeeded" in caught.value.message
    assert await deps.jobs.unfinished(PROJECT) != []
    await jobs.cancel(deps, running.name)
    backend.gate.set()


async def test_a_request_id_means_one_extension_of_one_job(deps: Dependencies) -> None:
    ref = await make_operator(deps)
    short, other = await density(deps, ref, 2), await density(deps, ref, 2)
    await found(deps, short)
    await found(deps, other)
    one = await density(deps, ref, 3, short, request_id="a")
    assert (await density(deps, ref, 3, short, request_id="a")).name == one.name
    for another in (other, None):
        with pytest.raises(ServiceError, match="REQUEST_ID_REUSED"):
            await density(deps, ref, 3, another, request_id="a")


async def test_a_job_without_what_it_goes_on_from_does_not_begin_from_nothing(
    deps: Dependencies, backend: QuadraticBackend
) -> None:
    ref = await make_operator(deps)
    short = await density(deps, ref, 2)
    await found(deps, short)
    backend.gate.clear()
    first = await density(deps, ref, 1)
    longer = await density(deps, ref, 4, extends=short)
    await until(deps, first.name, "RUNNING")
    async with deps.database.writing() as connection:
        await connection.execute(
            sa.update(rows).where(rows.c.id == longer.name.id).values(earlier={"quadratures": 3})
        )
    backend.gate.set()
    failed = await until(deps, longer.name, "FAILED")
    assert failed.error is not None
    assert failed.error.reason == "JOB_UNREADABLE"


async def test_the_vectors_of_an_earlier_result_are_in_the_row_of_the_job_that_needs_them(
    deps: Dependencies,
) -> None:
    ref = await make_operator(deps)
    named = {"diagonal": ("projects/p/vectors/a",), "standard_error": ("projects/p/vectors/b",)}
    asked = JobSpec(operation="diagonal", operator=ref, spec=DiagonalSpec(), earlier=named)
    assert [str(name) for names in asked.inputs.values() for name in names] == [
        "projects/p/vectors/a",
        "projects/p/vectors/b",
    ]
    row = json.loads(json.dumps(spec_row(asked)))
    assert read_spec(row) == asked
    assert read_spec(row | {"earlier": ["a"]}) is None
    assert read_spec(row | {"later": {}}) is None
    plain = spec_row(replace(asked, earlier={}))
    assert plain.keys() == {"operation", "operator", "spec"}  # as earlier versions read it
