"""What of a machine is in the way of a server is named, with what to do about it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hvp_workers import surroundings
from hvp_workers.backend import GroupLostError
from hvp_workers.environment import is_passed_on, limited_environment, rank_environment
from hvp_workers.ray_cluster import RayCluster
from hvp_workers.surroundings import obstacles, temp_root, unused_temporary


def open_cluster() -> GroupLostError:
    with pytest.raises(GroupLostError) as refusal:
        RayCluster(num_ranks=1, device="cpu", run_dir=None).open()
    assert refusal.value.reason == "WORKER_GROUP_START_FAILED"
    return refusal.value


def test_an_ordinary_machine_has_nothing_in_the_way() -> None:
    assert obstacles() == []


def test_shared_memory_that_cannot_be_written_to_is_named() -> None:
    (found,) = obstacles(shared_memory=Path("/proc"))  # nobody makes a file there
    assert found.what == "shared memory"
    assert "/proc cannot be written to" in found.problem
    assert "remount,rw" in found.fix


def test_a_temporary_folder_that_cannot_be_written_to_is_named_and_what_to_set() -> None:
    (found,) = obstacles(temporary=Path("/proc"))
    assert "/proc cannot be written to" in found.problem
    assert "TMPDIR" in found.fix


@pytest.mark.parametrize("name", ["t\u00e9mp", "t" * 60])
def test_a_temporary_folder_that_ray_cannot_use_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = tmp_path / name
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    assert temp_root() == Path("/tmp")  # noqa: S108 - a private folder is made in it
    assert obstacles() == []
    assert unused_temporary() == folder


def test_a_current_folder_that_has_been_deleted_is_named_by_the_server(tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    program = (
        "import os, sys; os.rmdir(os.getcwd()); from hvp_service.app.server import main; "
        "sys.exit(main(['--workers', '1', '--backend', 'inprocess', '--address', '127.0.0.1:0']))"
    )
    server = subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert server.returncode == 1
    assert f"The current folder, {folder}, has been deleted." in server.stderr
    assert "Traceback" not in server.stderr


def test_a_cluster_does_not_start_in_a_deleted_folder_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    shutil.rmtree(folder)
    assert str(folder) in open_cluster().message
    assert surroundings.lost_current_folder() is not None


def test_an_address_where_no_cluster_is_is_refused_by_the_name_of_the_variable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # worse than nobody: it takes the call
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        monkeypatch.setattr("hvp_workers.ray_cluster._CONTACT_S", 1.0)
        refusal = open_cluster()
    assert f"RAY_ADDRESS={address}" in refusal.message
    assert "unset it" in refusal.message
    assert refusal.metadata == {"address": address}


def test_keys_of_accounts_do_not_reach_the_ranks_and_what_they_compute_with_does() -> None:
    ours = {
        **{"PATH": "p", "PYTHONPATH": "q", "CUDA_VISIBLE_DEVICES": "0", "LC_ALL": "C"},
        **{"NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "1", "RAY_AUTH_TOKEN": "t", "TMPDIR": "/t"},
    }
    others = {
        **{"AWS_SECRET_ACCESS_KEY": "s", "HF_TOKEN": "s", "OPENAI_API_KEY": "s", "DB_URL": "s"},
        **{"HVP_DATABASE_URL": "s"},
        **{"HVP_API_KEY": "s", "RAY_CLOUD_TOKEN": "s", "PYTHON_SECRET": "s"},
    }
    assert rank_environment(ours | others) == ours | {
        **{"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"},
    }
    assert not any(is_passed_on(name) for name in others)


def test_the_environment_is_as_before_behind_its_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "s")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("HVP_NOTE", raising=False)
    before = dict(os.environ)
    with limited_environment():
        assert "HF_TOKEN" not in os.environ
        assert os.environ["HF_HUB_OFFLINE"] == "1"
        os.environ["HVP_NOTE"] = "left"
    assert dict(os.environ) == before | {"HVP_NOTE": "left"}
    del os.environ["HVP_NOTE"]


def test_gpus_that_are_not_there_are_missed_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(surroundings, "_GPU_DEVICES", ("no-such-device",))
    monkeypatch.setattr(surroundings, "torch_accelerator", lambda: "CUDA 13.0")
    with pytest.raises(GroupLostError, match=r"finds no GPU .* or use --device cpu") as refusal:
        RayCluster(num_ranks=1, device="cuda", run_dir=None).open()
    assert refusal.value.reason == "WORKER_GROUP_START_FAILED"


def test_a_torch_for_cpus_is_told_without_importing_it() -> None:
    program = (
        "import sys; from hvp_workers import surroundings;"
        "print(surroundings.torch_accelerator() or 'none', 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    import torch

    told, imported = done.stdout.rsplit(maxsplit=1)
    assert imported == "False"
    assert told == (f"CUDA {torch.version.cuda}" if torch.version.cuda else "none")
