"""Encrypted connections: who is let in, who is believed, and what does not start at all."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import trustme
from hvp_client import Client, HvpError, InvalidArgumentError, Retry, Tls

from tests.client.conftest import HVP, Server, save_llama
from tests.modules.certificates import YESTERDAY, Files

HURRIED = Retry(patience_s=0.5, contact_s=0.5)


@pytest.fixture(name="files", scope="module")
def _files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("certificates"), trustme.CA(), trustme.CA())


@pytest.fixture(name="guarded", scope="module")
def _guarded(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that listens on every address of this machine, to clients of its authority alone."""
    chain, key = files.of(files.ours, "server.example")
    server = Server.start(
        tmp_path_factory.mktemp("guarded") / "state",
        "0.0.0.0:0",
        arguments=[
            f"--tls-certificate={chain}",
            f"--tls-key={key}",
            f"--tls-client-ca={files.authority(files.ours)}",
        ],
    )
    yield Server(server.process, f"127.0.0.1:{server.address.rpartition(':')[2]}")
    assert server.stop() == 0


def test_a_client_of_the_authority_uploads_multiplies_and_runs_a_job_over_tls(
    guarded: Server, files: Files, tmp_path: Path
) -> None:
    folder = save_llama(tmp_path / "llama", vocab_size=11, hidden_size=8)
    with Client(guarded.address, tls=files.client(files.ours, files.ours)) as client:
        checkpoint = client.upload_checkpoint(folder)
        batch = client.upload_batch({"input_ids": np.arange(10).reshape(2, 5)})
        H = client.operator(checkpoint, batch, dtype="float64")
        v = np.ones(H.shape[0])
        assert (H @ v).shape == v.shape
        assert H.eigsh(k=1, max_products=30).result().eigenvalues.shape == (1,)


def test_a_name_of_the_certificate_stands_for_the_host(guarded: Server, files: Files) -> None:
    tls = files.client(files.ours, files.ours)
    port = guarded.address.rpartition(":")[2]
    named = Tls(ca=tls.ca, certificate=tls.certificate, key=tls.key, server_name="server.example")
    with Client(f"https://127.0.0.1:{port}/", tls=named) as client:
        assert client.server_info().version
    wrong = Tls(ca=tls.ca, certificate=tls.certificate, key=tls.key, server_name="else.example")
    with Client(guarded.address, tls=wrong, retry=HURRIED) as client, pytest.raises(HvpError):
        client.server_info()


@pytest.mark.parametrize(
    "case", ["clear text", "no certificate", "stranger", "expired", "impostor"]
)
def test_whoever_is_not_of_the_authority_is_not_let_in_nor_believed(
    case: str, guarded: Server, files: Files
) -> None:
    tls = {
        "clear text": None,
        "no certificate": Tls(ca=files.authority(files.ours)),
        "stranger": files.client(files.other, files.ours),
        "expired": files.client(files.ours, files.ours, valid_until=YESTERDAY),
        "impostor": files.client(files.ours, files.other),  # the server is, to this client
    }[case]
    with (
        Client(guarded.address, tls=tls, retry=HURRIED) as client,
        pytest.raises(HvpError) as refusal,
    ):
        client.server_info()
    assert refusal.value.reason == "SERVER_UNREACHABLE"


def test_the_command_takes_certificates_from_the_environment(guarded: Server, files: Files) -> None:
    tls = files.client(files.ours, files.ours)
    named = {"HVP_CA": tls.ca, "HVP_CLIENT_CERTIFICATE": tls.certificate, "HVP_CLIENT_KEY": tls.key}
    done = subprocess.run(
        [HVP, "jobs", "--address", guarded.address],
        env=os.environ | {name: str(path) for name, path in named.items()},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_files_that_do_not_do_are_named(files: Files, tmp_path: Path) -> None:
    chain, key = files.of(files.ours, "someone.example")
    empty, torn = tmp_path / "empty.pem", tmp_path / "torn.pem"
    empty.touch()
    torn.write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    cases = [
        ("tls.ca", Tls(ca=tmp_path / "nowhere.pem")),
        ("tls.ca", Tls(ca=torn)),
        ("tls.certificate", Tls(certificate=empty, key=key)),
        ("tls.key", Tls(certificate=chain)),
        ("tls.key", Tls(certificate=chain, key=files.of(files.ours, "other.example")[1])),
    ]
    for field, tls in cases:
        with pytest.raises(InvalidArgumentError) as refusal:
            Client("example.org:8471", tls=tls)
        assert (refusal.value.reason, refusal.value.field) == ("TLS_FILES_INVALID", field)


def test_a_server_with_another_certificates_key_says_so_and_does_not_start(
    files: Files, tmp_path: Path
) -> None:
    (chain, _), (_, key) = (files.of(files.ours, "server.example") for _ in range(2))
    done = subprocess.run(
        [
            *(HVP, "serve", "--address=127.0.0.1:0", f"--state-dir={tmp_path / 'state'}"),
            *(f"--tls-certificate={chain}", f"--tls-key={key}"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "is not the key of" in done.stderr
    assert not (tmp_path / "state").exists()
