"""The worker group is lost, and whatever its next start meets it comes back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hvp_service.app import server
from hvp_service.app.dependencies import Dependencies
from hvp_service.app.transport import start_transport
from hvp_service.group import supervisor as group_supervisor
from hvp_service.group.supervisor import GroupSupervisor
from hvp_service.jobs import service as jobs
from hvp_workers.backend import GroupLostError

from tests.service.quadratic_backend import QuadraticBackend
from tests.service.world import create_job, make_operator

LOSS = GroupLostError("WORKER_GROUP_LOST", "rank 0 died", {}, "rank 0:\nTraceback: KeyError")


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_supervisor, "_FIRST_PAUSE_S", 0.01)


async def test_a_start_that_meets_anything_is_tried_again_and_the_log_tells_it() -> None:
    backend = QuadraticBackend()
    group = GroupSupervisor(backend)
    await group.start()
    await backend.close()
    backend.start_errors = [OSError("no space left on device"), RuntimeError("anything"), LOSS]
    with structlog.testing.capture_logs() as lines:
        group.lose(LOSS)
        await asyncio.wait_for(group.wait_ready(), 10.0)
    assert group.state == "READY"
    assert backend.num_starts == 5
    told = [line for line in lines if line["event"] == "worker group does not start"]
    assert [line["log_level"] for line in told] == ["error"] * 3
    (lost,) = [line for line in lines if line["event"] == "worker group lost"]
    assert "KeyError" in lost["exception"]
    await group.close()


async def test_a_group_that_is_closed_is_not_started_again() -> None:
    backend = QuadraticBackend()
    group = GroupSupervisor(backend)
    await group.start()
    await group.close()
    group.lose(LOSS)
    await group.close()
    assert (group.state, backend.num_starts) == ("LOST", 1)


@pytest.fixture
async def health(deps: Dependencies) -> AsyncIterator[Any]:
    """A stub of the health service of a server that listens."""
    transport = await start_transport(deps)
    async with grpc.aio.insecure_channel(transport.address) as channel:
        yield health_pb2_grpc.HealthStub(channel)
    await transport.stop(1.0)


@pytest.mark.parametrize("service", ["", "hvp.v1.JobService"])
async def test_health_follows_the_ranks_and_the_queue_goes_on_behind_a_failing_start(
    deps: Dependencies, backend: QuadraticBackend, health: Any, service: str
) -> None:
    watch = health.Watch(health_pb2.HealthCheckRequest(service=service))

    async def shown(status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        while (await watch.read()).status != status:
            pass

    await shown(health_pb2.HealthCheckResponse.SERVING)
    backend.gate.clear()
    job = await create_job(deps, await make_operator(deps), k=1, which="LA")
    while (await deps.jobs.get(job.name)).progress is None:  # it waits before a product then
        await deps.jobs.events_after(job.name, job.last_sequence, 1.0)
    backend.start_errors = [OSError("no space left on device")]
    backend.lose_after = 0
    backend.gate.set()
    await asyncio.wait_for(shown(health_pb2.HealthCheckResponse.NOT_SERVING), 30.0)
    await asyncio.wait_for(shown(health_pb2.HealthCheckResponse.SERVING), 30.0)
    while not (job := await jobs.wait(deps, job.name, 10.0)).end_time:
        pass
    assert (job.state, job.attempt) == ("SUCCEEDED", 2)
    watch.cancel()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), LOSS], ids=repr)
async def test_a_first_start_that_fails_is_one_line_and_no_page(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
) -> None:
    backend = QuadraticBackend()
    backend.start_errors = [error]
    monkeypatch.setattr(server, "open_backend", lambda **_: backend)
    monkeypatch.setattr(server, "configure_logs", lambda *_: None)  # it would outlast the test
    arguments = ["--state-dir", str(tmp_path / "state"), "--backend=inprocess", "--workers=1"]
    status = await asyncio.to_thread(server.main, arguments)
    assert status == 1
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert said == [f"error: {error}"]
