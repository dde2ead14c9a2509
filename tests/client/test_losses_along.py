"""The loss along directions, from the SDK: values, prediction, measured curvature, refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hvp_client import AsyncClient, Batch, Checkpoint, Client, InvalidArgumentError, Operator

from tests.client.conftest import Server


def test_measured_and_predicted_curvature_agree_along_an_eigenvector(
    H: Operator, tmp_path: Path
) -> None:
    top = H.eigsh(k=1, which="LM", tol=1e-8).result()
    u, value = top.eigenvectors[0], top.eigenvalues[0]
    grid = np.linspace(-0.004, 0.004, 9)
    slice_ = H.loss_along(u, grid)
    assert slice_.losses.shape == (9,)
    assert slice_.losses[4] == pytest.approx(H.loss(), rel=1e-12)
    assert slice_.slopes == pytest.approx([H.slope(u)], rel=1e-9)
    assert slice_.curvatures[0, 0] == pytest.approx(value, rel=1e-7)
    assert slice_.measured_curvature() == pytest.approx(value, rel=1e-4)
    np.testing.assert_allclose(slice_.predicted, slice_.losses, rtol=1e-4)
    slice_.plot(tmp_path / "slice.png")
    assert (tmp_path / "slice.png").stat().st_size > 10_000
    assert "9 points" in repr(slice_)


def test_two_directions_make_a_map(H: Operator, tmp_path: Path) -> None:
    u, v = H.random_vector(seed=1), H.random_vector(seed=2)
    axes = (np.array([-1e-3, 0.0, 1e-3]), np.array([-2e-3, -1e-3, 0.0, 1e-3, 2e-3]))
    found = H.loss_along([u, v], axes)
    assert found.losses.shape == (3, 5)
    one = H.loss_along(u * axes[0][2] + v * axes[1][0], [1.0])
    assert found.losses[2, 0] == pytest.approx(one.losses[0], rel=1e-13)
    assert found.curvatures[0, 1] == pytest.approx(u.dot(H @ v), rel=1e-9)
    assert found.measured_curvature(1) == pytest.approx(found.curvatures[1, 1], rel=1e-3)
    np.testing.assert_allclose(found.predicted, found.losses, rtol=1e-5)
    found.plot(tmp_path / "map.png")
    arrays = H.loss_along(np.stack([u.numpy(), v.numpy()], axis=1), axes)
    np.testing.assert_array_equal(arrays.losses, found.losses)


async def test_the_awaited_side_has_the_same(
    server: Server, checkpoint: Checkpoint, batch: Batch
) -> None:
    async with AsyncClient(server.address) as client:
        H = await client.operator(checkpoint, batch, dtype="float64")
        found = await H.loss_along(await H.random_vector(seed=1), [0.0])
        assert found.losses[0] == pytest.approx(await H.loss(), rel=1e-12)


def test_what_is_no_grid_or_no_direction_is_refused(
    client: Client, checkpoint: Checkpoint, batch: Batch, H: Operator
) -> None:
    v = H.random_vector(seed=1)
    single = client.operator(checkpoint, batch).random_vector(seed=1)
    for directions, grid, reason in [
        (v, [], "POINTS_INVALID"),
        (v, [np.inf], "POINTS_INVALID"),
        (v, [[0.0]], "POINTS_INVALID"),
        ([v, v], [0.0], "POINTS_INVALID"),
        ([v, v, v], ([0.0],) * 3, "POINTS_INVALID"),
        ([], [0.0], "SHAPE_MISMATCH"),
        (single, [0.0], "VECTOR_SPACE_MISMATCH"),
        (np.ones(3), [0.0], "SHAPE_MISMATCH"),
    ]:
        with pytest.raises(InvalidArgumentError) as refusal:
            H.loss_along(directions, grid)
        assert refusal.value.reason == reason
    # -0.1 + 4/6 · 0.2 is not quite the opposite of its kin.
    assert H.loss_along(v, np.linspace(-1e-3, 1e-3, 7)).measured_curvature() == pytest.approx(
        v.dot(H @ v), rel=1e-2
    )
    with pytest.raises(InvalidArgumentError, match="symmetric"):
        H.loss_along(v, [0.0, 1.0]).measured_curvature()
