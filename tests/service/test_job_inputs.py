"""Jobs whose questions name vectors: checked, held until the end, made again for each attempt."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hvp_service.app.config import ServerConfig
from hvp_service.app.dependencies import Dependencies, open_dependencies
from hvp_service.calls.errors import ServiceError
from hvp_service.calls.names import Name, parse
from hvp_service.calls.paging import PageRequest
from hvp_service.jobs import service as jobs
from hvp_service.jobs.store import Job
from hvp_service.operators import service as operators
from hvp_service.operators.resolver import OperatorRef
from hvp_service.storage.state_dir import StateDir
from hvp_service.vectors import service as vectors
from hvp_service.vectors import transfer
from hvp_service.vectors.rows import Vector
from hvp_service.vectors.service import SeededSource
from numpy.typing import NDArray

from tests.service.quadratic_backend import QuadraticBackend
from tests.service.test_dispatcher import until
from tests.service.world import PROJECT, create_job, make_checkpoint, make_operator, quadratic

N = 6


async def seeded(
    deps: Dependencies, ref: OperatorRef, seed: int = 3, session: str = "", dtype: str = "float64"
) -> Vector:
    source = SeededSource(seed=seed, distribution="DISTRIBUTION_GAUSSIAN")
    return await vectors.create(deps, PROJECT, ref.checkpoint, dtype, source, session)


async def gradient(deps: Dependencies, ref: OperatorRef) -> Vector:
    return await operators.compute_gradient(deps, ref)


async def ask(deps: Dependencies, ref: OperatorRef, *b: Vector, damping: float = 0.0) -> Job:
    names = [str(vector.name) for vector in b]
    return await create_job(deps, ref, operation="solve", b=names, damping=damping)


async def elements(deps: Dependencies, name: str) -> NDArray[np.float64]:
    pieces = [piece async for piece in transfer.read(deps, parse(name, "vectors"), 0, 0)]
    return np.frombuffer(b"".join(piece.data for piece in pieces), np.float64)


async def x_of(deps: Dependencies, job: Job) -> NDArray[np.float64]:
    done = await until(deps, job.name, "SUCCEEDED")
    assert done.result is not None
    return await elements(deps, done.result.vectors[0])


async def names(deps: Dependencies) -> set[str]:
    found, _ = await deps.vectors.list_page(PROJECT, PageRequest())
    return {str(vector.name) for vector in found}


async def gone_soon(deps: Dependencies, backend: QuadraticBackend, vector: Vector) -> None:
    """Wait until nothing is left of a vector."""
    for _ in range(200):
        ids = {parse(name, "vectors").id for name in await names(deps)}
        if (
            vector.name.id not in {*backend.resident, *ids}
            and not deps.vectors.file(vector).exists()
        ):
            with pytest.raises(ServiceError, match="RESOURCE_NOT_FOUND"):
                await deps.vectors.get(vector.name, for_job=True)
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"{vector.name} is still there")


async def test_the_vectors_that_a_question_names_reach_its_run(deps: Dependencies) -> None:
    ref = await make_operator(deps)
    b, g = await seeded(deps, ref), await gradient(deps, ref)
    rhs = [await elements(deps, str(each.name)) for each in (b, g)]
    job = await ask(deps, ref, b, g, damping=0.5)
    done = await until(deps, job.name, "SUCCEEDED")
    assert done.result is not None
    assert len(done.result.vectors) == 2  # of four that there could have been
    matrix = quadratic(N)["A"] + 0.5 * np.eye(N)
    for name, each in zip(done.result.vectors, rhs, strict=True):
        np.testing.assert_allclose(
            await elements(deps, name), np.linalg.solve(matrix, each), rtol=1e-10
        )
    assert {str(b.name), str(g.name), *done.result.vectors} == await names(deps)


async def test_vectors_that_are_not_there_or_of_another_space_are_refused(
    deps: Dependencies,
) -> None:
    ref = await make_operator(deps)
    other = await make_checkpoint(deps, N, seed=5)
    elsewhere = await seeded(deps, replace(ref, checkpoint=str(other.name)))
    narrow = await seeded(deps, ref, dtype="float32")
    b = await seeded(deps, ref)
    for wrong in (elsewhere, narrow):
        with pytest.raises(ServiceError, match="VECTOR_SPACE_MISMATCH") as caught:
            await ask(deps, ref, b, wrong)
        assert caught.value.field == "spec.solve.b[1]"
        with pytest.raises(ServiceError, match="VECTOR_SPACE_MISMATCH") as applied:
            await operators.apply(deps, ref, [str(b.name), str(wrong.name)])
        assert caught.value.message == applied.value.message
    await vectors_deleted(deps, b)
    with pytest.raises(ServiceError, match="RESOURCE_NOT_FOUND"):
        await ask(deps, ref, b)
    with pytest.raises(ServiceError, match="RESOURCE_NOT_FOUND"):
        await create_job(deps, ref, operation="solve", b=["no name"])
    with pytest.raises(ServiceError, match="VECTORS_MISSING"):
        await create_job(deps, ref, operation="solve")
    assert not (await deps.jobs.unfinished(PROJECT))


async def vectors_deleted(deps: Dependencies, *some: Vector) -> None:
    for each in some:
        await deps.vectors.delete(each.name)


async def test_a_vector_deleted_while_a_job_waits_for_it_goes_when_the_job_has_ended(
    deps: Dependencies, backend: QuadraticBackend
) -> None:
    ref = await make_operator(deps)
    backend.gate.clear()
    first = await ask(deps, ref, await seeded(deps, ref, seed=1))
    b = await seeded(deps, ref, seed=2)
    expected = await elements(deps, str(b.name))
    queued = await ask(deps, ref, b)
    await until(deps, first.name, "RUNNING")
    await vectors_deleted(deps, b)
    assert str(b.name) not in await names(deps)
    with pytest.raises(ServiceError, match="RESOURCE_NOT_FOUND"):
        await vectors_deleted(deps, b)
    with pytest.raises(ServiceError, match="RESOURCE_NOT_FOUND"):
        await vectors.keep(deps, b.name)
    with pytest.raises(ServiceError, match="RESOURCE_NOT_FOUND"):
        await ask(deps, ref, b)
    await deps.vectors.collect()
    assert await deps.vectors.next_expiry() != 0  # nothing is due before the job has ended
    backend.gate.set()
    x = await x_of(deps, queued)
    np.testing.assert_allclose(quadratic(N)["A"] @ x, expected, rtol=1e-9)
    await gone_soon(deps, backend, b)


async def test_a_cancelled_job_lets_go_of_its_vectors(
    deps: Dependencies, backend: QuadraticBackend
) -> None:
    ref = await make_operator(deps)
    backend.gate.clear()
    b, c = await seeded(deps, ref, seed=1), await gradient(deps, ref)
    running, queued = await ask(deps, ref, b), await ask(deps, ref, c)
    await until(deps, running.name, "RUNNING")
    await vectors_deleted(deps, b, c)
    await jobs.cancel(deps, queued.name)
    await gone_soon(deps, backend, c)
    await jobs.cancel(deps, running.name)
    backend.gate.set()
    await until(deps, running.name, "CANCELLED")
    await gone_soon(deps, backend, b)


async def test_a_vector_outlives_its_session_and_its_job_for_the_job_that_needs_it(
    deps: Dependencies, backend: QuadraticBackend
) -> None:
    ref = await make_operator(deps)
    session = await deps.sessions.create(PROJECT, None)
    b = await seeded(deps, ref, session=str(session.name))
    expected = await elements(deps, str(b.name))
    solved = await until(deps, (await ask(deps, ref, b)).name, "SUCCEEDED")
    assert solved.result is not None
    x = await deps.vectors.get(parse(solved.result.vectors[0], "vectors"))
    backend.gate.clear()
    job = await ask(deps, ref, b, x)
    await deps.sessions.end(session.name)
    await jobs.delete(deps, solved.name)
    assert await names(deps) == set()
    backend.gate.set()
    np.testing.assert_allclose(quadratic(N)["A"] @ await x_of(deps, job), expected, rtol=1e-9)
    await gone_soon(deps, backend, b)
    await gone_soon(deps, backend, x)


async def test_an_attempt_after_a_loss_makes_its_vectors_again(
    deps: Dependencies, backend: QuadraticBackend
) -> None:
    ref = await make_operator(deps)
    b = await seeded(deps, ref)
    expected = await elements(deps, str(b.name))
    backend.lose_after = 2  # at the second call of the run
    job = await ask(deps, ref, b)
    await vectors_deleted(deps, b)
    np.testing.assert_allclose(quadratic(N)["A"] @ await x_of(deps, job), expected, rtol=1e-9)
    assert (await deps.jobs.get(job.name)).attempt == 2
    await gone_soon(deps, backend, b)


async def test_a_product_that_went_with_the_ranks_ends_the_job_with_what_to_do(
    deps: Dependencies, backend: QuadraticBackend
) -> None:
    ref = await make_operator(deps)
    product = await gradient(deps, ref)
    kept = await vectors.keep(deps, (await gradient(deps, ref)).name)
    backend.gate.clear()
    job = await ask(deps, ref, product)
    await until(deps, job.name, "RUNNING")
    after = await ask(deps, ref, kept)
    await backend.close()
    backend.gate.set()
    failed = await until(deps, job.name, "FAILED")
    assert failed.error is not None
    assert failed.error.reason == "INPUT_MISSING"
    assert "make it again, and keep it" in failed.error.message
    assert failed.attempt == 2
    await until(deps, after.name, "SUCCEEDED")


@contextlib.asynccontextmanager
async def served(
    config: ServerConfig, state_dir: StateDir, backend: QuadraticBackend
) -> AsyncIterator[Dependencies]:
    deps = await open_dependencies(config, state_dir, backend)
    try:
        yield deps
    finally:
        await deps.close()


@pytest.mark.parametrize("is_product", [False, True])
async def test_a_job_goes_on_with_its_vectors_at_the_next_server(
    config: ServerConfig, state_dir: StateDir, is_product: bool
) -> None:
    backend = QuadraticBackend()
    async with served(config, state_dir, backend) as deps:
        ref = await make_operator(deps)
        b = await (gradient if is_product else seeded)(deps, ref)
        expected = await elements(deps, str(b.name))
        backend.gate.clear()
        job = await ask(deps, ref, b)
        await until(deps, job.name, "RUNNING")
        await vectors_deleted(deps, b)
    async with served(config, state_dir, QuadraticBackend()) as deps:
        if is_product:
            failed = await until(deps, job.name, "FAILED")
            assert failed.error is not None
            assert failed.error.reason == "INPUT_MISSING"
        else:
            x = await x_of(deps, job)
            np.testing.assert_allclose(quadratic(N)["A"] @ x, expected, rtol=1e-9)
        with pytest.raises(ServiceError, match="RESOURCE_NOT_FOUND"):
            await deps.vectors.get(b.name)


async def test_a_plan_counts_the_vectors_that_are_named_once_each(deps: Dependencies) -> None:
    ref = await make_operator(deps)
    b, c = await seeded(deps, ref, seed=1), await seeded(deps, ref, seed=2)

    async def least(*some: Vector, x0: Sequence[Vector] = ()) -> int:
        _, plan = await jobs.create(
            deps,
            Name(PROJECT, "jobs", jobs.job_id(PROJECT, "")),
            operation="solve",
            operator=ref,
            values={
                "method": "cg",
                "b": [str(each.name) for each in some],
                "x0": [str(each.name) for each in x0],
            },
            labels={},
            validate_only=True,
        )
        return plan.least_bytes

    one = await least(b)
    vector = await least(b, x0=[c]) - one
    assert vector == pytest.approx(N * 8 / 0.8, abs=1)
    assert await least(b, x0=[b]) == one
    # x, a direction, and the copies of both when the run ends.
    assert await least(b, c) - one == pytest.approx((1 + 4) * vector, abs=5)
    await vectors_deleted(deps, b)  # which no plan has held
    with pytest.raises(ServiceError, match="RESOURCE_NOT_FOUND"):
        await deps.vectors.get(b.name, for_job=True)
