"""Jobs from the queue to their end: runs, cancellations, losses, restarts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import structlog
from hvp_operations.checking import checked
from hvp_operations.eigsh import OPERATION, EigshResult
from hvp_operations.operation import Facts, SpecError
from hvp_service.app.config import ServerConfig
from hvp_service.app.dependencies import Dependencies, open_dependencies
from hvp_service.batches import service as batches
from hvp_service.calls.errors import ServiceError
from hvp_service.calls.names import Name, parse
from hvp_service.calls.paging import PageRequest
from hvp_service.checkpoints import service as checkpoints
from hvp_service.jobs import service as jobs
from hvp_service.jobs.store import Job, JobError, JobEvent, JobResult, Lease, StateChange
from hvp_service.operators import service as operators
from hvp_service.storage.state_dir import StateDir
from hvp_service.vectors import service as vectors
from hvp_service.vectors import transfer
from hvp_service.vectors.rows import Vector
from hvp_workers.backend import BackendError, RunProgress
from safetensors.numpy import save

from tests.service.quadratic_backend import QuadraticBackend
from tests.service.world import (
    CONFIG,
    PROJECT,
    checkpoint_files,
    create_job,
    make_operator,
    plan_job,
)

create = create_job


async def follow(deps: Dependencies, name: Name, after: int = 0) -> list[JobEvent]:
    return [event async for event in jobs.watch(deps, name, after) if event is not None]


async def until(deps: Dependencies, name: Name, state: str) -> Job:
    for _ in range(500):
        job = await deps.jobs.get(name)
        if job.state == state:
            return job
        await asyncio.sleep(0.01)
    raise AssertionError(f"{job.state}, not {state}: {job.error}")


def states(events: list[JobEvent]) -> list[str]:
    return [event.body.state for event in events if isinstance(event.body, StateChange)]


async def test_a_job_finds_the_eigenvalues_and_keeps_the_eigenvectors(deps: Dependencies) -> None:
    ref = await make_operator(deps)
    job = await create(deps, ref, k=3)
    events = await follow(deps, job.name)
    assert states(events) == ["QUEUED", "RUNNING", "SUCCEEDED"]
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    products = [e.body.num_products for e in events if isinstance(e.body, RunProgress)]
    assert products == sorted(products)
    done = await jobs.wait(deps, job.name, 1.0)
    assert done.result is not None
    found = done.result.result
    assert isinstance(found, EigshResult)
    np.testing.assert_allclose(found.eigenvalues, [1, 5, 6], rtol=1e-10)
    for value, name in zip(found.eigenvalues, done.result.vectors, strict=True):
        (product,) = await operators.apply(deps, ref, [name])
        pairs = [(name, name), (name, str(product.name))]
        assert await vectors.inner_products(deps, pairs) == [
            pytest.approx(1.0),
            pytest.approx(value),
        ]


async def test_a_job_is_of_the_kind_and_precision_asked_for(
    deps: Dependencies, backend: QuadraticBackend
) -> None:
    ref = replace(await make_operator(deps), kind="KIND_GGN", dtype="float32")
    job = await create(deps, ref)
    assert job.spec is not None
    assert (job.spec.operator.kind, job.spec.operator.precision) == ("KIND_GGN", "full")
    await until(deps, job.name, "SUCCEEDED")
    job = await create(deps, replace(ref, precision="bfloat16"))
    await until(deps, job.name, "SUCCEEDED")
    assert [(o.kind, o.precision) for o in backend.asked] == [("ggn", "full"), ("ggn", "bfloat16")]


async def test_eigenvectors_in_files_leave_the_ranks_until_they_are_used(
    deps: Dependencies, backend: QuadraticBackend
) -> None:
    ref = await make_operator(deps)
    done = await until(deps, (await create(deps, ref)).name, "SUCCEEDED")
    assert not backend.resident
    assert done.result is not None
    (first, _) = done.result.vectors
    assert await vectors.inner_products(deps, [(first, first)]) == [pytest.approx(1.0)]
    assert set(backend.resident) == {parse(first, "vectors").id}


async def nothing_is_left(deps: Dependencies, backend: QuadraticBackend, state: StateDir) -> bool:
    rows, _ = await deps.vectors.list_page(PROJECT, PageRequest())
    files = list(state.vector("x").parent.iterdir())
    return not (rows or files or backend.resident)


async def test_a_job_cancelled_while_its_eigenvectors_are_kept_leaves_none(
    deps: Dependencies,
    backend: QuadraticBackend,
    state_dir: StateDir,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ref = await make_operator(deps)
    keep = deps.vectors.keep

    async def keep_and_cancel(vector: Vector) -> None:
        await keep(vector)
        await jobs.cancel(deps, job.name)

    monkeypatch.setattr(deps.vectors, "keep", keep_and_cancel)
    job = await create(deps, ref)
    await until(deps, job.name, "CANCELLED")
    assert await nothing_is_left(deps, backend, state_dir)


async def test_a_job_whose_eigenvectors_cannot_be_kept_fails_and_leaves_none(
    deps: Dependencies,
    backend: QuadraticBackend,
    state_dir: StateDir,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ref = await make_operator(deps)

    async def fail(*_: object, **__: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr(deps.vectors, "add", fail)
    await until(deps, (await create(deps, ref)).name, "FAILED")
    assert await nothing_is_left(deps, backend, state_dir)


async def test_a_job_whose_end_cannot_be_written_ends_when_its_lease_runs_out(
    config: ServerConfig, state_dir: StateDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = QuadraticBackend()
    hasty = config.model_copy(update={"lease_s": 0.3})
    deps = await open_dependencies(hasty, state_dir, backend)
    try:
        ref = await make_operator(deps)
        backend.gate.clear()
        job = await create(deps, ref)
        await until(deps, job.name, "RUNNING")
        await jobs.cancel(deps, job.name)
        finish, failures = deps.jobs.finish, ["database is locked"]

        async def fail_once(lease: Lease, end: JobResult | JobError | None) -> Job:
            if failures:
                raise OSError(failures.pop())
            return await finish(lease, end)

        monkeypatch.setattr(deps.jobs, "finish", fail_once)
        backend.gate.set()
        await until(deps, job.name, "CANCELLED")
        assert not failures
    finally:
        await deps.close()


async def test_a_renewal_that_fails_is_tried_again(
    config: ServerConfig, state_dir: StateDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = QuadraticBackend()
    deps = await open_dependencies(config.model_copy(update={"lease_s": 0.3}), state_dir, backend)
    try:
        ref = await make_operator(deps)
        backend.gate.clear()
        renew, calls, renewed = deps.jobs.renew, 0, asyncio.Event()

        async def fail_first(lease: Lease) -> None:
            nonlocal calls
            calls += 1
            if calls == 1:
                raise OSError("database is locked")
            await renew(lease)
            renewed.set()

        monkeypatch.setattr(deps.jobs, "renew", fail_first)
        job = await create(deps, ref)
        await asyncio.wait_for(renewed.wait(), 10.0)
        backend.gate.set()
        assert (await until(deps, job.name, "SUCCEEDED")).attempt == 1
    finally:
        await deps.close()


async def test_eigenvectors_survive_the_ranks_and_a_restart(
    deps: Dependencies,
    config: ServerConfig,
    state_dir: StateDir,
    backend: QuadraticBackend,
) -> None:
    ref = await make_operator(deps)
    job = await create(deps, ref)
    await follow(deps, job.name)
    await deps.close()
    again = await open_dependencies(config, state_dir, QuadraticBackend())
    try:
        done = await again.jobs.get(job.name)
        assert done.state == "SUCCEEDED"
        assert done.result is not None
        (name, _) = done.result.vectors
        assert await vectors.inner_products(again, [(name, name)]) == [pytest.approx(1.0)]
        found = await again.vectors.get(parse(name, "vectors"))
        pieces = [p async for p in transfer.read(again, found.name, 0, 0)]
        assert sum(len(piece.data) for piece in pieces) == 48
    finally:
        await again.close()


async def test_jobs_run_one_after_another_in_the_order_queued(
    deps: Dependencies, backend: QuadraticBackend
) -> None:
    ref = await make_operator(deps)
    backend.gate.clear()
    first, second, third = [await create(deps, ref, seed=seed) for seed in range(3)]
    await until(deps, first.name, "RUNNING")
    assert (await deps.jobs.get(second.name)).state == "QUEUED"
    backend.gate.set()
    done = [await until(deps, job.name, "SUCCEEDED") for job in (first, second, third)]
    starts = [job.start_time for job in done if job.start_time]
    assert starts == sorted(starts)


async def test_a_running_job_is_cancelled_between_products_and_twice_is_once(
    deps: Dependencies, backend: QuadraticBackend
) -> None:
    ref = await make_operator(deps)
    backend.gate.clear()
    job = await create(deps, ref)
    running = await until(deps, job.name, "RUNNING")
    while running.progress is None:  # the run is before its first product now
        await deps.jobs.events_after(job.name, running.last_sequence, 5.0)
        running = await deps.jobs.get(job.name)
    await asyncio.sleep(0.05)
    assert (await jobs.cancel(deps, job.name)).state == "CANCELLING"
    assert (await jobs.cancel(deps, job.name)).state == "CANCELLING"
    backend.gate.set()
    await until(deps, job.name, "CANCELLED")
    assert (await jobs.cancel(deps, job.name)).state == "CANCELLED"
    events = await follow(deps, job.name)
    assert states(events) == ["QUEUED", "RUNNING", "CANCELLING", "CANCELLED"]
    assert backend.num_products <= 1
    after = await create(deps, ref, seed=2)
    await until(deps, after.name, "SUCCEEDED")


async def test_a_lost_group_costs_an_attempt_and_not_the_job(
    deps: Dependencies, backend: QuadraticBackend
) -> None:
    ref = await make_operator(deps)
    backend.gate.clear()
    job = await create(deps, ref)
    await until(deps, job.name, "RUNNING")
    backend.lose_after = 2
    backend.gate.set()
    done = await until(deps, job.name, "SUCCEEDED")
    assert done.attempt == 2
    assert states(await follow(deps, job.name)) == [
        "QUEUED",
        "RUNNING",
        "QUEUED",
        "RUNNING",
        "SUCCEEDED",
    ]
    assert backend.num_starts == 2


async def test_a_job_that_loses_every_attempt_fails(
    deps: Dependencies, backend: QuadraticBackend
) -> None:
    ref = await make_operator(deps)
    backend.gate.clear()
    job = await create(deps, ref)
    await until(deps, job.name, "RUNNING")
    backend.lose_after, backend.lose_each_time = 0, 1
    backend.gate.set()
    failed = await until(deps, job.name, "FAILED")
    assert failed.error is not None
    assert failed.error.reason == "ATTEMPTS_EXHAUSTED"
    assert "rank 0 died" in failed.error.message
    assert failed.attempt == 3


async def test_a_job_whose_inputs_are_bad_fails_with_their_reason(deps: Dependencies) -> None:
    from dataclasses import asdict

    ref = await make_operator(deps)
    files = await checkpoint_files(
        deps,
        {"config.json": CONFIG, "model.safetensors": save({"theta": np.ones(6)})},
    )
    broken = await deps.checkpoints.create(PROJECT, files)
    job = await create(deps, replace(ref, checkpoint=str(broken.name)))
    failed = await until(deps, job.name, "FAILED")  # there is no A
    assert failed.error is not None
    assert failed.error.reason == "INTERNAL"
    assert asdict(failed.error)["metadata"] == {}
    after = await create(deps, ref)
    await until(deps, after.name, "SUCCEEDED")


async def test_draining_queues_the_running_job_again_and_the_next_server_runs_it(
    deps: Dependencies, config: ServerConfig, state_dir: StateDir, backend: QuadraticBackend
) -> None:
    ref = await make_operator(deps)
    backend.gate.clear()
    job = await create(deps, ref)
    await until(deps, job.name, "RUNNING")
    closing = asyncio.create_task(deps.close())
    await asyncio.sleep(0.05)
    backend.gate.set()
    await closing
    again = await open_dependencies(config, state_dir, QuadraticBackend())
    try:
        done = await until(again, job.name, "SUCCEEDED")
        assert done.attempt == 1  # the first was cut short, not lost
        assert states(await follow(again, job.name)) == [
            "QUEUED",
            "RUNNING",
            "QUEUED",
            "RUNNING",
            "SUCCEEDED",
        ]
    finally:
        await again.close()


async def test_draining_does_not_wait_for_ever_for_a_product(
    deps: Dependencies, config: ServerConfig, state_dir: StateDir, backend: QuadraticBackend
) -> None:
    ref = await make_operator(deps)
    backend.gate.clear()
    job = await create(deps, ref)
    await until(deps, job.name, "RUNNING")
    await asyncio.wait_for(deps.dispatcher.stop(0.05), 5.0)
    assert (await deps.jobs.get(job.name)).state == "QUEUED"


async def test_watchers_and_waiters_are_sent_away_when_the_server_drains(
    deps: Dependencies, backend: QuadraticBackend
) -> None:
    ref = await make_operator(deps)
    backend.gate.clear()
    job = await create(deps, ref)
    watcher = asyncio.create_task(follow(deps, job.name))
    waiter = asyncio.create_task(jobs.wait(deps, job.name, 60.0))
    await until(deps, job.name, "RUNNING")
    deps.drain.begin()
    for task in (watcher, waiter):
        with pytest.raises(ServiceError, match="SERVER_DRAINING"):
            await task
    backend.gate.set()


async def test_a_quiet_watch_has_heartbeats(deps: Dependencies, backend: QuadraticBackend) -> None:
    ref = await make_operator(deps)
    backend.gate.clear()
    job = await create(deps, ref)
    await until(deps, job.name, "RUNNING")
    stream = jobs.watch(deps, job.name, 3)
    assert await asyncio.wait_for(anext(stream), 5.0) is None
    backend.gate.set()
    rest = [event async for event in stream if event is not None]
    assert states(rest)[-1] == "SUCCEEDED"
    assert rest[0].sequence == 4
    final = rest[-1].sequence
    assert await follow(deps, job.name, final) == []
    assert await follow(deps, job.name, final + 10) == []


async def test_waiting_ends_with_the_job_or_the_time(
    deps: Dependencies, backend: QuadraticBackend
) -> None:
    ref = await make_operator(deps)
    backend.gate.clear()
    job = await create(deps, ref)
    assert (await jobs.wait(deps, job.name, 0.05)).state in ("QUEUED", "RUNNING")
    waiter = asyncio.create_task(jobs.wait(deps, job.name, 30.0))
    backend.gate.set()
    assert (await waiter).state == "SUCCEEDED"
    with pytest.raises(ServiceError, match="TIMEOUT_INVALID"):
        await jobs.wait(deps, job.name, -1.0)


async def test_what_a_job_needs_cannot_be_deleted_before_it_ends(
    deps: Dependencies, backend: QuadraticBackend
) -> None:
    ref = await make_operator(deps)
    backend.gate.clear()
    job = await create(deps, ref)
    checkpoint, batch = parse(ref.checkpoint, "checkpoints"), parse(ref.data_batch, "dataBatches")
    for work in (
        checkpoints.delete_checkpoint(deps, checkpoint),
        batches.delete_batch(deps, batch),
    ):
        with pytest.raises(ServiceError, match="RESOURCE_IN_USE"):
            await work
    backend.gate.set()
    await until(deps, job.name, "SUCCEEDED")
    await batches.delete_batch(deps, batch)
    await checkpoints.delete_checkpoint(deps, checkpoint)


async def test_the_same_request_id_is_the_same_job_even_without_the_log_of_requests(
    deps: Dependencies,
) -> None:
    ref = await make_operator(deps)
    first = await create(deps, ref, request_id="r1")
    assert (await create(deps, ref, request_id="r1")).name == first.name
    with pytest.raises(ServiceError, match="REQUEST_ID_REUSED"):
        await create(deps, ref, request_id="r1", k=1)
    await until(deps, first.name, "SUCCEEDED")


async def test_only_checking_a_job_queues_nothing(deps: Dependencies) -> None:
    ref = await make_operator(deps)
    planned = await plan_job(deps, ref, k=3)
    assert (planned.problem, planned.cost.results) == ("", 3)
    with pytest.raises(ServiceError, match="K_INVALID"):
        await plan_job(deps, ref, k=0)
    assert await deps.jobs.unfinished(PROJECT) == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"k": 0}, "K_INVALID"),
        ({"k": -1}, "K_INVALID"),
        ({"k": 7}, "K_INVALID"),
        ({"which": "UNSPECIFIED"}, "WHICH_UNSUPPORTED"),
        ({"tol": -1.0}, "TOL_INVALID"),
        ({"tol": float("nan")}, "TOL_INVALID"),
        ({"tol": float("inf")}, "TOL_INVALID"),
        ({"tol": 1.0}, "TOL_INVALID"),
        ({"max_products": -1}, "MAX_PRODUCTS_INVALID"),
        ({"max_products": 3}, "MAX_PRODUCTS_INVALID"),
        ({"num_lanczos_vectors": -1}, "NUM_LANCZOS_VECTORS_INVALID"),
        ({"num_lanczos_vectors": 2}, "NUM_LANCZOS_VECTORS_INVALID"),
        ({"num_lanczos_vectors": 7}, "NUM_LANCZOS_VECTORS_INVALID"),
        ({"labels": {str(n): "" for n in range(65)}}, "LABELS_INVALID"),
        ({"labels": {"a": "x" * 257}}, "LABELS_INVALID"),
    ],
)
async def test_a_job_that_cannot_run_is_refused_with_the_field(
    deps: Dependencies, change: dict[str, Any], reason: str
) -> None:
    ref = await make_operator(deps)
    with pytest.raises(ServiceError) as caught:
        await create(deps, ref, **change)
    assert caught.value.reason == reason
    assert caught.value.field.endswith(next(iter(change)))


async def test_pairs_for_which_the_ranks_have_no_room_are_refused_before_they_are_queued(
    deps: Dependencies, backend: QuadraticBackend
) -> None:
    ref = await make_operator(deps, n=40)
    backend.memory_bytes = 40 * 40 * 8  # as many vectors as the operator's order
    with pytest.raises(ServiceError) as caught:
        await create(deps, ref, k=39)
    assert (caught.value.reason, caught.value.field) == (
        "INSUFFICIENT_CLUSTER_MEMORY",
        "spec.eigsh",
    )
    assert caught.value.metadata["available_bytes"] == str(backend.memory_bytes)
    assert int(caught.value.metadata["needed_bytes"]) > (39 + 40) * 40 * 8
    assert (await plan_job(deps, ref, k=39)).problem == caught.value.message
    with pytest.raises(ServiceError, match="INSUFFICIENT_CLUSTER_MEMORY"):
        await create(deps, ref, k=2, num_lanczos_vectors=40)
    assert await deps.jobs.unfinished(PROJECT) == []
    assert (await create(deps, ref, k=2)).state == "QUEUED"


async def test_a_job_that_was_queued_without_the_check_fails_by_it_and_the_next_one_runs(
    deps: Dependencies, backend: QuadraticBackend
) -> None:
    ref = await make_operator(deps, n=40)
    memory_bytes = backend.memory_bytes
    backend.gate.clear()
    first = await create(deps, ref)
    await until(deps, first.name, "RUNNING")
    large, after = await create(deps, ref, k=39), await create(deps, ref)
    backend.memory_bytes = 40 * 40 * 8
    backend.gate.set()
    failed = await until(deps, large.name, "FAILED")
    assert failed.error is not None
    assert failed.error.reason == "INSUFFICIENT_CLUSTER_MEMORY"
    backend.memory_bytes = memory_bytes
    await until(deps, after.name, "SUCCEEDED")


def test_a_job_lists_no_more_pairs_than_one_message_holds() -> None:
    facts = Facts(num_parameters=10**8, kind="hessian")
    assert checked(OPERATION, {"k": 10_000}, facts).k == 10_000
    with pytest.raises(SpecError, match="1 to 10000") as refusal:
        checked(OPERATION, {"k": 10_001}, facts)
    assert refusal.value.reason == "K_INVALID"


async def test_a_full_queue_refuses_with_a_delay(
    deps: Dependencies, backend: QuadraticBackend
) -> None:
    ref = await make_operator(deps)
    backend.gate.clear()
    crowded = replace(deps, config=deps.config.model_copy(update={"max_queued_jobs": 1}))
    running = await create(crowded, ref)
    await until(deps, running.name, "RUNNING")
    await create(crowded, ref)
    with pytest.raises(ServiceError) as caught:
        await create(crowded, ref)
    assert caught.value.reason == "QUEUE_FULL"
    assert caught.value.retry_after_s is not None
    backend.gate.set()


async def test_drains_use_up_no_attempts_and_one_loss_after_three_of_them_is_one(
    config: ServerConfig, state_dir: StateDir
) -> None:
    name: Name | None = None
    for _ in range(3):
        backend = QuadraticBackend()
        backend.gate.clear()
        deps = await open_dependencies(config, state_dir, backend)
        if name is None:
            name = (await create(deps, await make_operator(deps))).name
        await until(deps, name, "RUNNING")
        await deps.dispatcher.stop(0.0)  # in the midst of a product
        assert (await deps.jobs.get(name)).state == "QUEUED"
        await deps.close()
    assert name is not None
    backend = QuadraticBackend()
    backend.gate.clear()
    deps = await open_dependencies(config, state_dir, backend)
    try:
        await until(deps, name, "RUNNING")
        backend.lose_after = 0
        backend.gate.set()
        done = await until(deps, name, "SUCCEEDED")
        assert done.attempt == 2
    finally:
        await deps.close()


async def test_a_server_that_stops_ends_the_product_that_outlasts_its_grace(
    deps: Dependencies, backend: QuadraticBackend
) -> None:
    ref = await make_operator(deps)
    backend.gate.clear()
    job = await create(deps, ref)
    await until(deps, job.name, "RUNNING")
    seeded = await vectors.create(
        deps,
        PROJECT,
        ref.checkpoint,
        "float64",
        vectors.SeededSource(seed=1, distribution="DISTRIBUTION_SPHERE"),
    )
    call = asyncio.create_task(operators.apply(deps, ref, [str(seeded.name)]))
    await asyncio.sleep(0.05)
    await asyncio.wait_for(deps.dispatcher.stop(0.05), 10.0)
    queued = await deps.jobs.get(job.name)
    assert (queued.state, queued.attempt) == ("QUEUED", 0)
    with pytest.raises(ServiceError, match="SERVER_DRAINING"):
        await call
    with pytest.raises(ServiceError, match="SERVER_DRAINING"):
        await operators.evaluate_loss(deps, ref)
    assert backend.num_starts == 1  # ranks that were ended are not started again


async def test_a_fault_of_a_rank_is_internal_to_its_caller_and_told_to_the_log(
    deps: Dependencies, backend: QuadraticBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref = await make_operator(deps)

    async def fail(*_: object, **__: object) -> AsyncIterator[Any]:
        raise BackendError("INTERNAL", "KeyError: 'secret'", {"exception": "KeyError"}, "line 7")
        yield

    monkeypatch.setattr(backend, "run", fail)
    with structlog.testing.capture_logs([structlog.contextvars.merge_contextvars]) as lines:
        failed = await until(deps, (await create(deps, ref)).name, "FAILED")
    assert failed.error is not None
    assert (failed.error.reason, failed.error.metadata) == ("INTERNAL", {})
    assert str(failed.name) in failed.error.message
    assert "secret" not in failed.error.message
    (line,) = [line for line in lines if line["log_level"] == "error"]
    assert (line["job"], line["exception"]) == (str(failed.name), "line 7")
