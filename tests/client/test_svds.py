"""Singular values of the Jacobian of the logits: a job like others, with vectors of both sides."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hvp_client import (
    Batch,
    Checkpoint,
    Client,
    FailedPreconditionError,
    InvalidArgumentError,
    Jacobian,
    Operator,
)
from numpy.typing import NDArray
from typer.testing import CliRunner

from tests.client.conftest import Server


@pytest.fixture
def J(client: Client, checkpoint: Checkpoint, batch: Batch) -> Jacobian:  # noqa: N802
    return client.jacobian(checkpoint, batch, dtype="float64", parameters=["*.norm.weight"])


@pytest.fixture
def dense(J: Jacobian) -> NDArray[np.float64]:
    """J as a matrix, a column for each parameter."""
    return np.asarray(J @ np.eye(J.shape[1]))


def test_the_triplets_are_those_of_the_dense_matrix(
    J: Jacobian, dense: NDArray[np.float64]
) -> None:
    job = J.svds(3, seed=1)
    found = job.result()
    true = np.linalg.svd(dense, compute_uv=False)
    assert found.outcome == "CONVERGED"
    np.testing.assert_allclose(found.singular_values, true[:3], rtol=1e-11)
    assert found.intervals.shape == (3, 2)
    assert found.completeness.shown
    u, v = (np.stack([each.numpy() for each in side], 1) for side in (found.u, found.v))
    np.testing.assert_allclose(dense @ v, u * found.singular_values, atol=1e-11 * true[0])
    np.testing.assert_allclose(dense.T @ u, v * found.singular_values, atol=1e-11 * true[0])
    assert found.u[0].output_shape == J.output_shape
    assert found.u[0].batch == J.batch
    assert (found.v[0].output_shape, found.v[0].shape) == (None, (J.shape[1],))
    assert found.u[0].dot(J @ found.v[0]) == pytest.approx(found.singular_values[0], rel=1e-11)
    assert job.headline == "svds k=3"
    assert any("None was missed" in each for each in found.claims)


def test_vectors_stay_with_their_job_and_are_those_of_their_space(
    client: Client, J: Jacobian
) -> None:
    job = J.svds(1)
    found = job.result()
    again = client.job(job.name).result()
    assert [each.name for each in (*again.u, *again.v)] == [
        each.name for each in (*found.u, *found.v)
    ]
    u = client.vector(found.u[0].name)
    assert u.shape == (J.shape[0],)
    assert (J.T @ u).norm() == pytest.approx(found.singular_values[0], rel=1e-9)
    with pytest.raises(InvalidArgumentError) as refusal:
        J @ u
    assert refusal.value.reason == "VECTOR_SPACE_MISMATCH"


def test_a_search_is_extended_to_more_triplets_from_those_that_it_has(
    J: Jacobian, dense: NDArray[np.float64]
) -> None:
    job = J.svds(2, tol=1e-9)
    job.result()
    longer = job.extend(k=4, tol=1e-6)
    job.delete()  # its vectors stay as long as they are needed
    found = longer.result()
    assert (found.outcome, longer.spec["seed"]) == ("CONVERGED", 1)
    true = np.linalg.svd(dense, compute_uv=False)
    np.testing.assert_allclose(found.singular_values, true[:4], rtol=1e-9)
    assert found.completeness.shown
    u, v = (np.stack([each.numpy() for each in side], 1) for side in (found.u, found.v))
    np.testing.assert_allclose(dense @ v, u * found.singular_values, atol=1e-5 * true[0])
    fresh = J.svds(4, tol=1e-6, seed=1).result()
    assert found.num_products < fresh.num_products
    with pytest.raises(FailedPreconditionError, match="k is 3, and the job has 4 already"):
        longer.extend(k=3)
    with pytest.raises(InvalidArgumentError, match="EXTENSION_MISMATCH"):
        longer.extend(seed=1)


def test_what_cannot_be_asked_is_refused_before_it_travels(J: Jacobian, H: Operator) -> None:
    with pytest.raises(InvalidArgumentError) as refusal:
        J.svds(J.shape[1] + 1)
    assert refusal.value.reason == "K_INVALID"
    with pytest.raises(InvalidArgumentError) as refusal:
        J.T.svds(1)
    assert refusal.value.reason == "OPERATOR_TRANSPOSED"
    with pytest.raises(InvalidArgumentError) as refusal:
        H.plan("svds", k=1)
    assert refusal.value.reason == "OPERATOR_NOT_JACOBIAN"
    with pytest.raises(InvalidArgumentError) as refusal:
        J.plan("eigsh", k=1)
    assert refusal.value.reason == "OPERATOR_NOT_SYMMETRIC"
    assert not hasattr(J, "eigsh")
    assert not hasattr(H, "svds")
    plan = J.plan("svds", k=2)
    assert plan.fits
    # Pairs of vectors: one of J's products and one of its arguments each.
    assert plan.least_bytes_per_rank >= 10 * sum(J.shape) * 8


def test_the_command_shows_values_with_their_bounds(
    server: Server, checkpoint: Checkpoint, batch: Batch
) -> None:
    from hvp_client.cli.main import app

    asked = [
        *("svds", "--checkpoint", checkpoint.name, "--ids", batch.name, "-k", "2"),
        *("--dtype", "float64", "--parameters", "*.norm.weight", "--address", server.address),
    ]
    told = CliRunner().invoke(app, [*asked, "--format", "json"])
    assert told.exit_code == 0, told.output
    found = json.loads(told.stdout)
    assert len(found["singular_values"]) == len(found["u"]) == len(found["v"]) == 2
    table = CliRunner().invoke(app, asked)
    assert "singular value" in table.stdout
    assert "None was missed" in table.stdout
    assert CliRunner().invoke(app, [*asked, "--operator", "ggn"]).exit_code == 2
