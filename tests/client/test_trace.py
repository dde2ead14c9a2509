"""The trace, from the SDK and from the command line, against the dense matrix."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hvp_client import Batch, Checkpoint, Client, InvalidArgumentError, Operator
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


def test_every_coordinate_of_a_small_operator_gives_the_diagonal_blocks(
    small_hessian: Operator, dense: NDArray[np.float64]
) -> None:
    found = small_hessian.trace(rtol=1e-9, per="tensor", max_products=400).result()
    assert (found.method, found.outcome, found.standard_error) == ("exact", "CONVERGED", 0)
    assert found.value == pytest.approx(np.trace(dense), rel=1e-10)
    assert [part.name for part in found.parts] == list(small_hessian.parameter_names)
    diagonal, start = np.diag(dense), 0
    for part in found.parts:
        stop = start + part.num_parameters
        block = diagonal[start:stop].sum()
        assert part.value == pytest.approx(block, rel=1e-9, abs=1e-12)
        assert part.low <= block <= part.high
        start = stop
    assert start == len(dense)
    assert found.part(found.parts[0].name) == found.parts[0]
    with pytest.raises(KeyError):
        found.part("nothing")


@pytest.mark.parametrize("per", ["tensor", "layer"])
def test_blocks_are_estimated_from_the_probes_of_the_whole(
    small_hessian: Operator, dense: NDArray[np.float64], per: Any
) -> None:
    found = small_hessian.trace(per=per, max_products=100, rtol=0.001, seed=4).result()
    assert (found.method, found.outcome, found.num_products) == ("hutchinson", "MAX_PRODUCTS", 100)
    assert math.fsum(part.value for part in found.parts) == pytest.approx(found.value, rel=1e-12)
    assert abs(found.value - np.trace(dense)) <= 4 * found.standard_error
    blocks: dict[str, float] = {}
    start = 0
    for tensor in small_hessian.parameter_tensors:
        name = tensor.name
        if per == "layer":
            name = ".".join(name.split(".")[:3]) if ".layers." in name else name.rpartition(".")[0]
        stop = start + math.prod(tensor.shape)
        blocks[name] = blocks.get(name, 0) + float(np.diag(dense)[start:stop].sum())
        start = stop
    assert [part.name for part in found.parts] == list(blocks)
    for part in found.parts:
        assert abs(part.value - blocks[part.name]) <= 5 * part.standard_error + 1e-12
    table = found.table()
    assert len(table.rows) == 1 + len(blocks)
    assert "MAX_PRODUCTS" in table.notes[0]


@pytest.mark.parametrize("method", ["hutchinson", "hutch++", "xtrace", "xnystrace"])
def test_every_method_gives_the_trace_of_the_gauss_newton_matrix(
    client: Client, small: tuple[str, str], dense_ggn: NDArray[np.float64], method: Any
) -> None:
    checkpoint, batch = client.checkpoint(small[0]), client.batch(small[1])
    true = np.trace(dense_ggn)
    G = client.operator(checkpoint, batch, kind="ggn", dtype="float64")
    found = G.trace(method, max_products=90, rtol=1e-9).result()
    assert found.method == method
    assert abs(found.value - true) <= 5 * found.standard_error + found.rounding
    assert found.loss > 0
    assert found.num_products <= 90
    # Of eight targets and a vocabulary of seven, G has a rank of 48 at most.
    if method == "xnystrace":
        assert found.standard_error == 0
        assert found.interval[0] <= true <= found.interval[1]


def test_progress_and_headline_tell_the_estimate(small_hessian: Operator) -> None:
    job = small_hessian.trace(method="hutchinson", rtol=0.001, max_products=30)
    details = [event.progress.detail for event in job.watch() if event.progress]
    rows = [detail.table().rows[0] for detail in details if detail is not None]
    assert rows[-1][0] == "30"
    assert job.headline == "trace by hutchinson to 0.001"


@pytest.mark.parametrize(
    ("values", "reason", "field"),
    [
        ({"method": "xnystrace"}, "METHOD_UNSUPPORTED", "method"),
        ({"rtol": 1.0}, "RTOL_INVALID", "rtol"),
        ({"max_products": 1}, "MAX_PRODUCTS_INVALID", "max_products"),
        ({"per": "tensor", "method": "hutch++"}, "PER_UNSUPPORTED", "per"),
    ],
)
def test_a_trace_that_cannot_be_is_refused_before_it_is_queued(
    small_hessian: Operator, values: dict[str, Any], reason: str, field: str
) -> None:
    with pytest.raises(InvalidArgumentError) as refusal:
        small_hessian.trace(**values)
    assert (refusal.value.reason, refusal.value.field) == (reason, field)


def test_a_plan_tells_what_a_trace_takes(small_hessian: Operator) -> None:
    plan = small_hessian.plan("trace", method="xtrace", max_products=40)
    assert plan.max_products == 40
    assert plan.fits


def test_a_trace_from_the_command_line(
    server: Server, checkpoint: Checkpoint, batch: Batch
) -> None:
    what = ("--checkpoint", checkpoint.name, "--ids", batch.name, "--address", server.address)
    asked = ("--max-products", "20", "--per", "layer", "--operator", "ggn")
    done = hvp("trace", *what, *asked, "--format", "json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["low"] < found["value"] < found["high"]
    assert found["parts"][0]["name"] == "model.embed_tokens"
    shown = hvp("trace", *what, "--max-products", "16", "--method", "hutch++")
    assert "95 % interval" in shown.stdout
    assert "it was asked for" in " ".join(shown.stdout.split())
