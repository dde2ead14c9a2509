"""API keys: a secret is shown once and proven ever after, until it is revoked or has expired."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hvp_protos.v1 import key_pb2
from hvp_service.app.config import ServerConfig
from hvp_service.app.dependencies import Dependencies
from hvp_service.calls.errors import ServiceError
from hvp_service.identity.audit import AuditLog
from hvp_service.identity.authentication import Authenticator
from hvp_service.identity.caller import Identity, called_by
from hvp_service.identity.keys import KeyStore
from hvp_service.identity.local import LocalKeysError, ask
from hvp_service.storage.database import api_keys
from pydantic import ValidationError


@pytest.fixture
def keys(deps: Dependencies) -> KeyStore:
    return deps.keys


async def reason(awaitable: Any) -> str:
    with pytest.raises(ServiceError) as refusal:
        await awaitable
    return refusal.value.reason


async def test_a_key_is_proven_by_its_text_alone_and_the_rows_do_not_hold_it(
    keys: KeyStore, deps: Dependencies
) -> None:
    key, text = await keys.create("vision", "submit", label="ci", ttl_s=60.0)
    assert (await keys.proven(text)).id == key.id
    secret = text.rpartition("_")[2]
    async with deps.database.reading() as connection:
        (row,) = await connection.execute(sa.select(api_keys))
    assert secret not in str(row)
    assert len(bytes.fromhex(secret)) == 32
    assert [each.use_time is not None for each in await keys.list("vision")] == [True]
    assert await keys.list("nlp") == []


@pytest.mark.parametrize("change", ["a digit", "another id", "cut", "no key", "a space", "empty"])
async def test_a_text_that_is_not_a_key_is_not_believed(change: str, keys: KeyStore) -> None:
    _, text = await keys.create("vision", "submit")
    wrong = {
        "a digit": text[:-1] + ("0" if text[-1] != "0" else "1"),
        "another id": text.replace(text.split("_")[2], "0" * 16),
        "cut": text[:-1],
        "no key": "hvp_vision",
        "a space": text + " ",
        "empty": "",
    }[change]
    assert await reason(keys.proven(wrong)) == "CREDENTIALS_INVALID"


async def test_a_revoked_and_an_expired_key_are_refused_with_their_id(
    keys: KeyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, text = await keys.create("vision", "submit")
    _, brief = await keys.create("vision", "submit", ttl_s=1e-6)
    await keys.proven(text)  # it is remembered
    revoked = await keys.revoke(key.name)
    assert (await keys.revoke(key.name)).revoke_time == revoked.revoke_time  # once more is no error
    with pytest.raises(ServiceError, match=key.id) as refusal:
        await keys.proven(text)
    assert refusal.value.reason == "CREDENTIALS_INVALID"
    assert await reason(keys.proven(brief)) == "CREDENTIALS_EXPIRED"


async def test_another_server_on_the_same_rows_learns_of_a_revocation(
    keys: KeyStore, deps: Dependencies, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hvp_service.identity.keys._REMEMBERED_S", 0.0)
    key, text = await keys.create("vision", "submit")
    other = KeyStore(deps.database)
    await other.proven(text)
    await keys.revoke(key.name)
    assert await reason(other.proven(text)) == "CREDENTIALS_INVALID"


@pytest.mark.parametrize(
    "wrong",
    [
        *({"role": "root"}, {"role": ""}, {"label": "x" * 129}, {"label": "a\nb"}),
        *({"ttl_s": ttl_s} for ttl_s in (0.0, -1.0, float("nan"), 1e300)),
    ],
    ids=str,
)
async def test_a_key_that_means_nothing_is_not_made(wrong: dict[str, Any], keys: KeyStore) -> None:
    given = {"role": "read", **wrong}
    assert await reason(keys.create("vision", given.pop("role"), **given)) == "KEY_INVALID"
    assert await keys.list("vision") == []


async def test_credentials_count_also_where_none_are_needed(
    keys: KeyStore, config: ServerConfig
) -> None:
    _, text = await keys.create("vision", "read")
    lax = Authenticator(config, keys)
    strict = Authenticator(config.model_copy(update={"require_credentials": True}), keys)
    assert (await lax.identity([], {})).projects is None
    assert (await lax.identity([], {"x509_common_name": [b"ada"]})).subject == "ada"
    assert await reason(strict.identity([], {})) == "CREDENTIALS_MISSING"
    assert (
        await reason(strict.identity([], {"x509_common_name": [b"ada"]})) == "CREDENTIALS_MISSING"
    )
    for each in (lax, strict):
        shown = await each.identity([f"bearer {text}"], {})
        assert (shown.projects, shown.role) == (frozenset(["vision"]), "read")
        for wrong in ([f"Basic {text}"], [text], ["Bearer"], ["Bearer a", f"Bearer {text}"]):
            assert await reason(each.identity(wrong, {})) == "CREDENTIALS_INVALID"


def test_a_server_that_others_can_reach_is_never_open(tmp_path: Path) -> None:
    pair: dict[str, Any] = {"tls_certificate": tmp_path / "c.pem", "tls_key": tmp_path / "k.pem"}
    ca: dict[str, Any] = {"tls_client_ca": tmp_path / "ca.pem"}
    there: dict[str, Any] = {"address": "0.0.0.0:1"}
    assert not ServerConfig().credentials_required
    assert ServerConfig(require_credentials=True).credentials_required
    assert ServerConfig(**there, **pair).credentials_required
    assert not ServerConfig(**there, **pair, **ca).credentials_required
    for wrong, words in (
        ({**there}, "without TLS"),
        ({**there, "require_credentials": True}, "without TLS"),
        ({**there, **pair, "require_credentials": False}, "without credentials"),
        ({"jwt_keys": tmp_path / "j"}, "jwt_issuer"),
        ({"jwt_issuer": "a", "jwt_audience": "b"}, "jwt_keys"),
    ):
        with pytest.raises(ValidationError, match=words):
            ServerConfig(**wrong)


def test_on_the_servers_machine_the_state_folder_is_enough(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    made = ask(
        folder, "CreateKey", key_pb2.CreateKeyRequest(parent="projects/-", role="admin", label="me")
    )
    assert made.api_key.startswith("hvp__")
    assert made.key.name.startswith("projects/-/keys/")
    listed = ask(folder, "ListKeys", key_pb2.ListKeysRequest(parent="projects/-"))
    assert list(listed.keys) == [made.key]
    revoked = ask(folder, "RevokeKey", key_pb2.RevokeKeyRequest(name=made.key.name))
    assert revoked.key.HasField("revoke_time")
    audit = folder / "audit.jsonl"
    lines = [json.loads(line) for line in audit.read_text().splitlines()]
    assert [line["method"] for line in lines] == ["KeyService/CreateKey", "KeyService/RevokeKey"]
    assert {tuple(line["resources"]) for line in lines} == {(made.key.name,)}
    for path in (folder, audit, folder / "hvp.sqlite3"):
        assert not stat.S_IMODE(path.stat().st_mode) & 0o077
    with pytest.raises(LocalKeysError, match="KEY_INVALID"):
        ask(folder, "CreateKey", key_pb2.CreateKeyRequest(parent="projects/a", role="king"))
    with pytest.raises(LocalKeysError, match="RESOURCE_NOT_FOUND"):
        ask(folder, "RevokeKey", key_pb2.RevokeKeyRequest(name="projects/a/keys/none"))


def test_a_full_log_is_put_aside_and_a_call_names_at_most_a_few_resources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hvp_service.identity.audit._FILE_BYTES", 1000)
    log = AuditLog(tmp_path / "audit.jsonl")
    who = Identity(kind="key", subject="k")
    with called_by(who) as call:
        for index in range(100):
            call.note(f"projects/p/vectors/{index}")
    for _ in range(20):
        log.note(who, "VectorService/CreateVector", names=list(call.names)[:2])
    log.close()
    assert len(call.names) == 16
    files = list(tmp_path.iterdir())
    assert 2 <= len(files) <= 16
    for path in files:
        for line in path.read_text().splitlines():
            assert json.loads(line)["caller"] == "key:k"
