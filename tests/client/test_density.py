"""The spectral density, from the SDK to a picture, against the dense Hessian."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hvp_client import Batch, Checkpoint, Client, DensityResult, InvalidArgumentError, Operator
from numpy.typing import NDArray

from tests.client.conftest import Server
from tests.client.test_cli import hvp

STEPS = 6


@pytest.fixture(scope="module")
def found(
    server: Server, small_llama_dir: Path, small_input_ids: NDArray[np.int64]
) -> DensityResult:
    with Client(server.address) as client:
        batch = client.upload_batch({"input_ids": small_input_ids})
        H = client.operator(client.upload_checkpoint(small_llama_dir), batch, dtype="float64")
        return H.density(num_probes=12, num_steps=STEPS, seed=5).result()


def test_every_probe_sees_the_whole_spectrum(found: DensityResult) -> None:
    assert found.nodes.shape == found.weights.shape == (12, STEPS)
    np.testing.assert_allclose(found.weights.sum(1), 1, rtol=1e-12)
    assert (found.weights >= 0).all()
    assert found.orthogonality_defect < 1e-12
    assert found.num_products == 12 * STEPS
    assert found.loss > 0


def test_trace_and_moments_lie_within_their_standard_errors_of_the_dense_ones(
    found: DensityResult, dense: NDArray[np.float64]
) -> None:
    n = len(dense)
    assert found.num_parameters == n
    trace = found.trace()
    assert abs(trace.value - np.trace(dense)) <= 4 * trace.standard_error
    values, errors = found.moments(4)
    power = np.eye(n)
    for value, error in zip(values, errors, strict=True):
        assert abs(value - np.trace(power) / n) <= 4 * error + 1e-12
        power = power @ dense


def test_the_density_integrates_to_one_and_its_picture_is_drawn(
    found: DensityResult, tmp_path: Path
) -> None:
    low, high = found.nodes.min(), found.nodes.max()
    width = (high - low) / 20
    x = np.linspace(low - 6 * width, high + 6 * width, 4001)
    mean, _ = found.density(x, width)
    assert np.trapezoid(mean, x) == pytest.approx(1, rel=1e-6)
    found.plot(tmp_path / "density.png")
    assert (tmp_path / "density.png").read_bytes().startswith(b"\x89PNG")


def test_progress_tells_the_ends_of_the_spectrum(H: Operator) -> None:
    job = H.density(num_probes=2, num_steps=3)
    details = [event.progress.detail for event in job.watch() if event.progress]
    lines = [detail.table().rows[0] for detail in details if detail is not None]
    assert lines
    assert job.headline == "density 2 probes x 3 steps"


@pytest.mark.parametrize(
    ("values", "field"),
    [({"num_probes": 0}, "num_probes"), ({"num_steps": 0}, "num_steps"), ({"seed": -1}, "seed")],
)
def test_a_density_that_cannot_be_is_refused_before_it_is_queued(
    H: Operator, values: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidArgumentError) as refusal:
        H.density(**values)
    assert (refusal.value.reason, refusal.value.field) == (f"{field.upper()}_INVALID", field)


def test_a_plan_tells_what_a_density_takes(H: Operator) -> None:
    plan = H.plan("density", num_probes=3, num_steps=7)
    assert plan.max_products == 21
    assert plan.fits
    assert plan.table().rows[0] == ("products", "at most 21")
    with pytest.raises(InvalidArgumentError, match=r"density, .*eigsh, .*trace") as refusal:
        H.plan("prophecy")
    assert refusal.value.reason == "OPERATION_UNKNOWN"


def test_a_density_from_the_command_line(
    server: Server, checkpoint: Checkpoint, batch: Batch, tmp_path: Path
) -> None:
    what = ("--checkpoint", checkpoint.name, "--ids", batch.name, "--address", server.address)
    picture = tmp_path / "density.svg"
    done = hvp("density", *what, "--num-probes", "2", "--num-steps", "4", "--plot", picture)
    assert done.returncode == 0, done.stderr
    assert "trace" in done.stdout
    assert "±" in done.stdout
    assert "<svg" in picture.read_text()
    planned = hvp("density", *what, "--plan", "--format", "json")
    assert json.loads(planned.stdout)["max_products"] == 8 * 80
    nowhere = hvp("density", *what, "--plot", tmp_path / "none" / "x.png")
    assert nowhere.returncode == 2
    assert "in no folder that there is" in nowhere.stderr
