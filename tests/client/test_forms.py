"""Slopes and quadratic forms, from the SDK: numbers against dense matrices and against products."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hvp_client import AsyncClient, Batch, Checkpoint, Client, InvalidArgumentError, Operator

from tests.client.conftest import Server

KINDS = [
    *("hessian", "ggn", "empirical_fisher_token", "empirical_fisher_sequence"),
    *("gradient_covariance_token", "gradient_covariance_sequence"),
]


@pytest.mark.parametrize("kind", KINDS)
def test_quadratic_forms_are_the_inner_products_with_products(
    client: Client, checkpoint: Checkpoint, batch: Batch, kind: str
) -> None:
    A = client.operator(checkpoint, batch, kind=kind, dtype="float64")
    vectors = [A.random_vector(seed=seed, distribution="gaussian") for seed in range(11)]
    expected = np.array([v.dot(A @ v) for v in vectors])
    np.testing.assert_allclose(A.quadratic(vectors), expected, rtol=1e-12)
    one = A.quadratic(vectors[0])
    assert isinstance(one, float)
    assert one == pytest.approx(expected[0], rel=1e-12)
    X = np.stack([v.numpy() for v in vectors[:3]], axis=1)
    np.testing.assert_allclose(A.quadratic(X), expected[:3], rtol=1e-12)
    assert A.quadratic(X[:, 0]) == pytest.approx(expected[0], rel=1e-12)


def test_a_slope_is_the_gradients_inner_product_and_the_losss_difference(H: Operator) -> None:
    g = H.gradient()
    vectors = [H.random_vector(seed=seed) for seed in range(3)]
    expected = [g.dot(v) for v in vectors]
    np.testing.assert_allclose(H.slope(vectors), expected, rtol=1e-11)
    assert H.slope(vectors[0]) == pytest.approx(expected[0], rel=1e-11)
    X = torch.from_numpy(np.stack([v.numpy() for v in vectors], axis=1))
    np.testing.assert_allclose(H.slope(X), expected, rtol=1e-11)
    assert H.slope(g) == pytest.approx(g.norm() ** 2, rel=1e-11)


def test_no_vectors_have_no_numbers(H: Operator) -> None:
    for ask in (H.quadratic, H.slope):
        numbers = ask(np.empty((H.shape[0], 0)))
        assert isinstance(numbers, np.ndarray)
        assert numbers.shape == (0,)


async def test_the_awaited_side_has_the_same(
    server: Server, checkpoint: Checkpoint, batch: Batch
) -> None:
    async with AsyncClient(server.address) as client:
        G = await client.operator(checkpoint, batch, kind="ggn", dtype="float64")
        v = await G.random_vector(seed=1)
        assert await G.quadratic(v) == pytest.approx(await v.dot(await (G @ v)), rel=1e-12)
        assert await G.slope(v) == pytest.approx(await v.dot(await G.gradient()), rel=1e-11)


def test_what_has_no_number_is_refused(
    client: Client, checkpoint: Checkpoint, batch: Batch, H: Operator
) -> None:
    n = H.shape[0]
    single = client.operator(checkpoint, batch).random_vector(seed=1)
    outputs = client.jacobian(checkpoint, batch, dtype="float64").T.random_vector(seed=1)
    infinite = np.ones(n)
    infinite[3] = np.inf
    for v, reason in [
        (np.ones(n + 1), "SHAPE_MISMATCH"),
        (np.ones((2, n)), "SHAPE_MISMATCH"),
        (np.float64(1.0), "SHAPE_MISMATCH"),
        (infinite, "NON_FINITE"),
        (["a"] * n, "DTYPE_UNSUPPORTED"),
        (single, "VECTOR_SPACE_MISMATCH"),
        ([outputs], "VECTOR_SPACE_MISMATCH"),
        ([H.zeros(), 1], "VECTOR_EXPECTED"),
    ]:
        for ask in (H.quadratic, H.slope):
            with pytest.raises(InvalidArgumentError) as refusal:
                ask(v)
            assert refusal.value.reason == reason


def test_an_error_over_data_is_that_of_the_batches_forms(
    client: Client, checkpoint: Checkpoint, H: Operator
) -> None:
    generator = np.random.default_rng(5)
    rows = generator.integers(0, 19, (6, 6))
    labels = np.where(np.arange(6) < 4, rows, -100)  # fewer targets: another weight
    parts = [
        client.upload_batch({"input_ids": rows[:2]}),
        client.upload_batch({"input_ids": rows[2:4], "labels": labels[2:4]}),
        client.upload_batch({"input_ids": rows[4:]}),
    ]
    whole = client.upload_batch(
        {"input_ids": rows, "labels": np.concatenate((rows[:2], labels[2:4], rows[4:]))}
    )
    pooled = client.operator(checkpoint, whole, dtype="float64")
    found = pooled.eigsh(k=2, which="LM", tol=1e-8).result()
    over = pooled.over_data(found.eigenvectors, parts)
    np.testing.assert_allclose(over.values, found.eigenvalues, rtol=1e-9)
    assert over.loss == pytest.approx(pooled.loss(), rel=1e-12)
    assert over.num_targets.tolist() == [10, 6, 10]
    # The same by hand, of a ratio of sums.
    weights = over.num_targets / 26
    spread = weights[:, None] * (over.forms - over.values)
    np.testing.assert_allclose(over.standard_errors, np.sqrt(1.5 * (spread**2).sum(0)))
    assert (over.intervals[:, 0] < over.values).all()
    assert over.intervals[0, 1] - over.values[0] == pytest.approx(
        4.302653 * over.standard_errors[0], rel=1e-5
    )
    assert len(over.table().rows) == 2
    array = pooled.over_data(found.eigenvectors[0].numpy(), parts)
    np.testing.assert_allclose(array.forms[:, 0], over.forms[:, 0], rtol=1e-12)
    wrong: list[list[Batch | str]] = [[], [parts[0]], [parts[0], parts[0].name]]
    for batches in wrong:
        with pytest.raises(InvalidArgumentError) as caught:
            H.over_data(found.eigenvectors, batches)
        assert (caught.value.reason, caught.value.field) == ("BATCHES_INVALID", "batches")
