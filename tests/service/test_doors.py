"""What others on the machine can reach of a running server and its Ray: nothing."""

from __future__ import annotations

import ipaddress
import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from hvp_client import Client
from hvp_service.storage.state_dir import StateDirectoryForeignError, sole_use

from tests.client.conftest import save_llama

SECRETS = {"AWS_SECRET_ACCESS_KEY": "of an account", "HF_TOKEN": "of another"}
# By which Ray would listen on every interface.
OPEN_RAY = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1"}


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def open_to_others(root: Path) -> list[str]:
    paths = [root, *root.rglob("*")]
    return [
        f"{path} {mode_of(path):o}"
        for path in paths
        if not path.is_symlink() and mode_of(path) & 0o077
    ]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[psutil.Process, str]]:
    """A server with two ranks, started in the most careless way."""
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "hvp_service.app.server", "--address", "127.0.0.1:0"),
            *("--state-dir", str(tmp_path / "state"), "--workers", "2"),
        ],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | SECRETS | OPEN_RAY,
        umask=0o000,
    )
    assert process.stdout is not None
    yield psutil.Process(process.pid), process.stdout.readline().strip()
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 0
    process.stdout.close()


@pytest.mark.slow
@pytest.mark.ray
def test_nothing_of_a_running_server_is_open_to_others(
    server: tuple[psutil.Process, str], tmp_path: Path
) -> None:
    process, line = server
    address = line.removeprefix("serving on ")
    model = save_llama(tmp_path / "model", vocab_size=19, hidden_size=8)
    ids = np.random.default_rng(0).integers(0, 19, (2, 6))
    with Client(address) as client:
        hessian = client.operator(
            client.upload_checkpoint(model), client.upload_batch({"input_ids": ids})
        )
        assert np.isfinite(hessian @ np.ones(hessian.shape[0], np.float32)).all()
        ranks = {rank.pid for group in client.worker_groups() for rank in group.ranks}
    others = process.children(recursive=True)

    listening = [
        (member.name(), connection.laddr.ip)
        for member in (process, *others)
        for connection in member.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN or not connection.raddr
    ]
    assert len(listening) > 5  # the server's own, Ray's and the ranks'
    for name, host in listening:
        found = ipaddress.ip_address(host)
        mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
        assert (mapped or found).is_loopback, name

    assert {member.pid for member in others} > ranks
    for member in others:
        assert not SECRETS.keys() & member.environ().keys(), member.name()
    for pid in ranks:
        environment = psutil.Process(pid).environ()
        assert environment["HF_HUB_OFFLINE"] == environment["TRANSFORMERS_OFFLINE"] == "1"
        assert "Umask:\t0077" in Path(f"/proc/{pid}/status").read_text()

    assert open_to_others(tmp_path / "state") == []
    (note,) = (tmp_path / "state" / "run").glob("ray-*.json")
    temp_dir = Path(json.loads(note.read_text())["temp_dir"])
    assert temp_dir.parent == Path(tempfile.gettempdir())
    assert mode_of(temp_dir) == 0o700


def test_what_an_earlier_version_left_open_is_closed_at_the_start(tmp_path: Path) -> None:
    root = tmp_path / "state"
    (root / "compile-cache" / "inductor").mkdir(parents=True)
    outside = tmp_path / "outside"
    kernel = root / "compile-cache" / "inductor" / "kernel.so"
    for file, mode in ((kernel, 0o755), (root / "hvp.sqlite3", 0o644), (outside, 0o644)):
        file.touch()
        file.chmod(mode)  # whatever this process's umask is
    (root / "link").symlink_to(outside)
    for folder in (root, root / "compile-cache", root / "compile-cache" / "inductor"):
        folder.chmod(0o755)

    with sole_use(root):
        assert open_to_others(root) == []

    assert mode_of(kernel) == 0o700
    assert mode_of(outside) == 0o644


def test_a_state_folder_of_another_user_is_refused_and_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    user = tmp_path.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    with pytest.raises(StateDirectoryForeignError, match="chown") as refusal, sole_use(tmp_path):
        pass
    assert str(tmp_path) in str(refusal.value)
