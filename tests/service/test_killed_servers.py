"""Two server processes on one database, killed again and again while they work."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hvp_client import Client
from safetensors.numpy import save_file

from tests.modules import postgres as postgres_server
from tests.service.world import CONFIG, quadratic

NUM_JOBS = 40
NUM_KILLS = 12


class Process:
    """A server process that is started anew at the same address."""

    def __init__(self, state_dir: Path, port: int):
        self.address = f"127.0.0.1:{port}"
        self._log = state_dir.with_suffix(f".{port}.log")
        self._arguments = [
            *(sys.executable, "-m", "tests.service.quadratic_server"),
            *("--address", self.address, "--state-dir", str(state_dir)),
            *("--backend", "inprocess", "--workers", "1"),
        ]
        self.start()

    def start(self) -> None:
        with self._log.open("a") as log:
            self._process = subprocess.Popen(
                self._arguments, stdout=subprocess.PIPE, stderr=log, text=True
            )
        assert self._process.stdout is not None
        assert self._process.stdout.readline().startswith("serving on"), self._log.read_text()

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(30)
        assert self._process.stdout is not None
        self._process.stdout.close()


@pytest.fixture
def pair(
    tmp_path: Path, postgres: postgres_server.Server, monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[Process]]:
    monkeypatch.setenv("HVP_DATABASE_URL", asyncio.run(postgres.emptied()))
    monkeypatch.setenv("HVP_LEASE_S", "1")
    monkeypatch.setenv("HVP_MAX_ATTEMPTS", "1000")
    ports = postgres_server.free_ports(2)
    with contextlib.ExitStack() as stack:
        started = []
        for port in ports:
            started.append(Process(tmp_path / "state", port))
            stack.callback(started[-1].kill)
        yield started


@pytest.mark.slow
def test_no_job_is_lost_or_done_twice_however_often_servers_are_killed(
    pair: list[Process], tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    save_file(quadratic(8), folder / "model.safetensors")
    (folder / "config.json").write_bytes(CONFIG)
    chance = random.Random(int(os.environ.get("HVP_TEST_SEED", "0")))
    ids = np.arange(8, dtype=np.int64).reshape(2, 4)
    names: list[str] = []
    with Client(pair[0].address) as one, Client(pair[1].address) as other:
        clients = [one, other]
        model, batch = one.upload_checkpoint(folder), one.upload_batch({"input_ids": ids})
        for kill in range(NUM_KILLS):
            for _ in range(NUM_JOBS // NUM_KILLS + 1):
                asked = chance.choice(clients).operator(model, batch, dtype="float64")
                names.append(asked.eigsh(k=2, which="BE", seed=len(names)).name)
            time.sleep(chance.uniform(0.0, 1.0))
            killed = pair[kill % 2]
            killed.kill()
            killed.start()
        assert len(set(names)) == len(names) >= NUM_JOBS
        interrupted = 0
        for name in names:
            job = other.job(name)
            result = job.result(120)
            np.testing.assert_allclose(result.eigenvalues, [1.0, 8.0], rtol=1e-9)
            events = list(job.watch())
            assert [event.sequence for event in events] == list(range(1, len(events) + 1))
            states = [event.state for event in events if event.type == "state"]
            assert states.count("SUCCEEDED") == 1
            assert states[-1] == "SUCCEEDED"
            runs = [event.attempt for event in events if event.state == "RUNNING"]
            assert runs == sorted(set(runs))
            interrupted += len(runs) > 1
            # The vectors are this attempt's, whole and readable at the other server.
            for vector, value in zip(result.eigenvectors, (1.0, 8.0), strict=True):
                assert vector.name.split("/")[-1].split("-")[-2] == str(runs[-1])
                product = one.operator(model, batch, dtype="float64") @ one.vector(vector.name)
                rest = product.numpy() - value * vector.numpy()
                assert np.linalg.norm(rest) < 1e-9
        assert interrupted > 0
