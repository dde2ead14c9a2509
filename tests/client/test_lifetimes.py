"""What a client made ends with the client, however it ends."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hvp_client import (
    AbortedError,
    Batch,
    Checkpoint,
    Client,
    InvalidArgumentError,
    NotFoundError,
    Operator,
    Timeout,
    Vector,
)

from tests.client.conftest import Server

CRASHING = """
import sys, time
from hvp_client import Client, Timeout

address, checkpoint, batch = sys.argv[1:]
client = Client(address, timeout=Timeout(lease_s=2.0))
H = client.operator(checkpoint, batch, dtype="float64")
v = H.random_vector(seed=1)
w = H @ v
print(v.name, w.name, H.zeros(keep=True).name, flush=True)
time.sleep(600)
"""


def names(client: Client) -> set[str]:
    return {vector.name for vector in client.vectors()}


def test_a_with_block_leaves_none_of_its_vectors_though_their_handles_live_on(
    server: Server, client: Client, checkpoint: Checkpoint, batch: Batch
) -> None:
    before = names(client)
    alive: list[Vector] = []
    for _ in range(3):
        with Client(server.address) as other:
            H = other.operator(checkpoint, batch, dtype="float64")
            v = H.random_vector(seed=1)
            alive += [H.gradient(), v, H @ v, H.vector(np.ones(H.shape[0])) - v]
            assert len(names(client) - before) >= 4
        assert names(client) == before


def test_the_vectors_of_a_killed_client_go_and_those_of_a_quiet_one_stay(
    server: Server, client: Client, checkpoint: Checkpoint, batch: Batch
) -> None:
    script = [sys.executable, "-c", CRASHING, server.address, checkpoint.name, batch.name]
    with (
        Client(server.address, timeout=Timeout(lease_s=2.0)) as quiet,
        subprocess.Popen(script, stdout=subprocess.PIPE, text=True) as crashing,
    ):
        mine = quiet.operator(checkpoint, batch, dtype="float64").random_vector(seed=2)
        assert crashing.stdout is not None
        *lost, kept = crashing.stdout.readline().split()
        time.sleep(3.0)
        assert {*lost, kept} <= names(client)  # it lives, so they do
        crashing.send_signal(signal.SIGKILL)
        crashing.wait()
        deadline = time.monotonic() + 60.0
        while names(client) & set(lost):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert kept in names(client)
        assert mine.norm() > 0
        client.vector(kept).delete()


def test_a_vector_that_was_kept_is_there_after_its_client(
    server: Server, client: Client, H: Operator
) -> None:
    v = H.random_vector(seed=1)
    with Client(server.address) as other:
        w = other.operator(H.checkpoint, H.batch, dtype="float64") @ other.vector(v.name)
        w.keep()
        values = w.numpy()
    found = client.vector(w.name)
    assert found.durable
    np.testing.assert_array_equal(found.numpy(), values)
    found.delete()
    with pytest.raises(NotFoundError):
        found.keep()


def test_what_is_no_vector_is_refused_with_how_to_make_one(
    client: Client, checkpoint: Checkpoint, batch: Batch
) -> None:
    v = client.operator(checkpoint, batch).random_vector(seed=1)
    for call in (lambda: v.dot(np.ones(3)), lambda: v.axpy(1.0, None)):  # type: ignore[arg-type]
        with pytest.raises(InvalidArgumentError, match=r"H\.vector\(array\)") as refusal:
            call()
        assert (refusal.value.reason, refusal.value.field) == ("VECTOR_EXPECTED", "other")


def test_a_resource_is_named_by_itself_as_well_as_by_its_name(client: Client, batch: Batch) -> None:
    other = client.upload_batch({"input_ids": np.array([[3, 1, 2]])})
    client.delete_batch(other)
    with pytest.raises(NotFoundError):
        client.batch(other.name)
    with pytest.raises(InvalidArgumentError, match="as a Checkpoint has, not int") as refusal:
        client.checkpoint(7)  # type: ignore[arg-type]
    assert refusal.value.reason == "RESOURCE_NAME_INVALID"
    assert client.batch(batch.name) == batch


def test_labels_are_changed_unless_somebody_else_was_quicker(
    client: Client, checkpoint: Checkpoint, batch: Batch
) -> None:
    job = client.operator(checkpoint, batch).density(
        num_probes=1, num_steps=1, labels={"who": "me"}
    )
    before = job.etag
    job.relabel({"run": "7"}, etag=before)
    assert (job.labels, client.job(job.name).labels) == ({"run": "7"}, {"run": "7"})
    with pytest.raises(AbortedError) as refusal:
        job.relabel({"run": "8"}, etag=before)
    assert refusal.value.reason == "ETAG_MISMATCH"
    changed = client.relabel_checkpoint(checkpoint, {"step": "100"})
    assert client.checkpoint(checkpoint.name).labels == changed.labels == {"step": "100"}
    assert client.relabel_checkpoint(checkpoint, {}, etag=changed.etag).labels == {}
