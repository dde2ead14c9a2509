from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hvp_client._address import DEFAULT_ADDRESS
from hvp_service.app.config import ServerConfig
from hvp_service.app.server import main
from hvp_service.storage.state_dir import StateDirectoryBusyError, sole_use
from pydantic import ValidationError


@pytest.mark.parametrize(
    "address", ["127.0.0.1:0", "localhost:50051", "[::1]:1", "127.9.9.9:65535"]
)
def test_loopback_addresses_are_taken(address: str) -> None:
    assert ServerConfig(address=address).address == address


def test_a_server_listens_where_clients_look_for_it() -> None:
    assert ServerConfig().address == DEFAULT_ADDRESS


@pytest.mark.parametrize(
    "address", ["0.0.0.0:1", "192.168.1.2:1", "[::]:1", "example.org:1", "10.0.0.1:0"]
)
def test_other_hosts_are_refused_with_the_reason(address: str) -> None:
    with pytest.raises(ValidationError, match="without TLS"):
        ServerConfig(address=address)


@pytest.mark.parametrize("address", ["", "127.0.0.1", "127.0.0.1:", "127.0.0.1:x", "::1:5", ":5"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ValidationError):
        ServerConfig(address=address)


def test_the_command_refuses_other_hosts_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--address", "0.0.0.0:0"]) == 2
    assert "without TLS" in capsys.readouterr().err


def test_one_process_has_one_rank_and_the_command_says_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--backend", "inprocess", "--workers", "2", "--address", "127.0.0.1:0"]) == 2
    assert "set workers to 1" in capsys.readouterr().err
    assert ServerConfig(backend="inprocess", workers=1).workers == 1


def test_the_environment_sets_what_arguments_leave_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HVP_WORKERS", "5")
    assert ServerConfig().workers == 5
    assert ServerConfig(workers=3).workers == 3


def test_a_second_user_of_the_state_directory_is_told_the_first_ones_pid(tmp_path: Path) -> None:
    busy = pytest.raises(StateDirectoryBusyError, match=str(os.getpid()))
    with sole_use(tmp_path), busy, sole_use(tmp_path):
        pass
    with sole_use(tmp_path):
        pass


def imported(module: str, suspects: tuple[str, ...]) -> str:
    """Which of the suspects a fresh interpreter imports with a module."""
    script = f"import sys, {module}; print([m for m in {suspects} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_neither_torch_nor_ray_nor_grpc_is_imported_before_the_ranks_are_up() -> None:
    assert imported("hvp_service.app.server", ("torch", "ray", "grpc", "transformers")) == "[]"


def test_the_transport_needs_neither_torch_nor_ray() -> None:
    assert imported("hvp_service.app.transport", ("torch", "ray", "transformers")) == "[]"


def refusal_of(*arguments: str) -> str:
    """What a server says that does not start; in a process of its own, whose logs it sets up."""
    done = subprocess.run(
        [sys.executable, "-m", "hvp_service.app.server", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "Errno" not in done.stderr
    return done.stderr


def test_a_file_in_the_place_of_the_state_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("")
    for folder in (tmp_path / "state", tmp_path / "state" / "below"):
        told = refusal_of("--address", "127.0.0.1:0", "--state-dir", str(folder))
        assert f"the state directory {folder} is a file" in told


@pytest.mark.parametrize("flag", ["--address", "--metrics-address"])
def test_an_address_in_use_is_refused_before_the_ranks_start(tmp_path: Path, flag: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        others = ["--address=127.0.0.1:0"] if flag != "--address" else []
        told = refusal_of(flag, address, *others, "--state-dir", str(tmp_path / "state"))
    assert f"cannot listen on {address}: another program listens there" in told
    assert f"give another {flag}" in told
    assert not (tmp_path / "state").exists()
