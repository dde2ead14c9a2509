"""Traces of functions, from the SDK and from the command line, against the dense matrix."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hvp_client import (
    AsyncClient,
    Batch,
    Checkpoint,
    Client,
    InvalidArgumentError,
    Operator,
    TraceOfResult,
)
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


@pytest.fixture(scope="module")
def eigenvalues(dense: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of the small model's H."""
    return np.linalg.eigvalsh(dense).astype(np.float64)


@pytest.fixture(scope="module")
def of_ggn(dense_ggn: NDArray[np.float64]) -> NDArray[np.float64]:
    """Eigenvalues of the small model's Gauss-Newton matrix."""
    return np.linalg.eigvalsh(dense_ggn).clip(0).astype(np.float64)


def of(client: Client, small: tuple[str, str], **more: Any) -> Operator:
    checkpoint = client.checkpoint(small[0])
    return client.operator(checkpoint, client.batch(small[1]), **{"dtype": "float64", **more})


def true_value(function: str, values: NDArray[np.float64]) -> float:
    return float(
        {"log": np.log, "exp": np.exp, "inverse": np.reciprocal, "sqrt": np.sqrt}[function](
            values
        ).sum()
    )


@pytest.mark.parametrize("function", ["log", "exp", "inverse", "sqrt"])
def test_each_function_of_a_hessian_lies_in_its_interval(
    client: Client,
    small: tuple[str, str],
    eigenvalues: NDArray[np.float64],
    function: Any,
) -> None:
    H = of(client, small)
    damping = 3 - float(eigenvalues[0])
    found = H.trace_of(function, damping=damping, max_products=80, seed=1).result()
    assert found.outcome in ("CONVERGED", "MAX_PRODUCTS")
    assert found.low <= true_value(function, eigenvalues + damping) <= found.high
    assert found.low <= found.value <= found.high
    assert found.num_products <= 80
    assert eigenvalues[0] - 1e-5 <= found.smallest <= found.largest <= eigenvalues[-1] + 1e-5
    assert found.num_parameters == len(eigenvalues)


def test_a_hessian_with_negative_eigenvalues_has_no_log_determinant_and_says_what_helps(
    client: Client, small: tuple[str, str], eigenvalues: NDArray[np.float64]
) -> None:
    H = of(client, small)
    found = H.logdet(damping=1e-6).result()
    assert (found.outcome, found.converged) == ("INDEFINITE", False)
    assert math.isnan(found.value)
    assert found.interval == (-math.inf, math.inf)
    assert eigenvalues[0] - 1e-9 <= found.smallest < -1e-6
    assert f"a damping above {-found.smallest:.6g}" in found.table().notes[0]
    document = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert document["value"] is document["low"] is None
    # What the probes have seen gives other functions of the same matrix.
    value, error = found.estimate(lambda values: values)
    assert abs(value - eigenvalues.sum()) < 6 * error
    with pytest.raises(ValueError, match="one for each"):
        found.estimate(lambda values: 1.0)
    with pytest.raises(ValueError, match="nothing to draw"):
        found.plot("picture.png")


def test_eigenvalues_are_counted_where_nobody_computed_them(
    client: Client, small: tuple[str, str], eigenvalues: NDArray[np.float64]
) -> None:
    H = of(client, small)
    gap = int(np.argmax(np.diff(eigenvalues[-20:]))) + len(eigenvalues) - 20
    end = float(eigenvalues[gap : gap + 2].mean())
    above = H.count(end, max_products=80, seed=3)
    assert above.headline == f"count of eigenvalues of A in ({end:g}, inf]"
    found = above.result()
    assert found.low - 1e-6 <= len(eigenvalues) - 1 - gap <= found.high + 1e-6
    everything = H.count().result()
    assert everything.interval == pytest.approx((len(eigenvalues),) * 2)
    positive = H.count(0.0, max_products=60).result()  # zero is an end like others
    assert positive.low <= (eigenvalues > 0).sum() <= positive.high
    assert positive.value < len(eigenvalues) - 1


@pytest.mark.parametrize(("kind", "function"), [("hessian", "inverse"), ("ggn", "log")])
def test_in_bfloat16_intervals_are_those_of_the_exact_operator(
    client: Client,
    small: tuple[str, str],
    eigenvalues: NDArray[np.float64],
    of_ggn: NDArray[np.float64],
    kind: str,
    function: Any,
) -> None:
    values = eigenvalues if kind == "hessian" else of_ggn
    coarse = of(client, small, kind=kind, dtype="float32", precision="bfloat16")
    damping = 0.5 - min(0.0, float(values[0]))
    found = coarse.trace_of(function, damping=damping, max_products=50).result()
    assert found.low <= true_value(function, values + damping) <= found.high
    assert found.num_exact_products == found.num_products
    assert found.outcome != "UNVERIFIED"


@pytest.fixture(scope="module")
def found(server: Server, small: tuple[str, str]) -> TraceOfResult:
    """The log determinant of the Gauss-Newton matrix."""
    with Client(server.address) as client:
        G = of(client, small, kind="ggn")
        return G.logdet(damping=0.01, max_products=100, rtol=1e-4).result()


def test_a_result_tells_what_each_probe_has_seen(
    found: TraceOfResult, of_ggn: NDArray[np.float64]
) -> None:
    assert len(found.probes) == found.num_probes
    assert all(each.low <= each.value <= each.high for each in found.probes)
    mean = np.mean([each.value for each in found.probes])
    assert found.value == pytest.approx(float(mean), rel=1e-12)
    value, error = found.estimate(lambda t: np.log(t + 0.01))
    assert value == pytest.approx(found.value, abs=2 * found.quadrature_error + 1e-9)
    assert error == pytest.approx(found.standard_error, rel=1e-2)
    other, error = found.estimate(lambda t: np.log(t + 0.1))
    assert abs(other - np.log(of_ggn + 0.1).sum()) < 5 * error
    assert found.low <= np.log(of_ggn + 0.01).sum() <= found.high


def test_a_table_says_the_parts_of_what_is_not_known(found: TraceOfResult) -> None:
    table = found.table()
    assert [row[0] for row in table.rows] == [
        "value",
        "95 % interval",
        "standard error, over the probes",
        "open by finitely many steps",
        "open by rounding",
        "Ritz values of A",
    ]
    assert table.notes[0].startswith("MAX_PRODUCTS: The budget of products ran out")
    document = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert document["probes"][0]["nodes"] == list(found.probes[0].quadrature.nodes)


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_it_can_be_drawn(found: TraceOfResult, tmp_path: Path, suffix: str) -> None:
    found.plot(tmp_path / f"logdet{suffix}")
    assert (tmp_path / f"logdet{suffix}").stat().st_size > 5000
    with pytest.raises(ValueError, match="suffix"):
        found.plot(tmp_path / "logdet")


@pytest.mark.parametrize(
    ("values", "reason", "field"),
    [
        ({"function": "determinant"}, "FUNCTION_UNSUPPORTED", "function"),
        ({"function": "exp", "low": 0.0}, "LOW_INVALID", "low"),
        ({"function": "count", "low": 1.0, "high": 0.5}, "LOW_INVALID", "low"),
        ({"function": "sqrt", "high": 0.0}, "HIGH_INVALID", "high"),
        ({"damping": math.inf}, "DAMPING_INVALID", "damping"),
        ({"rtol": 1.0}, "RTOL_INVALID", "rtol"),
        ({"max_products": 1}, "MAX_PRODUCTS_INVALID", "max_products"),
    ],
)
def test_a_function_that_cannot_be_is_refused_before_it_is_queued(
    client: Client, small: tuple[str, str], values: dict[str, Any], reason: str, field: str
) -> None:
    with pytest.raises(InvalidArgumentError) as refusal:
        of(client, small).trace_of(**values)
    assert (refusal.value.reason, refusal.value.field) == (reason, field)


def test_an_exponential_that_overflows_ends_the_job_with_the_damping_that_helps(
    client: Client, small: tuple[str, str]
) -> None:
    from hvp_client import JobFailedError

    with pytest.raises(JobFailedError, match="damping") as failure:
        of(client, small).trace_of("exp", damping=1000.0).result()
    assert failure.value.reason == "NON_FINITE"


def test_a_plan_tells_what_a_function_takes(client: Client, small: tuple[str, str]) -> None:
    plan = of(client, small).plan("trace_of", function="log", max_products=40)
    assert plan.max_products == 40
    assert plan.fits


async def test_the_awaited_side_asks_the_same(server: Server, small: tuple[str, str]) -> None:
    async with AsyncClient(server.address) as client:
        checkpoint, batch = await client.checkpoint(small[0]), await client.batch(small[1])
        G = await client.operator(checkpoint, batch, kind="ggn", dtype="float64")
        found = await (await G.logdet(damping=0.5, max_products=24)).result()
        assert found.low < found.value < found.high
        count = await (await G.count(high=-1.0, max_products=24)).result()
        assert count.low == 0


def test_a_function_from_the_command_line(
    server: Server, checkpoint: Checkpoint, batch: Batch, tmp_path: Path
) -> None:
    what = ("--checkpoint", checkpoint.name, "--ids", batch.name, "--address", server.address)
    asked = ("--operator", "ggn", "--max-products", "24")
    picture = tmp_path / "logdet.svg"
    done = hvp(
        *("trace_of", *what, *asked, "--function", "log", "--damping", "0.1"),
        *("--format", "json", "--plot", picture),
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["low"] < document["value"] < document["high"]
    assert "<svg" in picture.read_text()
    shown = hvp("trace_of", *what, *asked, "--function", "count", "--low", "0", "--high", "0.5")
    assert "95 % interval" in shown.stdout
    indefinite = hvp("trace_of", *what, "--function", "log")
    assert indefinite.returncode == 0
    assert "INDEFINITE" in indefinite.stdout
