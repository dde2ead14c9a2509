"""The `hvp` command, as people type it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from hvp_client import Client, Event, Progress
from hvp_client.cli.display import plain_line
from hvp_operations.eigsh import EigshProgress
from numpy.typing import NDArray
from safetensors.numpy import save_file

from tests.client.conftest import HVP, Server, save_llama


def hvp(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(HVP), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={"PATH": "/usr/bin:/bin", "COLUMNS": "200"}
        | {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}  # the tree under test
        | environment,
    )


@pytest.fixture(scope="module")
def batch_file(tmp_path_factory: pytest.TempPathFactory, input_ids: NDArray[np.int64]) -> Path:
    path = tmp_path_factory.mktemp("batch") / "ids.safetensors"
    save_file({"input_ids": input_ids}, path)
    return path


def test_help_lists_every_command() -> None:
    done = hvp("--help")
    assert done.returncode == 0
    for command in (
        "serve",
        "upload",
        "eigsh",
        "jobs",
        "watch",
        "cancel",
        "delete",
        "doctor",
        "demo",
    ):
        assert f" {command} " in done.stdout


def test_no_server_is_one_line_on_stderr_and_exit_code_1() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    done = hvp("jobs", "--address", address)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("SERVER_UNREACHABLE: no server answers at")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["absent.npz", "ids.txt", "broken.npz", "broken.safetensors"])
def test_a_file_that_is_no_batch_is_a_usage_error(tmp_path: Path, name: str) -> None:
    if not name.startswith("absent"):
        (tmp_path / name).write_text("1 2 3")
    done = hvp("eigsh", "--checkpoint", "projects/default/checkpoints/x", "--ids", tmp_path / name)
    assert done.returncode == 2
    assert name in done.stderr
    assert "Traceback" not in done.stderr


def test_serve_refuses_anything_but_the_loopback_and_says_why(tmp_path: Path) -> None:
    done = hvp(
        "serve", "--address", "0.0.0.0:0", "--state-dir", tmp_path / "s", "--backend", "inprocess"
    )
    assert done.returncode == 2
    assert "TLS" in done.stderr


def test_serve_takes_every_setting_as_a_flag() -> None:
    done = hvp("serve", "--print-config", "--max-queued-jobs", "7")
    assert "max_queued_jobs = 7 " in done.stdout
    done = hvp("serve", "--max-queued-job", "7")
    assert done.returncode == 2
    assert "the nearest is --max-queued-jobs" in done.stderr


def test_a_spectrum_from_the_command_line(
    server: Server, llama_dir: Path, batch_file: Path, tmp_path: Path
) -> None:
    address = ("--address", server.address)
    uploaded = hvp("upload", llama_dir, *address)
    assert uploaded.returncode == 0, uploaded.stderr
    checkpoint = uploaded.stdout.strip()
    assert checkpoint.startswith("projects/default/checkpoints/")
    output = tmp_path / "result.json"
    what = ("--checkpoint", checkpoint, "--ids", batch_file, "-k", "2", "--which", "LA")
    narrow = {"COLUMNS": "40"}
    done = hvp("eigsh", *what, "--dtype", "float64", "--output", output, *address, **narrow)
    assert done.returncode == 0, done.stderr
    assert "RUNNING attempt 1" in done.stderr
    assert "products" in done.stderr
    result = json.loads(output.read_text())
    assert f"{result['eigenvalues'][1]:.8g}" in done.stdout
    assert result["outcome"] == "CONVERGED"
    lines = done.stdout.splitlines()  # nothing is wrapped or cut, though a pipe has few columns
    assert any(line.startswith(f"eigenvectors: {result['eigenvectors'][0]} to ") for line in lines)
    assert any("each of these 2 is the eigenvalue of its place, to " in line for line in lines)
    assert any("residual ‖Hy - λy‖" in line and "± (certified)" in line for line in lines)
    plan = hvp("eigsh", *what, "--plan", *address, **narrow)
    assert "…" not in done.stdout + plan.stdout

    again = hvp("watch", result["job"].rpartition("/")[2], "--format", "json", *address)
    assert json.loads(again.stdout) == result
    listed = json.loads(hvp("jobs", "--state", "SUCCEEDED", "--format", "json", *address).stdout)
    assert result["job"] in [job["name"] for job in listed]
    table = hvp("jobs", *address, **narrow).stdout
    assert result["job"].rpartition("/")[2] in table  # whole, though a pipe has 80 columns
    assert "…" not in table
    lines = [line.rstrip() for line in table.splitlines()]  # others may have longer rows
    assert any(line.endswith(" eigsh LA k=2 of hessian float64") for line in lines)


def test_a_job_may_be_left_alone_and_cancelled(
    server: Server, llama_dir: Path, input_ids: NDArray[np.int64], tmp_path: Path
) -> None:
    path = tmp_path / "ids.npz"
    np.savez(path, input_ids=input_ids)
    what = ("--checkpoint", llama_dir, "--ids", path, "-k", "40", "--which", "BE")
    address = ("--address", server.address)
    queued = hvp("eigsh", *what, "--no-watch", *address)
    assert queued.returncode == 0, queued.stderr
    job = queued.stdout.strip()
    assert hvp("cancel", job, *address).stdout.strip() in ("CANCELLING", "CANCELLED")
    watched = hvp("watch", job, *address)
    assert watched.returncode == 1
    assert "JOB_CANCELLED" in watched.stderr


def test_what_was_uploaded_is_deleted_by_name(server: Server, tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "model", vocab_size=23, hidden_size=8)
    address = ("--address", server.address)
    checkpoint = hvp("upload", folder, *address).stdout.strip()
    with Client(server.address) as client:
        before = {blob.name for blob in client.blobs()}
        done = hvp("delete", checkpoint, *address)
        assert done.returncode == 0, done.stderr
        assert len(before - {blob.name for blob in client.blobs()}) == 2
    again = hvp("delete", checkpoint, *address)
    assert again.returncode == 1
    assert "RESOURCE_NOT_FOUND" in again.stderr
    senseless = hvp("delete", "model", *address)
    assert senseless.returncode == 2
    assert "dataBatches" in senseless.stderr


def test_ctrl_c_leaves_the_job_running_and_says_how_to_come_back(
    server: Server, llama_dir: Path, batch_file: Path
) -> None:
    what = ("--checkpoint", llama_dir, "--ids", batch_file, "-k", "40", "--which", "BE")
    with subprocess.Popen(
        [str(HVP), "eigsh", *map(str, what), "--address", server.address],
        stderr=subprocess.PIPE,
        text=True,
        # A suite that runs in the background of a shell has been told to ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stderr is not None
        while "RUNNING" not in process.stderr.readline():
            pass
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
        assert process.wait(timeout=60) == 130, said
    found = re.search(r"hvp watch (projects/default/jobs/\w+)", said)
    assert found, said
    assert "Traceback" not in said
    with Client(server.address) as client:
        job = client.job(found[1])
        assert job.state in ("QUEUED", "RUNNING", "SUCCEEDED"), said
        job.cancel()


def test_the_doctor_finds_the_server_or_the_lack_of_it(server: Server, tmp_path: Path) -> None:
    well = hvp("doctor", "--address", server.address, "--state-dir", tmp_path)
    assert f"at {server.address}: 1 rank READY" in well.stdout
    with socket.create_server(("127.0.0.1", 0)) as listener:
        nobody = f"127.0.0.1:{listener.getsockname()[1]}"
    temporary = tmp_path / "t\u00e9mp"
    temporary.mkdir()
    ill = hvp(
        *("doctor", "--address", nobody, "--state-dir", tmp_path, "--format", "json"),
        TMPDIR=str(temporary),
    )
    assert ill.returncode == 1
    findings = {finding["what"]: finding for finding in json.loads(ill.stdout)}
    assert findings["server"]["verdict"] == "problem"
    assert "hvp serve" in findings["server"]["fix"]
    assert str(temporary) in findings["temporary folder"]["found"]
    assert "TMPDIR" in findings["temporary folder"]["fix"]
    far = hvp("doctor", "--address", "example.org:8471", "--state-dir", tmp_path)
    assert far.returncode == 1
    assert "ssh -L" in far.stdout


def test_a_doctor_in_a_deleted_folder_names_it(tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    program = "import os; os.rmdir(os.getcwd()); from hvp_client.cli.main import app; app()"
    done = subprocess.run(
        [sys.executable, "-c", program, "doctor"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert f"current folder: {folder} has been deleted" in done.stdout


def test_another_machine_is_refused_because_nothing_is_encrypted() -> None:
    done = hvp("jobs", "--address", "10.1.2.3:8471")
    assert done.returncode == 1
    assert "CLEARTEXT_REFUSED" in done.stderr
    assert "ssh -L" in done.stderr


def test_a_doctor_does_not_spend_seconds_on_importing_torch_where_it_tells_nothing() -> None:
    program = (
        "import sys; from pathlib import Path; from hvp_client.cli.doctor import examine;"
        "examine(None, '127.0.0.1:9', state_dir=Path(), as_json=True);"
        "print('torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stderr.split()[-1] == "False"
    (devices,) = [one for one in json.loads(done.stdout) if one["what"] == "devices"]
    assert devices["found"] == "CPU only (torch without CUDA)"


def test_of_thousands_of_pairs_a_line_shows_those_furthest_from_done() -> None:
    detail = EigshProgress(
        ritz_values=tuple(range(64)), residual_estimates=(*(1e-3,) * 60, 0.5, *(1e-3,) * 3)
    )
    progress = Progress(
        stage="iterating", num_products=9, max_products=99, seconds_per_product=0.1, detail=detail
    )
    event = Event(type="progress", sequence=1, time=datetime.now(UTC), progress=progress)
    line = plain_line(event)
    assert "Ritz value 60, residual estimate 5.0e-01;" in line
    assert line.endswith("and 56 more")
    assert len(line) < 500


def test_no_jobs_are_said_to_be_none(server: Server) -> None:
    done = hvp("jobs", "--state", "FAILED", "--address", server.address)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "no jobs FAILED\n")
