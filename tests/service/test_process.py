"""A server process with a real model, and what is left when it is killed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from hvp_client import Client
from safetensors.numpy import save_file

from tests.modules import postgres as postgres_server

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 32,
    "tie_word_embeddings": True,
}


class Server:
    """A server process of this test."""

    def __init__(
        self,
        state_dir: Path,
        *more: str,
        program: Sequence[str] = ("hvp_service.app.server",),
        backend: str = "inprocess",
    ):
        self.log = state_dir.with_suffix(".log")
        with self.log.open("a") as stderr:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", *program),
                    *("--address", "127.0.0.1:0", "--state-dir", str(state_dir)),
                    *("--workers", "1", "--device", "cpu", "--backend", backend, *more),
                ],
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("serving on 127.0.0.1:"), line + self.log.read_text()
        self.address = line.removeprefix("serving on ").strip()

    def end(self, number: signal.Signals) -> int:
        """Send a signal and wait for the end."""
        self.process.send_signal(number)
        status = self.process.wait(60)
        assert self.process.stdout is not None
        assert self.process.stdout.read() == ""  # one line was all
        self.process.stdout.close()
        return status


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Any]:
    started: list[Server] = []

    def start(*more: str, **options: Any) -> Server:
        started.append(Server(tmp_path / "state", *more, **options))
        return started[-1]

    yield start
    for server in started:
        if server.process.poll() is None:
            server.end(signal.SIGKILL)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A tiny Llama with random weights and tied embeddings."""
    generator = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (64, 32),
        "model.norm.weight": (32,),
    }
    for layer in range(2):
        for name, shape in {
            "input_layernorm": (32,),
            "post_attention_layernorm": (32,),
            "self_attn.q_proj": (32, 32),
            "self_attn.k_proj": (16, 32),
            "self_attn.v_proj": (16, 32),
            "self_attn.o_proj": (32, 32),
            "mlp.gate_proj": (48, 32),
            "mlp.up_proj": (48, 32),
            "mlp.down_proj": (32, 48),
        }.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    tensors = {
        name: (0.2 * generator.standard_normal(shape) + (len(shape) == 1)).astype(np.float32)
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["inprocess", pytest.param("ray", marks=pytest.mark.ray)])
def test_a_product_that_outlasts_the_grace_is_ended_and_its_job_waits_uncounted(
    servers: Any, checkpoint: Path, tmp_path: Path, backend: str
) -> None:
    mark = tmp_path / "within a product"
    slow = servers(
        *("--grace-s", "0.5"), program=("tests.service.slow_server", str(mark)), backend=backend
    )
    with Client(slow.address) as client:
        model = client.upload_checkpoint(checkpoint)
        batch = client.upload_batch({"input_ids": np.ones((1, 4), np.int64)})
        client.operator(model, batch).eigsh(k=1, which="LA")
        while not mark.exists():
            assert slow.process.poll() is None
            time.sleep(0.05)
        family = psutil.Process(slow.process.pid).children(recursive=True)
        assert slow.end(signal.SIGTERM) == 0  # the product takes ten minutes
    assert not [child for child in psutil.wait_procs(family, timeout=10)[1] if child.is_running()]
    assert "job left" in slow.log.read_text()
    with contextlib.closing(sqlite3.connect(tmp_path / "state" / "hvp.sqlite3")) as rows:
        found = rows.execute("SELECT state, attempt, lease_owner FROM jobs").fetchall()
    assert found == [("QUEUED", 0, "")]


def test_a_second_server_on_the_state_directory_is_refused_and_the_first_ends_with_zero_when_asked(
    servers: Any, tmp_path: Path
) -> None:
    server = servers()
    other = subprocess.run(
        [
            *(sys.executable, "-m", "hvp_service.app.server"),
            *(
                "--state-dir",
                str(tmp_path / "state"),
                "--workers",
                "1",
                "--backend",
                "inprocess",
                "--address",
                "127.0.0.1:0",
            ),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert other.returncode == 1
    assert f"pid {server.process.pid}" in other.stderr
    assert other.stdout == ""
    assert server.end(signal.SIGINT) == 0


@pytest.mark.slow
def test_the_job_of_a_server_that_is_killed_is_finished_by_another_one_on_the_database(
    servers: Any,
    checkpoint: Path,
    tmp_path: Path,
    postgres: postgres_server.Server,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HVP_DATABASE_URL", asyncio.run(postgres.new_database()))
    monkeypatch.setenv("HVP_LEASE_S", "2")
    mark = tmp_path / "within a product"
    first = servers(program=("tests.service.slow_server", str(mark)))
    with Client(first.address) as client:
        model = client.upload_checkpoint(checkpoint)
        batch = client.upload_batch({"input_ids": np.arange(8, dtype=np.int64).reshape(1, 8)})
        name = client.operator(model, batch, dtype="float64").eigsh(k=1, which="LA").name
        while not mark.exists():
            time.sleep(0.05)
    second = servers()
    with Client(second.address) as client:
        time.sleep(3)  # longer than a lease, which the first one renews in the midst of a product
        assert [job.state for job in client.jobs()] == ["RUNNING"]
        first.end(signal.SIGKILL)
        job = client.job(name)
        found = job.result(60)
        runs = [event.attempt for event in job.watch() if event.state == "RUNNING"]
        assert runs == [1, 2]
        H = client.operator(model, batch, dtype="float64")
        product = H @ found.eigenvectors[0]
        rest = product.numpy() - found.eigenvalues[0] * found.eigenvectors[0].numpy()
        assert np.linalg.norm(rest) < 1e-6 * abs(found.eigenvalues[0])
    assert second.end(signal.SIGTERM) == 0
