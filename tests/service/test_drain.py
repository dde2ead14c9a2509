"""How a server ends: calls end, others are told to come back, jobs wait, and it takes no longer."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hvp_protos.v1 import job_pb2, job_pb2_grpc, operator_pb2, operator_pb2_grpc
from hvp_service.app import dependencies, server
from hvp_service.app.config import ServerConfig
from hvp_service.app.dependencies import Dependencies

from tests.service.quadratic_backend import QuadraticBackend
from tests.service.test_transport import PARENT, eigsh, refusal, spec

HealthStatus = health_pb2.HealthCheckResponse


@final
@dataclass
class Serving:
    """A server in this process, its backend, and a channel to it."""

    task: asyncio.Task[None]
    stop: asyncio.Event
    deps: Dependencies
    backend: QuadraticBackend
    channel: grpc.aio.Channel


@pytest.fixture
async def serving(
    config: ServerConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> AsyncIterator[Serving]:
    backend, opened = QuadraticBackend(), asyncio.get_running_loop().create_future()
    monkeypatch.setattr(server, "open_backend", lambda **_: backend)
    monkeypatch.setattr(server, "adopt_loggers", lambda: None)  # it would outlast the test

    async def open_dependencies(*arguments: Any) -> Dependencies:
        opened.set_result(await dependencies.open_dependencies(*arguments))
        return opened.result()  # type: ignore[no-any-return]

    monkeypatch.setattr(server, "open_dependencies", open_dependencies)
    stop = asyncio.Event()
    task = asyncio.create_task(server.serve(config, stop=stop))
    deps = await opened
    line = ""
    while not line.startswith("serving on "):
        await asyncio.sleep(0.01)
        line = next(
            (each for each in capsys.readouterr().out.splitlines() if "serving on" in each), line
        )
    async with grpc.aio.insecure_channel(line.removeprefix("serving on ")) as channel:
        yield Serving(task, stop, deps, backend, channel)
    backend.gate.set()
    stop.set()
    await task


async def job_in_a_product(serving: Serving, operator: operator_pb2.OperatorSpec) -> str:
    """Queue a job, and wait until it stands in the midst of its first product."""
    stub: Any = job_pb2_grpc.JobServiceStub(serving.channel)  # type: ignore[no-untyped-call]
    request = job_pb2.CreateJobRequest(parent=PARENT, spec=eigsh(operator))
    name: str = (await stub.CreateJob(request)).job.name
    async for answer in stub.WatchJob(job_pb2.WatchJobRequest(name=name)):
        if answer.event.WhichOneof("event") == "progress":
            return name
    raise AssertionError("the watch has ended")


async def test_a_drain_lets_calls_end_sends_others_away_and_queues_the_job_again(
    serving: Serving,
) -> None:
    operator = await spec(serving.deps)
    job_stub: Any = job_pb2_grpc.JobServiceStub(serving.channel)  # type: ignore[no-untyped-call]
    health: Any = health_pb2_grpc.HealthStub(serving.channel)
    vector = operator_pb2.ComputeGradientRequest(operator=operator)
    operators: Any = operator_pb2_grpc.OperatorServiceStub(  # type: ignore[no-untyped-call]
        serving.channel
    )
    gradient = (await operators.ComputeGradient(vector)).gradient.name
    serving.backend.gate.clear()
    apply = operator_pb2.ApplyOperatorRequest(operator=operator, vectors=[gradient])
    product = asyncio.ensure_future(operators.ApplyOperator(apply))
    name = await job_in_a_product(serving, operator)
    states = health.Watch(health_pb2.HealthCheckRequest())
    assert (await states.read()).status == HealthStatus.SERVING
    watch = job_stub.WatchJob(job_pb2.WatchJobRequest(name=name, after_sequence=99))
    reading = asyncio.ensure_future(watch.read())

    serving.stop.set()
    assert (await states.read()).status == HealthStatus.NOT_SERVING
    for late in (reading, job_stub.GetJob(job_pb2.GetJobRequest(name=name))):
        code, details = await refusal(late)
        assert code == grpc.StatusCode.UNAVAILABLE
        assert details["ErrorInfo"].reason == "SERVER_DRAINING"
        assert details["RetryInfo"].retry_delay.seconds > 0
    assert not product.done()
    assert not serving.task.done()
    serving.backend.gate.set()
    assert len((await product).products) == 1  # a call that ran before has its answer
    await asyncio.wait_for(serving.task, 10.0)
    assert rows_of(serving.deps.config.state_dir) == [("QUEUED", 0)]


async def test_a_product_that_outlasts_the_grace_keeps_no_server_alive(serving: Serving) -> None:
    operator = await spec(serving.deps)
    serving.backend.gate.clear()
    await job_in_a_product(serving, operator)
    serving.stop.set()  # the gate stays shut
    await asyncio.wait_for(serving.task, serving.deps.config.grace_s + server.LATEST_S)
    assert rows_of(serving.deps.config.state_dir) == [("QUEUED", 0)]


async def test_a_server_is_stopped_while_its_ranks_start(
    config: ServerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, started = QuadraticBackend(), asyncio.Event()

    async def start() -> None:
        started.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(backend, "start", start)
    monkeypatch.setattr(server, "open_backend", lambda **_: backend)
    stop = asyncio.Event()
    task = asyncio.create_task(server.serve(config, stop=stop))
    await started.wait()
    stop.set()
    await asyncio.wait_for(task, 10.0)


BESIDE = """
import asyncio, sys
from hvp_service.app import dependencies, server
from tests.service.quadratic_backend import QuadraticBackend

class Stuck(QuadraticBackend):
    async def start(self):
        print("starting", flush=True)
        await asyncio.Event().wait()

    async def close(self):
        print("closing", flush=True)
        await asyncio.Event().wait()

server.open_backend = lambda **_: Stuck()
sys.exit(server.main(sys.argv[1:]))
"""


def test_a_second_signal_ends_a_server_at_once(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [
            *(sys.executable, "-c", BESIDE, "--address=127.0.0.1:0", "--grace-s=600"),
            *(f"--state-dir={tmp_path / 'state'}", "--backend=inprocess", "--workers=1"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    with process:
        assert process.stdout is not None
        assert process.stderr is not None
        for word in ("starting", "closing"):  # which nothing ends
            assert process.stdout.readline() == f"{word}\n"
            process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 128 + signal.SIGTERM
        assert "second signal" in process.stderr.read()


def test_an_end_that_hangs_is_cut_short() -> None:
    script = "import time; from hvp_service.app.ending import *; end_within(0.1); time.sleep(60)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "cut short" in done.stdout


def rows_of(state_dir: Path) -> list[tuple[str, int]]:
    """State and attempt of every job."""
    with contextlib.closing(sqlite3.connect(state_dir / "hvp.sqlite3")) as rows:
        return rows.execute("SELECT state, attempt FROM jobs").fetchall()
