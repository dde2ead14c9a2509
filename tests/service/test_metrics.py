"""Figures for Prometheus: true, without callers' words, and never behind a product."""

from __future__ import annotations

import asyncio
import urllib.request
from collections.abc import AsyncIterator, Mapping
from typing import Any

import grpc
import numpy as np
import pytest
from hvp_operations.eigsh import EigshProgress
from hvp_protos.v1 import job_pb2
from hvp_service.app.config import ServerConfig
from hvp_service.app.dependencies import Dependencies
from hvp_service.jobs import service as jobs
from hvp_service.metrics import instruments, state
from hvp_service.metrics.endpoint import start_endpoint
from hvp_service.operators import service as operators
from hvp_service.vectors import service as vectors
from hvp_workers.backend import RunProgress
from prometheus_client.parser import text_string_to_metric_families
from pydantic import ValidationError

from tests.service.quadratic_backend import QuadraticBackend
from tests.service.test_transport import Wire, connected, refusal
from tests.service.world import PROJECT, create_job, make_operator, upload

Figures = Mapping[tuple[str, frozenset[str]], float]


@pytest.fixture
async def wire(deps: Dependencies) -> AsyncIterator[Wire]:
    async with connected(deps) as wire:
        yield wire


@pytest.fixture
async def port(deps: Dependencies) -> AsyncIterator[int]:
    endpoint = start_endpoint(deps, "127.0.0.1:0")
    yield endpoint.port
    await asyncio.to_thread(endpoint.close)


async def text_of(port: int) -> str:
    url = f"http://127.0.0.1:{port}/metrics"
    with await asyncio.to_thread(urllib.request.urlopen, url) as answer:
        text: str = answer.read().decode()
    return text


async def figures(port: int) -> Figures:
    """Samples by name and values of labels."""
    return {
        (sample.name, frozenset(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(await text_of(port))
        for sample in family.samples
    }


def at(figures: Figures, name: str, *labels: str) -> float | None:
    return figures.get((name, frozenset(labels)))


def risen(before: Figures, after: Figures, name: str, *labels: str) -> float:
    return (at(after, name, *labels) or 0.0) - (at(before, name, *labels) or 0.0)


async def test_a_job_is_counted_while_it_waits_runs_and_ends(
    deps: Dependencies, backend: QuadraticBackend, port: int
) -> None:
    ref = await make_operator(deps)
    before = await figures(port)
    backend.gate.clear()
    first, second = await create_job(deps, ref), await create_job(deps, ref, seed=2)
    await deps.jobs.events_after(first.name, 2, 30.0)  # behind its start: a product is at the gate
    during = await figures(port)
    assert at(during, "hvp_group_state", "ready") == 1
    assert at(during, "hvp_group_state", "lost") == 0
    assert at(during, "hvp_jobs", "running", "eigsh") == 1
    assert at(during, "hvp_jobs", "queued", "eigsh") == 1
    assert at(during, "hvp_job_products", "eigsh") == 0
    assert at(during, "hvp_job_products_limit", "eigsh") == 6
    backend.gate.set()
    for name in (first.name, second.name):
        ended = await jobs.wait(deps, name, 30.0)
        assert ended.state == "SUCCEEDED"
    after = await figures(port)
    assert at(after, "hvp_job_products", "eigsh") is None
    assert risen(before, after, "hvp_jobs_ended_total", "eigsh", "SUCCEEDED") == 2
    assert risen(before, after, "hvp_job_run_seconds_count", "eigsh", "SUCCEEDED") == 2
    assert risen(before, after, "hvp_job_wait_seconds_count", "eigsh") == 2
    assert risen(before, after, "hvp_products_total", "job") == 12  # 6 each
    assert risen(before, after, "hvp_tokens_total", "job") == 12 * 8  # of 2 sequences of 4


async def test_calls_are_counted_with_their_codes_reasons_and_bytes(
    deps: Dependencies, wire: Wire, port: int
) -> None:
    before = await figures(port)
    method = ("hvp.v1.JobService", "GetJob")
    request = job_pb2.GetJobRequest(name=f"projects/{PROJECT}/jobs/nothing")
    code, _ = await refusal(wire.jobs.GetJob(request))
    assert code == grpc.StatusCode.NOT_FOUND
    job = await create_job(deps, await make_operator(deps))
    found = job_pb2.GetJobRequest(name=str(job.name))
    answer = await wire.jobs.GetJob(found)
    await jobs.wait(deps, job.name, 30.0)
    after = await figures(port)
    assert risen(before, after, "grpc_server_started_total", *method) == 2
    assert risen(before, after, "grpc_server_handled_total", *method, "NOT_FOUND") == 1
    assert risen(before, after, "grpc_server_handled_total", *method, "OK") == 1
    assert risen(before, after, "grpc_server_handling_seconds_count", *method) == 2
    assert risen(before, after, "hvp_refusals_total", "RESOURCE_NOT_FOUND") == 1
    received = request.ByteSize() + found.ByteSize()
    assert risen(before, after, "hvp_received_bytes_total", *method) == received
    assert risen(before, after, "hvp_sent_bytes_total", *method) == answer.ByteSize()
    assert at(after, "hvp_calls_in_flight", "prompt") == 0
    assert risen(before, after, "hvp_database_transaction_seconds_count", "write") > 0
    assert risen(before, after, "hvp_database_transaction_seconds_count", "read") > 0


async def test_products_that_a_call_asks_for_are_counted(deps: Dependencies, port: int) -> None:
    ref = await make_operator(deps)
    source = vectors.SeededSource(seed=1, distribution="DISTRIBUTION_GAUSSIAN")
    vector = await vectors.create(deps, PROJECT, ref.checkpoint, "float64", source)
    before = await figures(port)
    await operators.apply(deps, ref, [str(vector.name)] * 3)
    after = await figures(port)
    assert risen(before, after, "hvp_products_total", "call") == 3
    assert risen(before, after, "hvp_tokens_total", "call") == 3 * 8


async def test_the_page_names_every_figure_and_no_figure_a_caller(
    deps: Dependencies, wire: Wire, port: int
) -> None:
    blob = await upload(deps, np.arange(5000).tobytes())
    job = await create_job(deps, await make_operator(deps), labels={"mine": "secret-label"})
    await wire.jobs.GetJob(job_pb2.GetJobRequest(name=str(job.name)))
    text = await text_of(port)
    for word in (job.name.id, blob.sha256, "secret-label", "projects/", f'"{PROJECT}"'):
        assert word not in text
    found = await figures(port)
    assert (at(found, "hvp_stored_bytes", "blobs") or 0) >= blob.size_bytes
    free, size = at(found, "hvp_disk_free_bytes"), at(found, "hvp_disk_size_bytes")
    assert free
    assert size
    assert 0 < free <= size
    assert at(found, "hvp_rank_resident_bytes", "0") == 1  # as the backend says
    told = {family.name for family in text_string_to_metric_families(text)}
    assert told >= {name for name in state.FAMILIES if not name.startswith("hvp_job_")}


async def test_lost_ranks_are_counted_and_have_no_memory(
    deps: Dependencies, backend: QuadraticBackend, port: int
) -> None:
    ref = await make_operator(deps)
    before = await figures(port)
    backend.lose_after = 0
    backend.start_errors = [OSError("no space left on device")]
    with pytest.raises(Exception, match="WORKER_GROUP_LOST"):
        await operators.evaluate_loss(deps, ref)
    lost = await figures(port)
    assert at(lost, "hvp_group_state", "lost") == 1
    assert at(lost, "hvp_rank_resident_bytes", "0") is None
    assert risen(before, lost, "hvp_group_losses_total") == 1
    await deps.group.wait_ready()
    assert risen(before, await figures(port), "hvp_group_starts_total") == 1


async def test_what_the_database_cannot_tell_is_left_out_and_the_rest_told(
    deps: Dependencies, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never() -> Any:
        await asyncio.Event().wait()

    monkeypatch.setattr(state, "_PATIENCE_S", 0.05)
    monkeypatch.setattr(deps.jobs, "tally", never)
    found = await figures(port)
    assert at(found, "hvp_group_state", "ready") is None
    assert at(found, "hvp_disk_size_bytes")


def test_the_running_jobs_own_progress_is_told_field_by_field() -> None:
    progress = RunProgress(
        operation="eigsh",
        stage="iterating",
        num_products=4,
        max_products=9,
        seconds_per_product=0.5,
        detail=EigshProgress(
            num_restarts=2, ritz_values=(-3.0, 1.0), residual_estimates=(0.25, 0.5)
        ),
    )
    found = state.Snapshot(state="READY", ranks=(), jobs={}, progress=progress)
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for metric in state.figures(found)
        for sample in metric.samples
    }
    assert samples["hvp_job_product_seconds", "eigsh"] == 0.5
    assert samples["hvp_job_progress", "eigsh", "num_restarts"] == 2
    assert samples["hvp_job_progress", "eigsh", "residual_estimates"] == 0.5  # the largest


def test_a_reason_that_is_in_no_table_is_no_label() -> None:
    before = instruments.REFUSALS.labels("INTERNAL")._value.get()
    instruments.refused("A_REASON_OF_A_CALLER")
    assert instruments.REFUSALS.labels("INTERNAL")._value.get() == before + 1


@pytest.mark.parametrize(("given", "meant"), [("9471", "127.0.0.1:9471"), ("[::]:1", "[::]:1")])
def test_a_port_alone_is_one_of_this_machine(given: str, meant: str) -> None:
    assert ServerConfig(metrics_address=given).metrics_address == meant


@pytest.mark.parametrize("address", ["x", "127.0.0.1:", "127.0.0.1:70000", "127.0.0.1:8471"])
def test_what_is_no_address_or_the_servers_own_is_refused(address: str) -> None:
    with pytest.raises(ValidationError, match="address"):
        ServerConfig(metrics_address=address)
