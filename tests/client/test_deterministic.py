"""Operators that give the same bits each time, through a server."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hvp_client import Batch, Checkpoint, Client, InvalidArgumentError, Operator
from numpy.typing import NDArray

from tests.client.conftest import Server
from tests.client.test_cli import hvp


@pytest.fixture
def D(client: Client, checkpoint: Checkpoint, batch: Batch) -> Operator:  # noqa: N802
    """The tiny model's Hessian in float32, deterministic."""
    return client.operator(checkpoint, batch, deterministic=True)


def test_what_is_made_of_a_deterministic_operator_is_deterministic_too(
    client: Client, checkpoint: Checkpoint, batch: Batch, D: Operator
) -> None:
    plain = client.operator(checkpoint, batch)
    J = client.jacobian(checkpoint, batch, deterministic=True)
    blocks = D.blocks(by="layer").values()
    made = (2 * D - D, D + 1e-3 * client.identity(D), D.restrict("*norm*"), J, J.T, *blocks)
    assert all(each.deterministic for each in (D, *made))
    assert D.preconditioned(np.ones(D.shape[0])).deterministic
    assert not plain.deterministic
    with pytest.raises(TypeError):
        D._twin + plain._twin  # of a sum with both nothing could be said
    with pytest.raises(InvalidArgumentError, match="deterministic is True or False, not 'no'"):
        client.operator(checkpoint, batch, deterministic="no")  # type: ignore[arg-type]


def test_products_and_jobs_repeat_themselves_and_an_extension_keeps_the_operator(
    client: Client, D: Operator
) -> None:
    v = D.random_vector(seed=1)
    first = (D @ v).numpy()
    density = D.density(num_probes=2, num_steps=4)
    told = density.result()
    more = density.extend(num_probes=3)
    assert more.spec["deterministic"] is True
    assert told.provenance["deterministic"] == "true"
    assert told.provenance["schedule_hessian_of_2"].endswith("shared")
    assert more.result().provenance["deterministic"] == "true"
    again: NDArray[np.float32] = (D @ v).numpy()
    assert first.tobytes() == again.tobytes()
    once_more = D.density(num_probes=2, num_steps=4).result()
    for ours, theirs in zip(once_more.quadratures, told.quadratures, strict=True):
        assert np.asarray(ours.nodes).tobytes() == np.asarray(theirs.nodes).tobytes()
        assert np.asarray(ours.weights).tobytes() == np.asarray(theirs.weights).tobytes()


def test_a_question_from_the_command_line_may_be_deterministic(server: Server, D: Operator) -> None:
    what = ("--checkpoint", D.checkpoint, "--ids", D.batch, "--num-probes", "2", "--num-steps", "4")
    done = hvp("density", *what, "--deterministic", "--format", "json", "--address", server.address)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["provenance"]["deterministic"] == "true"
