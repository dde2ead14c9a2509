"""The programs of the images make a cluster of several nodes, and a server that uses it."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

PROGRAMS = Path(__file__).parent.parent.parent / "deploy" / "docker"
# Of nodes on one machine only one can have the images' own port.
ANY_PORT = "--node-manager-port=0"


@pytest.fixture(name="environment")
def _environment() -> Iterator[dict[str, str]]:
    """Variables of all containers of a cluster; what has them is ended behind the test."""
    token = secrets.token_hex(32)
    path = f"{Path(sys.executable).parent}:{PROGRAMS}:{os.environ['PATH']}"
    yield os.environ | {"PATH": path, "RAY_AUTH_TOKEN": token, "OMP_NUM_THREADS": "1"}
    ours = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("RAY_AUTH_TOKEN") == token:
                process.kill()
                ours.append(process)
        except psutil.Error:
            continue
    assert ours
    psutil.wait_procs(ours, timeout=10)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.slow
@pytest.mark.ray
def test_a_server_joins_a_cluster_as_a_node_that_computes_nothing(
    environment: dict[str, str], tmp_path: Path
) -> None:
    port = free_port()

    def run(*command: str, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            env=environment | more,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=90,
        )

    head = run("hvp-node", "--head", f"--port={port}", "--num-cpus=0", "--num-gpus=0", ANY_PORT)
    assert head.returncode == 0, head.stderr
    address = f"127.0.0.1:{port}"
    node = run("hvp-node", f"--address={address}", "--num-cpus=2", "--num-gpus=0", ANY_PORT)
    assert node.returncode == 0, node.stderr
    stranger = run(
        "ray", "status", f"--address={address}", RAY_AUTH_TOKEN="0" * 64, RAY_AUTH_MODE="token"
    )
    assert stranger.returncode != 0
    served = environment | {"RAY_ADDRESS": address, "RAY_AUTH_MODE": "token"}
    with subprocess.Popen(
        [
            *("hvp-server", "--address", "127.0.0.1:0", "--state-dir", str(tmp_path / "state")),
            *("--workers", "2", "--device", "cpu"),
        ],
        executable=str(PROGRAMS / "hvp-server"),
        env=served,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        try:
            assert server.stdout is not None
            for line in server.stdout:
                if line.startswith("serving on "):
                    break
            else:
                pytest.fail("it did not serve")
            at = line.removeprefix("serving on ").strip()
            probe = run(sys.executable, "-m", "hvp_service.app.probe", "--address", at)
            assert probe.stdout == "SERVING\n", probe.stderr
            # The server's own container is a node, without which a driver has no raylet.
            assert run("hvp-node", "health").returncode == 0
            status = run("ray", "status", f"--address={address}", RAY_AUTH_MODE="token")
            assert status.stdout.count("node_") == 3, status.stdout + status.stderr
            assert "2.0/2.0 CPU" in status.stdout
        finally:
            server.terminate()
        assert server.wait(60) == 0
