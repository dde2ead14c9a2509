"""The diagonal, from the SDK and from the command line, against the dense matrix."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hvp_client import AsyncClient, Client, DiagonalResult, InvalidArgumentError, Operator, Vector
from numpy.typing import NDArray

from tests.client.conftest import Server
from tests.client.test_cli import hvp

Array = NDArray[np.float64]


@pytest.fixture
def small(
    server: Server, small_llama_dir: Path, small_input_ids: NDArray[np.int64]
) -> Iterator[Operator]:
    """The Hessian whose matrix is `dense`."""
    with Client(server.address) as client:
        batch = client.upload_batch({"input_ids": small_input_ids})
        yield client.operator(client.upload_checkpoint(small_llama_dir), batch, dtype="float64")


def within(found: DiagonalResult[Vector], true: Array, factor: float | None = None) -> float:
    """The share of the elements whose intervals hold the truth."""
    half = (factor or found.interval_factor) * found.standard_error.numpy() + found.rounding
    return float((np.abs(found.diagonal.numpy() - true) <= half).mean())


def test_every_coordinate_of_a_small_operator_gives_the_diagonal_and_its_sums(
    small: Operator, dense: Array
) -> None:
    found = small.diagonal(rtol=1e-9, per="tensor", max_products=400).result()
    assert (found.method, found.outcome) == ("exact", "CONVERGED")
    true = np.diag(dense)
    np.testing.assert_allclose(found.diagonal.numpy(), true, rtol=1e-10, atol=1e-15)
    assert not found.standard_error.numpy().any()
    assert found.norm == pytest.approx(float(np.linalg.norm(true)), rel=1e-12)
    assert found.relative_standard_error == 0
    assert [part.name for part in found.parts] == list(small.parameter_names)
    start = 0
    for part, tensor in zip(found.parts, small.parameter_tensors, strict=True):
        stop = start + part.num_parameters
        block = found.diagonal[tensor.name]
        np.testing.assert_array_equal(np.ravel(block), found.diagonal.numpy()[start:stop])
        assert part.value == pytest.approx(float(true[start:stop].sum()), rel=1e-9, abs=1e-12)
        assert part.low <= true[start:stop].sum() <= part.high
        start = stop
    assert start == len(dense)
    assert found.part(found.parts[0].name) == found.parts[0]
    with pytest.raises(KeyError):
        found.part("nothing")


@pytest.mark.parametrize("method", ["hutchinson", "xdiag", "auto"])
def test_estimates_are_within_their_errors_of_the_dense_diagonal(
    small: Operator, dense: Array, method: Any
) -> None:
    found = small.diagonal(method, max_products=120, rtol=1e-5).result()
    true = np.diag(dense)
    assert (found.outcome, found.num_products) == ("MAX_PRODUCTS", 120)
    assert found.method == (method if method != "auto" else "xdiag")
    assert within(found, true) >= 0.85  # of elements that share their random vectors
    assert within(found, true, 6) == 1
    error = float(np.linalg.norm(found.standard_error.numpy()))
    assert np.linalg.norm(found.diagonal.numpy() - true) <= 2 * error
    assert found.relative_standard_error == pytest.approx(error / found.norm)
    assert found.standard_error.numpy().min() >= 0


def test_sums_per_layer_are_those_of_the_estimate_with_errors_of_their_own(
    small: Operator, dense: Array
) -> None:
    found = small.diagonal(per="layer", max_products=100, rtol=0.001, seed=4).result()
    assert (found.method, found.num_probes) == ("hutchinson", 100)
    estimate, true = found.diagonal.numpy(), np.diag(dense)
    start = 0
    for part in found.parts:
        stop = start + part.num_parameters
        assert part.value == pytest.approx(float(estimate[start:stop].sum()), rel=1e-10, abs=1e-12)
        assert abs(part.value - true[start:stop].sum()) <= 5 * part.standard_error + 1e-12
        start = stop
    assert start == len(true)
    of_trace = small.trace(per="layer", max_products=100, rtol=0.001, seed=4).result()
    for ours, theirs in zip(found.parts, of_trace.parts, strict=True):
        assert ours.value == pytest.approx(theirs.value, rel=1e-12, abs=1e-12)
        assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), rel=1e-9)
    table = found.table()
    assert [row[0] for row in table.rows] == [part.name for part in found.parts]
    assert "MAX_PRODUCTS" in table.notes[0]
    assert table.notes[2] == f"diagonal: {found.diagonal.name}"


@pytest.mark.slow
def test_the_gauss_newton_matrix_and_selections_have_diagonals_too(
    client: Client, small: Operator, dense_ggn: NDArray[np.float64]
) -> None:
    G = client.operator(small.checkpoint, small.batch, kind="ggn", dtype="float64")
    true = np.diag(dense_ggn)
    # Of eight targets and a vocabulary of seven, G has a rank of 48 at most.
    found = G.diagonal("xdiag", max_products=128, rtol=1e-6).result()
    assert found.outcome == "CONVERGED"
    assert np.linalg.norm(found.diagonal.numpy() - true) <= 2e-6 * np.linalg.norm(true)
    norms = G.restrict("*norm*")
    part = norms.diagonal(max_products=norms.shape[0]).result()
    matrix = norms.matmat(np.eye(norms.shape[0]))
    np.testing.assert_allclose(part.diagonal.numpy(), np.diag(matrix), rtol=1e-10, atol=1e-15)
    assert part.diagonal.shape == norms.shape[:1]


def test_the_vectors_belong_to_the_job_and_progress_tells_the_estimate(small: Operator) -> None:
    job = small.diagonal("hutchinson", rtol=0.001, max_products=30)
    details = [event.progress.detail for event in job.watch() if event.progress]
    rows = [detail.table().rows[0] for detail in details if detail is not None]
    assert rows[-1][0] == "30"
    assert job.headline == "diagonal by hutchinson to 0.001"
    found = job.result()
    assert small.quadratic(found.standard_error) == pytest.approx(
        found.standard_error.dot(small @ found.standard_error)
    )
    again = job.result()
    assert again.diagonal.name == found.diagonal.name
    assert again.to_json()["diagonal"] == found.diagonal.name


def test_a_record_whose_error_is_infinite_is_json() -> None:
    found = DiagonalResult(
        diagonal=None,
        standard_error=None,
        norm=0.0,
        relative_standard_error=math.inf,
        interval_factor=2.0,
        num_probes=16,
        num_products=16,
        num_exact_products=0,
        outcome="MAX_PRODUCTS",
        method="hutchinson",
        reason="it was asked for",
        rounding=0.0,
        parts=(),
        loss=1.0,
        provenance={},
    )
    told = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert told["relative_standard_error"] is None
    assert found.table().rows == (("0", "inf", "2 standard errors"),)


async def test_the_awaited_side_gives_awaited_vectors(server: Server, small: Operator) -> None:
    async with AsyncClient(server.address) as client:
        H = await client.operator(small.checkpoint, small.batch, dtype="float64")
        found = await (await H.diagonal(max_products=20)).result()
        assert math.isclose(
            await found.standard_error.norm(), found.relative_standard_error * found.norm
        )


@pytest.mark.parametrize(
    ("values", "reason", "field"),
    [
        ({"method": "xtrace"}, "METHOD_UNSUPPORTED", "method"),
        ({"rtol": 1.0}, "RTOL_INVALID", "rtol"),
        ({"max_products": 1}, "MAX_PRODUCTS_INVALID", "max_products"),
        ({"per": "tensor", "method": "xdiag"}, "PER_UNSUPPORTED", "per"),
    ],
)
def test_a_diagonal_that_cannot_be_is_refused_before_it_is_queued(
    small: Operator, values: dict[str, Any], reason: str, field: str
) -> None:
    with pytest.raises(InvalidArgumentError) as refusal:
        small.diagonal(**values)
    assert (refusal.value.reason, refusal.value.field) == (reason, field)


def test_a_plan_counts_the_vectors_of_the_basis_and_of_the_result(small: Operator) -> None:
    plans = [
        small.plan("diagonal", method=method, max_products=128)
        for method in ("hutchinson", "xdiag")
    ]
    assert [plan.max_products for plan in plans] == [128, 128]
    assert all(plan.fits for plan in plans)
    assert plans[1].wished_bytes_per_rank > 5 * plans[0].wished_bytes_per_rank


def test_a_diagonal_from_the_command_line(server: Server, small: Operator) -> None:
    what = ("--checkpoint", small.checkpoint, "--ids", small.batch, "--address", server.address)
    asked = ("--max-products", "20", "--per", "layer", "--operator", "ggn")
    done = hvp("diagonal", *what, *asked, "--format", "json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["parts"][0]["name"] == "model.embed_tokens"
    with Client(server.address) as client:
        diagonal = client.vector(found["diagonal"]).numpy()
    assert found["parts"][0]["value"] == pytest.approx(
        float(diagonal[: found["parts"][0]["num_parameters"]].sum(dtype=np.float64)), rel=1e-4
    )
    shown = hvp("diagonal", *what, *asked)
    assert "95 % interval" in shown.stdout
    whole = hvp("diagonal", *what, "--max-products", "20")
    assert "relative standard error" in whole.stdout
