"""A server for other machines, and the keys with which people and programs come in."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trustme
from hvp_client import (
    AsyncClient,
    Client,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    Retry,
    Tls,
    UnauthenticatedError,
)

from tests.client.conftest import HVP, Server, save_llama
from tests.modules.certificates import Files


class Open:
    """A server on every address of this machine, with encryption, and its first key."""

    def __init__(self, folder: Path):
        files = Files(folder, trustme.CA(), trustme.CA())
        chain, key = files.of(files.ours, "127.0.0.1")
        self.state_dir = folder / "state"
        self.tls = Tls(ca=files.authority(files.ours))
        self.ca = files.authority(files.ours)
        self.root = self.made("--project", "-", "--role", "admin")
        server = Server.start(
            self.state_dir,
            "0.0.0.0:0",
            arguments=[f"--tls-certificate={chain}", f"--tls-key={key}"],
        )
        self.server = server
        self.address = f"127.0.0.1:{server.address.rpartition(':')[2]}"

    def made(self, *arguments: str) -> str:
        """Text of a key that is made on the server's machine."""
        done = self.run("keys", "create", f"--state-dir={self.state_dir}", *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a command."""
        return subprocess.run(
            [HVP, *arguments],
            env=os.environ | environment,
            capture_output=True,
            text=True,
            check=False,
        )

    def client(self, api_key: Any = None, **more: Any) -> Client:
        """A client with a key."""
        return Client(self.address, api_key=api_key, tls=self.tls, **more)


@pytest.fixture(name="opened", scope="module")
def _opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Open]:
    opened = Open(tmp_path_factory.mktemp("opened"))
    yield opened
    assert opened.server.stop() == 0


def test_a_key_opens_its_project_for_everything_that_its_role_may_do(
    opened: Open, tmp_path: Path
) -> None:
    folder = save_llama(tmp_path / "llama", vocab_size=11, hidden_size=8)
    with opened.client(opened.root, project="vision") as root:
        submit, text = root.create_api_key("submit", label="ci", ttl_s=3600.0)
        _, read = root.create_api_key("read")
        assert {key.label for key in root.api_keys()} == {"ci", ""}
    with opened.client(text) as client:
        caller = client.whoami()
        assert (caller.kind, caller.projects, caller.role) == ("key", ("vision",), "submit")
        assert caller.expire_time == submit.expire_time
        checkpoint = client.upload_checkpoint(folder)
        assert checkpoint.name.startswith("projects/vision/")
        batch = client.upload_batch({"input_ids": np.arange(10).reshape(2, 5)})
        H = client.operator(checkpoint, batch, dtype="float64")
        job = H.eigsh(k=1, max_products=30)
        vectors = job.result().eigenvectors
        with pytest.raises(PermissionDeniedError, match="admin"):
            client.create_api_key("read")
    with opened.client(read) as client:
        assert [each.name for each in client.jobs()] == [job.name]
        assert client.job(job.name).result().eigenvalues.shape == (1,)
        assert client.vector(vectors[0].name).numpy().shape == (H.shape[0],)
        with pytest.raises(PermissionDeniedError) as refusal:
            client.job(job.name).cancel()
        assert (refusal.value.reason, refusal.value.metadata["role"]) == ("ROLE_REQUIRED", "submit")
    with opened.client(text, project="nlp") as client, pytest.raises(NotFoundError, match="vision"):
        client.jobs()


def test_whoever_shows_no_key_a_wrong_a_revoked_or_an_expired_one_is_told_so_at_once(
    opened: Open,
) -> None:
    patient = Retry(patience_s=600.0, contact_s=600.0)  # to try again would last for ever
    with opened.client(opened.root, project="team") as root:
        key, revoked = root.create_api_key("submit")
        _, expired = root.create_api_key("submit", ttl_s=1e-6)
        assert root.revoke_api_key(key).revoke_time is not None
    for given, reason in (
        (None, "CREDENTIALS_MISSING"),
        (opened.root[:-1] + "x", "CREDENTIALS_INVALID"),
        ("a.b.c", "CREDENTIALS_INVALID"),
        (revoked, "CREDENTIALS_INVALID"),
        (expired, "CREDENTIALS_EXPIRED"),
    ):
        with (
            opened.client(given, retry=patient) as client,
            pytest.raises(UnauthenticatedError) as refusal,
        ):
            client.jobs()
        assert refusal.value.reason == reason


async def test_a_function_gives_a_fresh_key_for_every_call(opened: Open) -> None:
    with opened.client(opened.root, project="team") as root:
        texts = [root.create_api_key("read")[1] for _ in range(2)]
    current = [texts[0]]
    async with AsyncClient(opened.address, api_key=lambda: current[0], tls=opened.tls) as client:
        seen = [(await client.whoami()).subject]
        current[0] = texts[1]
        seen.append((await client.whoami()).subject)
    assert seen == [text.split("_")[2] for text in texts]


def test_commands_take_the_key_from_the_environment_or_from_a_file(
    opened: Open, tmp_path: Path
) -> None:
    here = {"HVP_ADDRESS": opened.address, "HVP_CA": str(opened.ca)}
    text = opened.made(
        "--project", "team", "--role", "admin", "--label", "[red]bold", "--days", "1"
    )
    file = tmp_path / "key"
    file.write_text(f"{text}\n")
    listed = opened.run("keys", "list", HVP_API_KEY_FILE=str(file), **here)
    assert "[red]bold" in listed.stdout, listed.stderr
    assert text not in listed.stdout + listed.stderr
    made = opened.run(
        *("keys", "create", "--role", "submit", "--format", "json"), HVP_API_KEY=text, **here
    )
    key = json.loads(made.stdout)
    assert key["name"].startswith("projects/team/keys/")
    ended = opened.run("keys", "revoke", key["name"].rpartition("/")[2], HVP_API_KEY=text, **here)
    assert ended.stdout.startswith("revoked"), ended.stderr
    refused = opened.run("jobs", HVP_API_KEY=key["api_key"], **here)
    assert (refused.returncode, "revoked" in refused.stderr) == (1, True)
    unknown = opened.run("keys", "revoke", "0" * 16, f"--state-dir={opened.state_dir}")
    assert (unknown.returncode, "hvp keys list" in unknown.stderr) == (2, True)
    diagnosis = opened.run("doctor", f"--address={opened.address}", HVP_API_KEY=text, **here)
    assert "1 rank READY" in diagnosis.stdout, diagnosis.stdout


def test_a_key_never_travels_in_clear_text_nor_shows_in_a_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    secret = f"hvp_vision_{'0' * 16}_{'a' * 64}"
    with pytest.raises(InvalidArgumentError) as refusal:
        Client("192.0.2.7:8471", api_key=secret)
    assert refusal.value.reason == "CLEARTEXT_REFUSED"
    assert secret not in str(refusal.value)
    for wrong in ("", "  ", "a b", "a\nb", "ä", 7, lambda: None):
        with pytest.raises(InvalidArgumentError) as refusal:
            Client(api_key=wrong)  # type: ignore[arg-type]
        assert refusal.value.reason == "API_KEY_INVALID"
    monkeypatch.setenv("HVP_API_KEY_FILE", "/nowhere")
    with pytest.raises(InvalidArgumentError, match="/nowhere"):
        Client()


def test_nothing_that_the_server_writes_down_holds_a_key(opened: Open) -> None:
    with opened.client(opened.root) as client:
        client.jobs()
    secret = opened.root.rpartition("_")[2].encode()
    files = [path for path in opened.state_dir.parent.rglob("*") if path.is_file()]
    assert any(path.name == "audit.jsonl" for path in files)
    for path in files:
        assert secret not in path.read_bytes(), path
