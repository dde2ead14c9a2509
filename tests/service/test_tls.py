"""Certificates of a server: whatever could never let anybody in, or lets in all, is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trustme
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
)
from hvp_service.app.config import ServerConfig
from hvp_service.app.tls import TlsError, read_certificates
from pydantic import ValidationError

from tests.modules.certificates import YESTERDAY, Files


@pytest.fixture(name="files")
def _files(tmp_path: Path) -> Files:
    return Files(tmp_path, trustme.CA(), trustme.CA())


def config(certificate: Path, key: Path, **more: Any) -> ServerConfig:
    return ServerConfig(tls_certificate=certificate, tls_key=key, **more)


def test_a_server_has_its_chain_its_key_and_whom_it_lets_in(files: Files) -> None:
    assert read_certificates(ServerConfig()) is None
    chain, key = files.of(files.ours, "server.example")
    found = read_certificates(config(chain, key))
    assert found is not None
    assert (found.chain, found.key) == (chain.read_bytes(), key.read_bytes())
    assert found.client_authorities is None
    assert "PRIVATE" not in repr(found)
    closed = read_certificates(config(chain, key, tls_client_ca=files.authority(files.ours)))
    assert closed is not None
    assert closed.client_authorities == files.ours.cert_pem.bytes()


@pytest.mark.parametrize(
    "case", ["mismatch", "expired", "no certificate", "no key", "passphrase", "nowhere", "no CA"]
)
def test_files_that_do_not_do_are_refused_with_their_names(case: str, files: Files) -> None:
    chain, key = files.of(files.ours, "server.example")
    locked = files.folder / "locked.key"
    locked.write_bytes(
        ec.generate_private_key(ec.SECP256R1()).private_bytes(
            Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret")
        )
    )
    nowhere = files.folder / "nowhere.pem"
    given, words = {
        "mismatch": (config(chain, files.of(files.ours, "other.example")[1]), "is not the key of"),
        "expired": (
            config(*files.of(files.ours, "server.example", valid_until=YESTERDAY)),
            "renew it",
        ),
        "no certificate": (config(key, key), f"{key} holds no certificate"),
        "no key": (config(chain, chain), f"{chain} holds no private key"),
        "passphrase": (config(chain, locked), f"{locked} holds no private key"),
        "nowhere": (config(nowhere, key), f"{nowhere} cannot be read"),
        "no CA": (config(chain, key, tls_client_ca=key), f"{key} holds no certificate"),
    }[case]
    with pytest.raises(TlsError) as refusal:
        read_certificates(given)
    assert words in str(refusal.value)


def test_a_server_for_other_machines_needs_its_files_together(files: Files) -> None:
    chain, key = files.of(files.ours, "server.example")
    ca = files.authority(files.ours)
    ServerConfig(
        address="192.0.2.7:1", tls_certificate=chain, tls_key=key, tls_client_ca=ca
    )  # is let
    cases: list[tuple[dict[str, Any], str]] = [
        ({"address": "192.0.2.7:1"}, "without TLS"),
        ({"tls_certificate": chain}, "tls_key is missing"),
        ({"tls_key": key}, "tls_certificate is missing"),
        ({"tls_client_ca": ca}, "needs a server's certificate"),
    ]
    for given, words in cases:
        with pytest.raises(ValidationError, match=words):
            ServerConfig(**given)
