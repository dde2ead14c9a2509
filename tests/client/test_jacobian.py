"""The Jacobian of the logits, from the SDK: both ways, from anything that holds numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hvp_client import (
    AsyncClient,
    Batch,
    Checkpoint,
    Client,
    InvalidArgumentError,
    Jacobian,
    NotFoundError,
    Operator,
)
from numpy.typing import NDArray

from tests.client.conftest import Server


@pytest.fixture
def J(client: Client, checkpoint: Checkpoint, batch: Batch) -> Jacobian:  # noqa: N802
    return client.jacobian(checkpoint, batch, dtype="float64")


def test_products_both_ways_are_adjoint_and_those_of_finite_differences(
    J: Jacobian, H: Operator
) -> None:
    m, n = J.shape
    assert (J.output_shape, m, n) == ((3, 7, 19), 3 * 7 * 19, H.shape[0])
    assert J.T.shape == (n, m)
    v, u = J.random_vector(seed=1), J.T.random_vector(seed=2)
    Jv, Ju = J @ v, J.T @ u
    assert (Jv.shape, Jv.output_shape, Jv.batch) == ((m,), (3, 7, 19), J.batch)
    assert (Ju.shape, Ju.output_shape, Ju.batch) == ((n,), None, None)
    assert u.dot(Jv) == pytest.approx(Ju.dot(v), rel=1e-12)
    assert (Jv + Jv).norm() == pytest.approx(2 * Jv.norm(), rel=1e-14)
    np.testing.assert_allclose(J @ v.numpy(), Jv.numpy(), rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(J.T @ u.numpy(), Ju.numpy(), rtol=1e-12, atol=1e-13)


def test_it_leads_to_the_gauss_newton_matrix(
    client: Client, checkpoint: Checkpoint, input_ids: NDArray[np.int64]
) -> None:
    """One target: G = Jₜᵀ (diag(p) − ppᵀ) Jₜ with p the softmax of one row of logits."""
    labels = np.full((1, 7), -100)
    labels[0, 3] = 5
    batch = client.upload_batch({"input_ids": input_ids[:1], "labels": labels})
    J = client.jacobian(checkpoint, batch, dtype="float64")
    G = client.operator(checkpoint, batch, kind="ggn", dtype="float64")
    H = client.operator(checkpoint, batch, dtype="float64")
    v = np.random.default_rng(0).standard_normal(J.shape[1])
    at = (0, 2)  # the position before the label
    tangent = (J @ v).reshape(J.output_shape)[at]
    # The gradient of the one target's loss is J_tᵀ (p − e_label), which tells p.
    rows = np.zeros((*J.output_shape, 19))
    rows[(*at, np.arange(19), np.arange(19))] = 1
    Jt = (J.T @ rows.reshape(J.shape[0], 19)).T
    r = np.linalg.lstsq(Jt.T, H.gradient().numpy(), rcond=None)[0]
    p = r + np.eye(19)[5]
    expected = Jt.T @ (p * tangent - p * (p @ tangent))
    np.testing.assert_allclose(G @ v, expected, rtol=0, atol=1e-7 * np.abs(expected).max())


def test_outputs_come_in_their_own_shape_too(J: Jacobian) -> None:
    u = np.random.default_rng(1).standard_normal(J.output_shape)
    expected = J.T @ u.reshape(-1)
    np.testing.assert_allclose(J.T.matvec(u), expected, rtol=1e-12, atol=1e-13)
    there = J.T.vector(u)
    assert there.output_shape == J.output_shape
    np.testing.assert_allclose((J.T @ there).numpy(), expected, rtol=1e-12, atol=1e-13)
    column = J.T.matvec(u.reshape(-1, 1))
    np.testing.assert_allclose(column, expected[:, np.newaxis], rtol=1e-12, atol=1e-13)


def test_zero_outputs_lead_to_nothing(J: Jacobian) -> None:
    zero = J.T.zeros()
    assert (zero.output_shape, (J.T @ zero).norm()) == (J.output_shape, 0.0)


def test_vectors_of_the_other_side_and_questions_are_refused(J: Jacobian, H: Operator) -> None:
    v, u = J.random_vector(seed=1), J.T.random_vector(seed=2)
    for call in (lambda: J @ u, lambda: J.T @ v, lambda: u.dot(v), lambda: u + v, lambda: H @ u):
        with pytest.raises(InvalidArgumentError) as refusal:
            call()
        assert refusal.value.reason == "VECTOR_SPACE_MISMATCH"
    with pytest.raises(InvalidArgumentError, match=str(math.prod(J.output_shape))) as refusal:
        J.T @ np.ones(3)
    assert refusal.value.reason == "SHAPE_MISMATCH"


def test_a_jacobian_is_no_operator_of_questions(
    client: Client, checkpoint: Checkpoint, batch: Batch
) -> None:
    with pytest.raises(InvalidArgumentError, match=r"client\.jacobian") as refusal:
        client.operator(checkpoint, batch, kind="jacobian")
    assert refusal.value.field == "kind"


def test_outputs_go_with_their_batch(
    client: Client, checkpoint: Checkpoint, input_ids: NDArray[np.int64]
) -> None:
    batch = client.upload_batch({"input_ids": input_ids[:1, :4]})
    J = client.jacobian(checkpoint, batch)
    u, v = J.T.random_vector(seed=1), J.random_vector(seed=1)
    client.delete_batch(batch)
    with pytest.raises(NotFoundError):
        client.vector(u.name)
    assert client.vector(v.name).name == v.name


async def test_the_awaited_side_has_the_same(
    server: Server, checkpoint: Checkpoint, batch: Batch
) -> None:
    async with AsyncClient(server.address) as client:
        J = await client.jacobian(checkpoint, batch)
        v = await J.random_vector(seed=1, distribution="sphere")
        u = await J.T.random_vector(seed=1, distribution="sphere")
        forth, back = await u.dot(await (J @ v)), await v.dot(await (J.T @ u))
        assert forth == pytest.approx(back, rel=1e-3, abs=1e-7)


def test_outputs_have_no_parts_by_parameter(J: Jacobian) -> None:
    u = J.T.random_vector(seed=1)
    for call in (u.named, lambda: u["model.norm.weight"]):
        with pytest.raises(InvalidArgumentError) as refusal:
            call()
        assert refusal.value.reason == "VECTOR_SPACE_MISMATCH"
