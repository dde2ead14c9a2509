"""Servers without containers: the unit for systemd, and the script for Slurm."""

from __future__ import annotations

import os
import re
import secrets
import shlex
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import psutil
import pytest

from tests.deploy.settings import server_config

ROOT = Path(__file__).parent.parent.parent
DEPLOY = ROOT / "deploy"
BIN = Path(sys.executable).parent
LATEST_S = 20  # how much longer than its grace a server may take to end


def read_unit(*paths: Path) -> dict[str, list[str]]:
    """Values of all keys of a unit's section [Service]; an empty one takes back those before."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        section = ""
        for line in path.read_text().splitlines():
            if line.startswith("["):
                section = line
            elif line and not line.startswith("#") and section == "[Service]":
                key, _, value = line.partition("=")
                if value or key in ("CapabilityBoundingSet", "AmbientCapabilities"):
                    found[key].append(value)
                else:
                    found[key].clear()
    return found


@pytest.mark.parametrize("drop_in", [None, "cuda.conf"])
def test_the_unit_starts_a_server_that_ends_in_time(drop_in: str | None) -> None:
    folder = DEPLOY / "systemd"
    unit = read_unit(folder / "hvp.service", *([folder / drop_in] if drop_in else []))
    [command] = unit["ExecStart"]
    program, serve, *arguments = shlex.split(command)
    assert (Path(program).name, serve) == ("hvp", "serve")
    environment = dict(
        part.split("=", 1) for value in unit["Environment"] for part in shlex.split(value)
    )
    config = server_config(arguments, environment)
    assert config.device == ("cuda" if drop_in else "cpu")
    assert config.credentials_required
    assert unit["KillMode"] == ["mixed"]  # ranks are the server's to end
    assert float(unit["TimeoutStopSec"][0]) >= config.grace_s + LATEST_S
    assert str(config.state_dir).startswith(f"/var/lib/{unit['StateDirectory'][0]}/")
    credentials = [value.partition(":")[0] for value in unit["LoadCredential"]]
    assert {str(config.tls_certificate), str(config.tls_key)} == {
        f"%d/{each}" for each in credentials
    }
    assert unit["User"] != ["root"]
    for key in ("NoNewPrivileges", "ProtectHome", "PrivateTmp", "ProtectKernelModules"):
        assert unit[key] == ["yes"]
    assert unit["ProtectSystem"] == ["strict"]
    assert unit["CapabilityBoundingSet"] == [""]
    assert unit["UMask"] == ["0077"]
    assert unit["OOMPolicy"] == ["continue"]  # the server starts its ranks anew by itself
    if drop_in:
        assert unit["PrivateDevices"][-1] == "no"
        assert all("nvidia" in each for each in unit["DeviceAllow"])
    else:
        assert unit["PrivateDevices"] == ["yes"]


@pytest.mark.parametrize("script", ["slurm/hvp.sbatch", "docker/hvp-node", "docker/hvp-server"])
def test_every_script_passes_its_shell_and_the_linter(script: str) -> None:
    path = DEPLOY / script
    shell = path.read_text().partition("\n")[0].removeprefix("#!")
    assert subprocess.run([shell, "-n", path]).returncode == 0
    answer = subprocess.run([BIN / "shellcheck", path], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout


def test_the_batch_script_leaves_the_server_time_to_end() -> None:
    text = (DEPLOY / "slurm" / "hvp.sbatch").read_text()
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)", text, re.MULTILINE))
    warned = re.fullmatch(r"B:TERM@(\d+)", options["signal"])
    grace = re.search(r"--grace-s (\d+)", text)
    assert warned
    assert grace
    assert int(warned[1]) >= int(grace[1]) + LATEST_S


def test_the_batch_script_refuses_nodes_that_have_nothing_to_compute_on(tmp_path: Path) -> None:
    answer = subprocess.run(
        ["bash", DEPLOY / "slurm" / "hvp.sbatch"],
        env={"PATH": os.environ["PATH"], "SLURM_SUBMIT_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 2
    assert "WORKERS_PER_NODE" in answer.stderr


SRUN = """#!/bin/sh
# Slurm's, as far as the script needs it: what follows the options runs on "another node", this one.
while [ "${1#--}" != "$1" ]; do shift; done
exec "$@"
"""


@pytest.mark.slow
@pytest.mark.ray
def test_the_batch_script_serves_over_two_nodes_and_leaves_nothing(tmp_path: Path) -> None:
    """Both nodes are this machine; all but srun is what it is on a cluster."""
    (tmp_path / "bin").mkdir()
    srun = tmp_path / "bin" / "srun"
    srun.write_text(SRUN)
    srun.chmod(0o755)
    (tmp_path / "deploy").symlink_to(DEPLOY)
    mark = secrets.token_hex(8)
    log = tmp_path / "log"
    with log.open("w") as output:
        script = subprocess.Popen(
            ["bash", DEPLOY / "slurm" / "hvp.sbatch"],
            env=os.environ
            | {
                "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
                "SLURM_SUBMIT_DIR": str(tmp_path),
                "SLURM_JOB_ID": str(int(mark, 16) % 100_000),
                "SLURM_JOB_NUM_NODES": "2",
                "WORKERS_PER_NODE": "1",
                "OMP_NUM_THREADS": "1",
                "VENV": str(BIN.parent),
                "PORT": "0",
                "NODE_IP": "127.0.0.1",
                "MARK": mark,
            },
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        while "serving on 127.0.0.1:" not in log.read_text():
            assert script.poll() is None, log.read_text()
            time.sleep(0.2)
        assert "ssh -N -L" in log.read_text()
        script.send_signal(signal.SIGTERM)
        assert script.wait(60) == 0, log.read_text()
        left = psutil.wait_procs(marked(mark), timeout=20)[1]
        assert not left
        assert not list(Path("/tmp").glob(f"hvp-{int(mark, 16) % 100_000}.*"))  # noqa: S108
    finally:
        script.kill()
        for process in marked(mark):
            process.kill()
        script.wait()


def marked(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("MARK") == mark:
                found.append(process)
        except psutil.Error:
            continue
    return found
