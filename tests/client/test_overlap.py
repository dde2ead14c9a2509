"""Overlaps of the spans of eigenvectors, against those of the fetched vectors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hvp_client import AsyncClient, Client, InvalidArgumentError
from hvp_operations.eigsh.overlap import Overlap
from numpy.typing import NDArray

from tests.client.conftest import Server


def test_cosines_are_those_of_the_principal_angles() -> None:
    planes = np.linalg.qr(np.random.default_rng(0).normal(size=(9, 4)))[0]
    turned = planes[:, :2] * np.cos(0.3) + planes[:, 2:] * np.sin(0.3)
    found = Overlap.of(list(planes[:, :2].T @ turned))
    np.testing.assert_allclose(found.cosines, np.cos(0.3))
    np.testing.assert_allclose(found.angles, 0.3)
    assert found.mean_squared_cosine == pytest.approx(np.cos(0.3) ** 2)
    within = Overlap.of(list(planes[:, :3].T @ planes[:, :2]))
    np.testing.assert_allclose(within.cosines, [1, 1])
    assert within.mean_squared_cosine == pytest.approx(1)
    assert Overlap.of(list(planes[:, :2].T @ planes[:, 2:])).mean_squared_cosine < 1e-30


def test_of_two_results_it_is_that_of_their_eigenvectors(
    client: Client, small_llama_dir: Path, small_input_ids: NDArray[np.int64]
) -> None:
    checkpoint = client.upload_checkpoint(small_llama_dir)
    batch = client.upload_batch({"input_ids": small_input_ids})
    H = client.operator(checkpoint, batch, dtype="float64")
    G = client.operator(checkpoint, batch, kind="ggn", dtype="float64")
    one = H.eigsh(k=3, which="LA", tol=1e-3).result()
    two = G.eigsh(k=2, which="LA", tol=1e-3).result()
    found = one.overlap(two)
    left, right = (
        np.stack([vector.numpy() for vector in each.eigenvectors]) for each in (one, two)
    )
    np.testing.assert_allclose(found.inner_products, left @ right.T, atol=1e-12)
    true = np.linalg.svd(left @ right.T, compute_uv=False)
    np.testing.assert_allclose(found.cosines, true, atol=1e-12)
    assert one.overlap(one).mean_squared_cosine == pytest.approx(1)
    narrow = client.operator(checkpoint, batch, kind="ggn").eigsh(k=1, which="LA", tol=0.1).result()
    with pytest.raises(InvalidArgumentError) as refusal:
        one.overlap(narrow)
    assert refusal.value.reason == "VECTOR_SPACE_MISMATCH"


async def test_of_awaited_vectors_it_is_awaited(
    server: Server, small_llama_dir: Path, small_input_ids: NDArray[np.int64]
) -> None:
    async with AsyncClient(server.address) as client:
        checkpoint = await client.upload_checkpoint(small_llama_dir)
        batch = await client.upload_batch({"input_ids": small_input_ids})
        G = await client.operator(checkpoint, batch, kind="ggn", dtype="float64")
        found = await (await G.eigsh(k=2, which="LA", tol=1e-2)).result()
        overlap = await found.overlap(found)
        np.testing.assert_allclose(overlap.cosines, [1, 1])
        several = await found.eigenvectors[0].inner_products(found.eigenvectors)
        np.testing.assert_allclose(several, [1, 0], atol=1e-9)
        assert (await found.eigenvectors[0].inner_products([])).shape == (0,)
