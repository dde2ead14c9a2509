"""What keeps a server from starting, or will: found before it is started, with what to do."""

from __future__ import annotations

import datetime
import os
import socket
import sqlite3
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import trustme
from hvp_client.cli.doctor_server import clock, examine_server, settings_of
from hvp_client.cli.findings import Finding
from hvp_service.app.config import ServerConfig
from hvp_service.storage.database import open_database
from pydantic import SecretStr


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment without settings of this machine's own."""
    for name in [name for name in os.environ if name.startswith(("HVP_", "RAY_"))]:
        monkeypatch.delenv(name)


def problems(findings: Sequence[Finding]) -> dict[str, str]:
    return {each.what: each.found for each in findings if each.verdict == "problem"}


def examined(state: Path, answering: str = "", **settings: Any) -> dict[str, Finding]:
    config = ServerConfig.model_validate({"address": "127.0.0.1:0", "state_dir": state, **settings})
    return {each.what: each for each in examine_server(config, state, answering)}


def test_each_problem_of_the_settings_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "hvp.toml"
    file.write_text("workers = 3")
    config, findings = settings_of(file)
    assert config is not None
    assert config.workers == 3
    assert f"workers ({file})" in findings[0].found
    file.write_text("workers = 'three'")
    monkeypatch.setenv("HVP_WORKER", "2")
    config, findings = settings_of(file)
    assert config is None
    assert [each.verdict for each in findings] == ["problem"] * 2
    assert any("the nearest is HVP_WORKERS" in each.found for each in findings)


def test_the_address_that_clients_call_is_not_taken_for_this_machines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HVP_ADDRESS", "gpu-box.example.org:8471")
    config, findings = settings_of(None)
    assert config is not None
    assert not problems(findings)


def test_a_port_that_another_program_has_is_a_problem_and_the_servers_own_is_none(
    tmp_path: Path,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        for name in ("address", "metrics_address"):
            found = examined(tmp_path, **{name: address})["ports"]
            assert (found.verdict, name in found.fix) == ("problem", True)
        assert "ports" not in examined(tmp_path, answering=address, address=address)


@pytest.mark.parametrize(("days", "verdict"), [(300, "ok"), (10, "note"), (-1, "problem")])
def test_a_certificate_is_looked_at_before_it_expires(
    tmp_path: Path, days: float, verdict: str
) -> None:
    authority = trustme.CA()
    end = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days, hours=1)
    issued = authority.issue_cert("127.0.0.1", not_after=end)
    paths = {"tls_certificate": tmp_path / "a.pem", "tls_key": tmp_path / "a.key"}
    issued.cert_chain_pems[0].write_to_path(str(paths["tls_certificate"]))
    issued.private_key_pem.write_to_path(str(paths["tls_key"]))
    found = examined(tmp_path / "state", "", **paths)["certificates"]
    assert found.verdict == verdict
    assert f"{end:%Y-%m-%d}" in found.found


def test_a_certificate_and_a_key_that_do_not_match_are_a_problem(tmp_path: Path) -> None:
    authority = trustme.CA()
    for name in "ab":
        issued = authority.issue_cert("127.0.0.1")
        issued.cert_chain_pems[0].write_to_path(str(tmp_path / f"{name}.pem"))
        issued.private_key_pem.write_to_path(str(tmp_path / f"{name}.key"))
    found = examined(
        tmp_path / "state", tls_certificate=tmp_path / "a.pem", tls_key=tmp_path / "b.key"
    )["certificates"]
    assert (found.verdict, "is not the key of" in found.found) == ("problem", True)


def test_a_database_elsewhere_that_is_not_there_is_a_problem(tmp_path: Path) -> None:
    url = SecretStr("postgresql://me:secret@127.0.0.1:1/hvp")
    found = examined(tmp_path, database_url=url)["database"]
    assert (found.verdict, "127.0.0.1:1" in found.found) == ("problem", True)
    assert "secret" not in str(found)


async def test_a_database_is_whole_or_the_problem_is_named(tmp_path: Path) -> None:
    assert "database" not in examined(tmp_path)
    path = tmp_path / "hvp.sqlite3"
    await (await open_database(path)).close()
    assert examined(tmp_path)["database"].verdict == "ok"
    with sqlite3.connect(path) as rows:
        rows.execute("UPDATE alembic_version SET version_num = '9999'")
    rows.close()
    assert "9999" in problems([examined(tmp_path)["database"]])["database"]
    path.write_bytes(b"no database at all" * 100)
    assert "cannot be read" in problems([examined(tmp_path)["database"]])["database"]


def test_a_cluster_that_does_not_answer_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert examined(tmp_path)["Ray"].verdict == "ok"
    found = examined(tmp_path)["Ray"]
    assert (found.verdict, address in found.found) == ("problem", True)
    monkeypatch.setenv("RAY_ADDRESS", "ray://127.0.0.1:10001")
    assert "Ray Client" in problems([examined(tmp_path)["Ray"]])["Ray"]
    assert "Ray" not in examined(tmp_path, backend="inprocess", workers=1)


def test_a_clock_that_was_set_back_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "hvp.sqlite3").touch()
    assert not problems(list(clock(tmp_path)))
    assert "after now" in problems(list(clock(tmp_path, now=time.time() - 3600)))["clock"]


def test_a_gpu_that_is_asked_for_and_not_there_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hvp_workers import surroundings

    monkeypatch.setattr(surroundings, "has_gpu_driver", lambda: False)
    assert examined(tmp_path, device="cuda")["devices"].verdict == "problem"
    assert "devices" not in examined(tmp_path)
