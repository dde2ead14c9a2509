"""Masses of blocks, from the SDK and from the command line, against the dense matrix."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hvp_client import (
    BlockMassResult,
    Client,
    FailedPreconditionError,
    InvalidArgumentError,
    Operator,
)
from hvp_operations.block_mass.picture import draw
from numpy.typing import NDArray

from tests.client.conftest import Server
from tests.client.test_cli import hvp


@pytest.fixture(scope="module")
def small(
    server: Server, small_llama_dir: Path, small_input_ids: NDArray[np.int64]
) -> tuple[str, str]:
    """Names of the checkpoint and of the batch that `dense` is of."""
    with Client(server.address) as client:
        batch = client.upload_batch({"input_ids": small_input_ids})
        return client.upload_checkpoint(small_llama_dir).name, batch.name


@pytest.fixture
def small_hessian(client: Client, small: tuple[str, str]) -> Operator:
    checkpoint = client.checkpoint(small[0])
    return client.operator(checkpoint, client.batch(small[1]), dtype="float64")


def masses_of(H: Operator, dense: NDArray[np.float64], layers: list[list[str]]) -> Any:
    """The squared Frobenius norms of the blocks of layers."""
    of = np.concatenate(
        [
            np.full(math.prod(each.shape), [each.name in layer for layer in layers].index(True))
            for each in H.parameter_tensors
        ]
    )
    indicator = np.eye(len(layers))[of]
    return indicator.T @ dense**2 @ indicator


def test_masses_are_those_of_the_dense_matrix_and_jobs_are_extended(
    small_hessian: Operator, dense: NDArray[np.float64], tmp_path: Path
) -> None:
    H = small_hessian
    blocks = H.blocks(by="layer")
    true = masses_of(H, dense, [list(each.parameter_names) for each in blocks.values()])
    job = H.block_mass(num_probes=10, rtol=1e-6, seed=3)
    short, found = job.result(), job.extend(num_probes=24).result()
    with pytest.raises(FailedPreconditionError, match="has 10 already; ask for more"):
        job.extend(num_probes=8)
    assert "levels" not in repr(found)
    assert list(found.blocks) == list(blocks)
    assert found.block_sizes.tolist() == [each.shape[0] for each in blocks.values()]
    assert (short.num_probes, found.num_probes) == (10, 24)
    assert found.num_products == 14 * len(blocks)
    assert (found.outcome, found.converged) == ("MAX_PRODUCTS", False)
    assert (np.abs(found.masses - true) <= 5 * found.standard_errors + 1e-15).all()
    fraction = 1 - np.trace(true) / true.sum()
    assert abs(found.off_block_fraction - fraction) <= 5 * found.standard_error
    assert found.interval[0] < found.off_block_fraction < found.interval[1]
    assert found.diagonal_fraction + found.off_block_fraction == 1
    assert found.shares.sum() == pytest.approx(1, rel=1e-14)
    whole = H.block_mass(num_probes=24, rtol=1e-6, seed=3).result()
    np.testing.assert_array_equal(found.masses, whole.masses)
    assert found.interval == whole.interval
    found.plot(tmp_path / "mass.png")
    assert (tmp_path / "mass.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="suffix"):
        found.plot(tmp_path / "mass")


def test_blocks_may_be_patterns_and_a_part_of_the_operator(
    small_hessian: Operator, dense: NDArray[np.float64]
) -> None:
    part = small_hessian.restrict("model.layers.*")
    job = part.block_mass({"attention": "*.self_attn.*", "rest": ["*.mlp.*", "*norm*"]}, rtol=0.3)
    assert job.headline == "mass outside of blocks by 2 blocks to 0.3"
    details = [event.progress.detail for event in job.watch() if event.progress]
    told = [detail.table().rows[0] for detail in details if detail is not None]
    found = job.result()
    assert told[-1][0] == str(found.num_probes)
    assert list(found.blocks) == ["attention", "rest"]
    assert found.block_sizes.sum() == part.shape[0]
    rows = found.table().rows
    assert [row[0] for row in rows] == ["attention", "rest"]
    assert rows[0][-1] == "rest"
    assert found.outcome in found.table().notes[0]


@pytest.mark.parametrize(
    ("values", "reason", "field"),
    [
        ({"by": ["model.*", "nothing.*"]}, "PARAMETERS_NOT_FOUND", "by"),
        ({"by": ["model.*", "*.mlp.*"]}, "PARAMETERS_INVALID", "by"),
        ({"by": ["*.mlp.*"]}, "PARAMETERS_INVALID", "by"),
        ({"by": ["*"]}, "BY_INVALID", "by"),
        ({"by": 7}, "PARAMETERS_INVALID", "by"),
        ({"num_probes": 1}, "NUM_PROBES_INVALID", "num_probes"),
        ({"rtol": 2.0}, "RTOL_INVALID", "rtol"),
        ({"max_products": 11}, "MAX_PRODUCTS_INVALID", "max_products"),
    ],
)
def test_a_partition_that_cannot_be_is_refused_before_it_is_queued(
    small_hessian: Operator, values: dict[str, Any], reason: str, field: str
) -> None:
    with pytest.raises(InvalidArgumentError) as refusal:
        small_hessian.block_mass(**values)
    assert (refusal.value.reason, refusal.value.field) == (reason, field)


def test_a_plan_counts_a_product_for_each_block(small_hessian: Operator) -> None:
    plan = small_hessian.plan("block_mass", by="tensor", num_probes=16)
    assert plan.max_products == (16 + 8) * len(small_hessian.parameter_names)


def test_the_command_line_takes_the_patterns_of_each_block(
    server: Server, small: tuple[str, str], tmp_path: Path
) -> None:
    what = ("--checkpoint", small[0], "--ids", small[1], "--address", server.address)
    asked = ("block_mass", *what, "--dtype", "float64", "--atol", "0.5")
    picture = tmp_path / "mass.svg"
    by = ("--by", "*.self_attn.*,model.embed*", "--by", "*.mlp.*,*norm*")
    done = hvp(*asked, *by, "--format", "json", "--plot", picture)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["outcome"] == "CONVERGED"
    assert len(told["blocks"]) == len(told["masses"]) == len(told["masses"][0]) == 2
    assert told["low"] <= told["off_block_fraction"] <= told["high"]
    assert "off the diagonal" in picture.read_text()


def made(shares: Any, **more: Any) -> BlockMassResult:
    shares = np.array(shares, np.float64)
    values: dict[str, Any] = {
        "blocks": [f"model.layers.{index}" for index in range(len(shares))],
        "block_sizes": np.full(len(shares), 10.0),
        "masses": shares.reshape(-1),
        "standard_errors": 0.1 * shares.reshape(-1),
        "off_block_fraction": 0.25,
        "standard_error": 0.01,
        "low": 0.23,
        "high": 0.27,
        "rounding": 0.0,
        "outcome": "CONVERGED",
        "num_probes": 16,
        "num_products": 16 * len(shares),
        "num_exact_products": 0,
        "loss": 1.5,
        "provenance": {"operator": "ggn", "dtype": "float64"},
    }
    return BlockMassResult(**{**values, **more})


@pytest.mark.parametrize(
    "shares",
    [[[3, 0], [0, 1]], [[3, -1e-9], [-1e-9, 1]], np.full((2, 2), 0.25), np.ones((60, 60))],
    ids=["diagonal", "below zero", "even", "many"],
)
def test_any_masses_can_be_drawn(shares: Any, tmp_path: Path) -> None:
    draw(made(shares), "a matrix", tmp_path / "mass.svg")
    drawn = (tmp_path / "mass.svg").read_text()
    assert "<!-- model.layers.0 -->" in drawn
    assert "95 % interval 0.23 to 0.27" in drawn


def test_of_a_zero_operator_the_record_says_so(tmp_path: Path) -> None:
    nothing = {"off_block_fraction": math.nan, "standard_error": math.inf, "low": 0.0, "high": 1.0}
    found = made(np.zeros((2, 2)), outcome="ZERO_OPERATOR", **nothing)
    assert np.isnan(found.shares).all()
    told = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert (told["off_block_fraction"], told["standard_error"]) == (None, None)
    assert "no fraction of nothing" in found.table().notes[0]
    assert not found.converged
    with pytest.raises(ValueError, match="no mass to draw"):
        found.plot(tmp_path / "mass.png")
