"""Blocks, vectors to begin with, and jobs that go on from others: through a real server."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hvp_client import (
    Batch,
    Checkpoint,
    Client,
    FailedPreconditionError,
    InvalidArgumentError,
    JobFailedError,
    NotFoundError,
    Operator,
)

from tests.client.conftest import Server
from tests.client.test_cli import hvp


def test_a_search_in_blocks_finds_the_eigenvalues(H: Operator) -> None:
    single = H.eigsh(2, "LM", tol=1e-3).result()
    found = H.eigsh(2, "LM", tol=1e-3, block_size=4).result()
    assert (single.outcome, found.outcome) == ("CONVERGED", "CONVERGED")
    assert (single.provenance["block_size"], found.provenance["block_size"]) == ("1", "4")
    np.testing.assert_allclose(found.eigenvalues, single.eigenvalues, rtol=1e-4)


def test_a_result_is_what_another_search_begins_with(H: Operator) -> None:
    cold = H.eigsh(3, "LM", tol=1e-4).result()
    for v0 in (cold, np.stack([np.asarray(v) for v in cold.eigenvectors], 1)):
        warm = H.eigsh(3, "LM", tol=1e-3, v0=v0, seed=1).result()
        assert warm.outcome == "CONVERGED"
        searched = warm.num_products - warm.completeness.num_products - 3
        assert searched <= 4
        np.testing.assert_allclose(warm.eigenvalues, cold.eigenvalues, rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"block_size": 5}, "BLOCK_SIZE_INVALID"),
        ({"block_size": -1}, "BLOCK_SIZE_INVALID"),
        ({"block_size": 2.0}, "BLOCK_SIZE_INVALID"),
        ({"v0": np.full(3, 1.0)}, "SHAPE_MISMATCH"),
    ],
)
def test_blocks_and_vectors_that_cannot_be_are_refused(
    H: Operator, arguments: dict[str, Any], reason: str
) -> None:
    with pytest.raises(InvalidArgumentError) as refusal:
        H.eigsh(2, **arguments)
    assert refusal.value.reason == reason


def test_vectors_to_begin_with_that_are_none_are_refused(client: Client, H: Operator) -> None:
    for bad in (np.nan, np.inf):
        with pytest.raises(InvalidArgumentError, match="NON_FINITE"):
            H.eigsh(2, v0=np.full(H.shape[0], bad))
    other = client.operator(H.checkpoint, H.batch, dtype="float32")
    with pytest.raises(InvalidArgumentError, match="VECTOR_SPACE_MISMATCH"):
        H.eigsh(2, v0=other.random_vector(seed=1))
    one = H.random_vector(seed=1)
    with pytest.raises(InvalidArgumentError, match="V0_INVALID"):
        H.eigsh(2, v0=[one] * 1025)
    with pytest.raises(JobFailedError, match="V0_INVALID"):
        H.eigsh(2, v0=[one, one - one]).result()


def test_a_density_is_extended_by_probes_and_is_that_of_one_long_run(H: Operator) -> None:
    # Eight probes go in one call: so both runs make the very same ones.
    job = H.density(num_probes=8, num_steps=5, seed=2)
    short = job.result()
    longer = job.extend(num_probes=16, labels={"more": "probes"})
    assert (longer.extends, longer.labels) == (job.name, {"more": "probes"})
    result, whole = longer.result(), H.density(num_probes=16, num_steps=5, seed=2).result()
    assert (short.num_products, result.num_products, whole.num_products) == (40, 40, 80)
    np.testing.assert_array_equal(result.nodes, whole.nodes)
    np.testing.assert_array_equal(result.weights, whole.weights)


def test_a_trace_is_extended_by_samples_and_is_that_of_one_long_run(H: Operator) -> None:
    asked: dict[str, Any] = {"method": "hutchinson", "per": "layer", "rtol": 1e-6, "seed": 1}
    job = H.trace(max_products=24, **asked)
    short, result = job.result(), job.extend(max_products=16).result()
    whole = H.trace(max_products=40, **asked).result()
    assert (short.num_products, result.num_products, result.num_probes) == (24, 16, 40)
    assert (result.value, result.interval) == (whole.value, whole.interval)
    assert result.parts == whole.parts
    assert "levels" not in result.to_json()


def test_a_trace_of_a_function_is_extended_by_probes(H: Operator) -> None:
    job = H.trace_of("count", low=1.0, num_steps=4, max_products=12, atol=1e9, seed=2)
    short, longer = job.result(), job.extend(max_products=64)
    result = longer.result()
    assert (short.outcome, short.num_probes < 16) == ("MAX_PRODUCTS", True)
    assert (result.outcome, result.num_probes, len(result.probes)) == ("CONVERGED", 16, 16)
    values = [each.value for each in result.probes]
    assert values[: short.num_probes] == [each.value for each in short.probes]
    assert result.num_products <= 40
    np.testing.assert_allclose(result.value, np.mean(values), rtol=1e-12)
    error = np.std(values, ddof=1) / len(values) ** 0.5
    np.testing.assert_allclose(result.standard_error, error, rtol=1e-9)
    assert result.to_json().keys().isdisjoint({"levels", "spectrum_low", "spectrum_high"})
    nothing = longer.extend().result()
    assert (nothing.num_products, nothing.value) == (0, result.value)


def test_a_diagonal_is_extended_from_vectors_that_the_new_job_keeps(H: Operator) -> None:
    job = H.diagonal("hutchinson", rtol=1e-6, max_products=24, per="layer", seed=1)
    first = job.result()
    longer = job.extend(max_products=16)
    job.delete()
    result = longer.result()
    assert (result.num_products, result.num_probes, result.num_samples) == (16, 40, 40)
    whole = H.diagonal("hutchinson", rtol=1e-6, max_products=40, per="layer", seed=1).result()
    for name in ("diagonal", "standard_error"):
        mine, other = (getattr(each, name).numpy() for each in (result, whole))
        np.testing.assert_allclose(mine, other, rtol=1e-9, atol=1e-12)
    for part, other in zip(result.parts, whole.parts, strict=True):
        np.testing.assert_allclose((part.low, part.high), (other.low, other.high), rtol=1e-9)
    with pytest.raises(NotFoundError):
        first.diagonal.numpy()
    with pytest.raises(NotFoundError):
        job.extend(max_products=16)


def test_a_search_and_a_solve_go_on_from_what_they_found(H: Operator) -> None:
    job = H.eigsh(3, "LM", tol=1e-4)
    first = job.result()
    longer = job.extend(tol=1e-3, block_size=2)
    result = longer.result()
    assert (result.outcome, longer.spec["seed"]) == ("CONVERGED", 1)
    assert longer.spec["v0"] == tuple(v.name for v in first.eigenvectors)
    assert result.num_products - result.completeness.num_products <= 4 + 3
    more = longer.extend(k=4, tol=1e-6).result()
    expected = H.eigsh(4, "LM", tol=1e-6).result()
    np.testing.assert_allclose(more.eigenvalues, expected.eigenvalues, rtol=1e-6)
    b = H.random_vector(seed=5)
    solving = H.solve(b, damping=5.0, tol=1e-2)
    solving.result()
    solved = solving.extend(tol=1e-4).result()
    assert solved.outcomes == ("CONVERGED",)
    assert solved.systems[0].relative_residual <= 1e-4


def test_a_job_is_extended_after_it_and_without_it(H: Operator) -> None:
    job = H.density(num_probes=2, num_steps=3)
    job.result()
    longer = job.extend(num_probes=3)
    job.delete()
    assert len(longer.result().nodes) == 3
    with pytest.raises(NotFoundError):
        job.extend(num_probes=4)


def test_what_cannot_be_extended_is_refused_and_says_what_can(H: Operator) -> None:
    job = H.density(num_probes=2, num_steps=3)
    job.result()
    with pytest.raises(InvalidArgumentError, match="EXTENSION_MISMATCH") as unknown:
        job.extend(num_steps=4)
    assert "it can change num_probes" in str(unknown.value)
    with pytest.raises(InvalidArgumentError, match="NUM_PROBES_INVALID"):
        job.extend(num_probes="many")
    with pytest.raises(FailedPreconditionError, match="EXTENSION_UNSUPPORTED"):
        job.extend(num_probes=2)
    sketched = H.trace("xtrace", max_products=20, rtol=1e-9)
    sketched.result()
    with pytest.raises(FailedPreconditionError, match="only a job by hutchinson"):
        sketched.extend(max_products=20)
    known = H.diagonal("xdiag", max_products=24, rtol=1e-9)
    for vector in (known.result().diagonal, known.result().standard_error):
        vector.delete()
    with pytest.raises(NotFoundError):
        known.extend(max_products=24)
    failed = H.eigsh(1, v0=H.random_vector(seed=1) * 0.0)
    with pytest.raises(JobFailedError):
        failed.result()
    with pytest.raises(FailedPreconditionError, match="JOB_NOT_SUCCEEDED"):
        failed.extend(tol=1e-3)


def test_blocks_are_asked_for_on_the_command_line(
    server: Server, checkpoint: Checkpoint, batch: Batch, H: Operator
) -> None:
    v = H.random_vector(seed=1).name
    ran = hvp(
        "eigsh", "--address", server.address, "--checkpoint", checkpoint.name, "--ids",
        batch.name, "-k", "1", "--which", "LM", "--tol", "1e-2", "--dtype", "float64",
        "--block-size", "2", "--v0", v, "--format", "json",
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found["provenance"]["block_size"] == "2"
