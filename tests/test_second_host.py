"""A server on another host: two network namespaces with a cable between them that can be cut."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import jwt
import numpy as np
import pytest
import trustme
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from safetensors.numpy import save_file

from tests.client.conftest import HVP, save_llama

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

THERE, HERE, PORT = "10.77.0.1", "10.77.0.2", 8471
PROVIDER = ed25519.Ed25519PrivateKey.generate()
CUT_S = 6.0


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


@dataclass
class Cable:
    """Two hosts and what joins them."""

    server: str = f"hvp-a-{os.getpid()}"
    client: str = f"hvp-b-{os.getpid()}"

    def lay(self) -> None:
        for host in (self.server, self.client):
            run("ip", "netns", "add", host)
            run("ip", "-n", host, "link", "set", "lo", "up")
        ends = [*("ip", "link", "add", "plug", "netns", self.server, "type", "veth")]
        run(*ends, "peer", "name", "plug", "netns", self.client)
        for host, address in ((self.server, THERE), (self.client, HERE)):
            run("ip", "-n", host, "address", "add", f"{address}/24", "dev", "plug")
        self.join()
        run("ip", "-n", self.client, "link", "set", "plug", "up")

    def cut(self) -> None:
        run("ip", "-n", self.server, "link", "set", "plug", "down")

    def join(self) -> None:
        run("ip", "-n", self.server, "link", "set", "plug", "up")

    def remove(self) -> None:
        for host in (self.server, self.client):
            subprocess.run(["ip", "netns", "del", host], check=False, capture_output=True)

    def on(self, host: str, *command: str | Path) -> list[str]:
        return ["ip", "netns", "exec", host, *map(str, command)]


@dataclass
class World:
    """A server with TLS, keys and tokens on one host, and what the other one needs to reach it."""

    folder: Path
    cable: Cable = field(default_factory=Cable)
    ours: trustme.CA = field(default_factory=trustme.CA)
    other: trustme.CA = field(default_factory=trustme.CA)

    def start(self) -> subprocess.Popen[str]:
        for name, authority in (("ours", self.ours), ("other", self.other)):
            authority.cert_pem.write_to_path(self.folder / f"{name}.pem")
        issued = self.ours.issue_cert(THERE)
        issued.private_key_pem.write_to_path(self.folder / "server.key")
        issued.cert_chain_pems[0].write_to_path(self.folder / "server.pem")
        public = PROVIDER.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        (self.folder / "provider.pem").write_bytes(public)
        settings = {
            "HVP_JWT_KEYS": str(self.folder / "provider.pem"),
            "HVP_JWT_ISSUER": "https://id.example",
            "HVP_JWT_AUDIENCE": "hvp",
        }
        command = self.cable.on(
            self.cable.server,
            *(HVP, "serve", f"--address={THERE}:{PORT}", f"--state-dir={self.folder / 'state'}"),
            *("--workers=1", "--device=cpu", "--backend=inprocess"),
            f"--tls-certificate={self.folder / 'server.pem'}",
            f"--tls-key={self.folder / 'server.key'}",
        )
        with (self.folder / "server.log").open("w") as log:
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, text=True, env=os.environ | settings
            )
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("serving on "), (self.folder / "server.log").read_text()
        return process

    def key(self, *arguments: str) -> str:
        """Text of a key that is made on the server's host."""
        command = [str(HVP), "keys", "create", f"--state-dir={self.folder / 'state'}"]
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    def client(self, program: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        """Run a program of the SDK on the other host."""
        return subprocess.Popen(
            self.cable.on(self.cable.client, sys.executable, "-c", program, *arguments),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"HVP_CA": str(self.folder / "ours.pem")} | environment,
        )

    def answer(self, program: str, *arguments: str, **environment: str) -> str:
        process = self.client(program, *arguments, **environment)
        out, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        return out.strip()


@pytest.fixture(name="world", scope="module")
def _world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    assert os.geteuid() == 0, "namespaces are root's: run this test as root, in a container"
    assert shutil.which("ip"), "install iproute2, which has the command ip"
    world = World(tmp_path_factory.mktemp("hosts"))
    server = None
    try:
        world.cable.lay()
        server = world.start()
        yield world
        server.terminate()
        assert server.wait(30) == 0
    finally:
        if server is not None:
            server.kill()
            server.communicate()
        world.cable.remove()


WHO = f"""
import sys
from hvp_client import Client, HvpError, Retry, Tls
ca, key = sys.argv[1:]
try:
    tls = Tls(ca=ca) if ca else None
    retry = Retry(patience_s=1.0, contact_s=1.0)
    with Client("{THERE}:{PORT}", tls=tls, api_key=key or None, retry=retry) as client:
        client.jobs()
        print(*client.whoami().projects, client.whoami().subject)
except HvpError as error:
    print(error.reason)
"""

RAW = f"""
import grpc
from hvp_protos.v1 import system_pb2, system_pb2_grpc
stub = system_pb2_grpc.SystemServiceStub(grpc.insecure_channel("{THERE}:{PORT}"))
try:
    stub.GetServerInfo(system_pb2.GetServerInfoRequest(), timeout=5)
except grpc.RpcError as error:
    print(error.code().name)
"""


def token(signer: ed25519.Ed25519PrivateKey = PROVIDER, age_s: float = 0.0) -> str:
    claims = {
        "sub": "ada",
        "iss": "https://id.example",
        "aud": "hvp",
        "exp": time.time() + 600 - age_s,
        "hvp_project": "team",
        "hvp_role": "read",
    }
    return jwt.encode(claims, signer, "EdDSA")


def test_strangers_of_every_kind_are_refused_and_friends_are_let_in(world: World) -> None:
    friend = world.key("--project=team", "--role=submit")
    revoked = world.key("--project=team", "--role=submit")
    expired = world.key("--project=team", "--role=submit", "--days=1e-9")
    run(
        *(str(HVP), "keys", "revoke", revoked.split("_")[2], "--project=team"),
        f"--state-dir={world.folder / 'state'}",
    )
    ours, other = str(world.folder / "ours.pem"), str(world.folder / "other.pem")
    forger = ed25519.Ed25519PrivateKey.generate()
    cases = {
        ("", friend): "CLEARTEXT_REFUSED",
        (other, friend): "SERVER_UNREACHABLE",
        (ours, ""): "CREDENTIALS_MISSING",
        (ours, revoked): "CREDENTIALS_INVALID",
        (ours, expired): "CREDENTIALS_EXPIRED",
        (ours, friend[:-8] + "0" * 8): "CREDENTIALS_INVALID",
        (ours, token(forger)): "CREDENTIALS_INVALID",
        (ours, token(age_s=3600.0)): "CREDENTIALS_EXPIRED",
        (ours, token()): "team ada",
        (ours, friend): f"team {friend.split('_')[2]}",
    }
    for (ca, key), expected in cases.items():
        assert world.answer(WHO, ca, key, HVP_CA="", HVP_PROJECT="team") == expected, (ca, key)
    assert world.answer(RAW) == "UNAVAILABLE"  # clear text to a port that speaks TLS
    command = world.cable.on(
        world.cable.client, HVP, "jobs", "--format=json", f"--address={THERE}:{PORT}"
    )
    done = subprocess.run(
        command,
        env=os.environ | {"HVP_CA": ours, "HVP_API_KEY": friend},
        capture_output=True,
        text=True,
        check=False,
    )
    assert json.loads(done.stdout) == [], done.stderr


UPLOAD = f"""
import sys
from hvp_client import Client, Timeout
def progress(done, total):
    print("at", done / total, flush=True)
with Client("{THERE}:{PORT}", timeout=Timeout(silence_s=float(sys.argv[2]))) as client:
    print("name", client.upload_checkpoint(sys.argv[1], progress).name, flush=True)
"""

JOB = f"""
import sys
import numpy as np
from hvp_client import Client, Timeout
with Client("{THERE}:{PORT}", timeout=Timeout(silence_s=3.0)) as client:
    checkpoint = client.upload_checkpoint(sys.argv[1])
    batch = client.upload_batch({{"input_ids": np.arange(16).reshape(2, 8)}}, checkpoint)
    H = client.operator(checkpoint, batch, dtype="float64")
    job = H.eigsh(k=2, which="SA", tol=1e-13, max_products=int(sys.argv[2]), num_lanczos_vectors=12)
    for event in job.watch():
        if event.progress is not None:
            print("at", event.num_products, flush=True)
    print("name", job.name, job.state, job.status().progress.num_products, flush=True)
"""


def lines_until(stream: IO[str], past: float) -> None:
    """Read what a client prints until it is that far."""
    for line in stream:
        word, number, *_ = line.split()
        assert word == "at", f"the end came first: {line}"
        if float(number) >= past:
            return
    pytest.fail("the client has ended")


def cut_and_join(world: World, process: subprocess.Popen[str], past: float) -> str:
    """Cut the cable when a client is so far, join it again, and give the client's last line."""
    assert process.stdout is not None
    lines_until(process.stdout, past)
    world.cable.cut()
    time.sleep(CUT_S)
    assert process.poll() is None
    world.cable.join()
    out, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    last = out.splitlines()[-1]
    assert last.startswith("name projects/team/"), out
    return last


@pytest.mark.parametrize("silence_s", [60.0, 2.0])
def test_an_upload_goes_on_where_the_cable_was_cut(
    silence_s: float, world: World, tmp_path: Path
) -> None:
    """The connection lives through it, or is given up and another one goes on."""
    folder = save_llama(tmp_path / "llama", vocab_size=11, hidden_size=8)
    # What nobody reads makes the folder large; and other bytes than last time's.
    rows = np.random.default_rng(int(silence_s)).standard_normal((400, 1 << 17))
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    save_file({"unused": rows}, folder / "model-00002-of-00002.safetensors")
    _write_index(folder)
    key = world.key("--project=team", "--role=submit")
    uploading = world.client(UPLOAD, str(folder), str(silence_s), HVP_API_KEY=key)
    cut_and_join(world, uploading, past=0.1)


def test_a_job_is_watched_to_its_end_though_the_cable_was_cut(world: World, tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "llama", vocab_size=19, hidden_size=16)
    key = world.key("--project=team", "--role=submit")
    watching = world.client(JOB, str(folder), "4000", HVP_API_KEY=key)
    last = cut_and_join(world, watching, past=3)
    assert last.split()[2] == "SUCCEEDED"


def _write_index(folder: Path) -> None:
    """The index of a checkpoint in two files."""
    from safetensors import safe_open

    with safe_open(folder / "model-00001-of-00002.safetensors", "np") as file:
        names = list(file.keys())
    files = dict.fromkeys(names, "model-00001-of-00002.safetensors")
    files["unused"] = "model-00002-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": files})
    )
