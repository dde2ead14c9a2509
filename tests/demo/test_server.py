"""The demo's own server: started, stopped, and honest when it cannot start."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from hvp_client import Client
from hvp_demo.server import ServerFailedError, running_server


@pytest.mark.slow
@pytest.mark.ray
def test_a_server_serves_inside_the_block_and_is_gone_after_it(tmp_path: Path) -> None:
    with (
        running_server(tmp_path, num_workers=2, device="cpu") as address,
        Client(address) as client,
    ):
        (group,) = client.worker_groups()
        assert len(group.ranks) == 2
    host, port = address.rsplit(":", 1)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)))
    assert [path.name for path in tmp_path.iterdir()] == ["server.log"]


def test_a_server_that_cannot_start_is_reported_with_its_log(tmp_path: Path) -> None:
    with (
        pytest.raises(ServerFailedError, match="workers"),
        running_server(tmp_path, num_workers=0, device="cpu"),
    ):
        pytest.fail("there is no server to use")
    assert [path.name for path in tmp_path.iterdir()] == ["server.log"]
