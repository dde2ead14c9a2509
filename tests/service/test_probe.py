"""The probe of containers: it believes the server's own certificate, and nobody else's."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import HealthServicer
from hvp_service.app import probe

from tests.modules.certificates import Files


@pytest.fixture(name="files")
def _files(tmp_path: Path) -> Files:
    return Files(tmp_path, trustme.CA(), trustme.CA())


@pytest.fixture(name="health")
def _health() -> HealthServicer:
    return HealthServicer()


@pytest.fixture(name="server")
def _server(health: HealthServicer) -> Iterator[grpc.Server]:
    server = grpc.server(ThreadPoolExecutor(2))
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    yield server
    server.stop(None).wait()


def test_a_server_serves_or_is_alive_or_is_not_there(
    server: grpc.Server, health: HealthServicer, capsys: pytest.CaptureFixture[str]
) -> None:
    # As a server for other machines has it.
    address = f"0.0.0.0:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    assert probe.main(["--address", address]) == 0
    assert capsys.readouterr().out == "SERVING\n"
    health.set("", health_pb2.HealthCheckResponse.NOT_SERVING)  # as while ranks start anew
    assert probe.main(["--address", address]) == 1
    assert probe.main(["--address", address, "--alive"]) == 0
    server.stop(None).wait()
    assert probe.main(["--address", address, "--alive"]) == 1
    assert address in capsys.readouterr().err


@pytest.mark.parametrize("mutual", [False, True])
def test_the_servers_own_certificate_is_believed_whoever_signed_it(
    server: grpc.Server, files: Files, monkeypatch: pytest.MonkeyPatch, mutual: bool
) -> None:
    chain, key = files.of(files.ours, "gpu-box.example")
    authority = files.authority(files.other).read_bytes() if mutual else None
    credentials = grpc.ssl_server_credentials(
        [(key.read_bytes(), chain.read_bytes())], authority, mutual
    )
    address = f"localhost:{server.add_secure_port('localhost:0', credentials)}"
    server.start()
    given = ["--address", address, "--tls-certificate", str(chain)]
    assert probe.main(given) == int(mutual)
    client, its_key = files.of(files.other, "probe.example")
    monkeypatch.setenv("HVP_CLIENT_CERTIFICATE", str(client))
    monkeypatch.setenv("HVP_CLIENT_KEY", str(its_key))
    assert probe.main(given) == 0
    another, _ = files.of(files.ours, "gpu-box.example")
    assert probe.main([*given[:3], str(another)]) == 1


@pytest.mark.parametrize(
    ("address", "certificate", "words"),
    [
        ("nowhere", None, "an address is HOST:PORT"),
        ("localhost:1", "missing.pem", "No such file"),
        ("localhost:1", "empty.pem", "PEM"),
    ],
)
def test_what_cannot_be_asked_is_said_in_a_line(
    address: str,
    certificate: str | None,
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty.pem").touch()
    given = ["--address", address]
    if certificate is not None:
        given += ["--tls-certificate", str(tmp_path / certificate)]
    assert probe.main(given) == 1
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1
