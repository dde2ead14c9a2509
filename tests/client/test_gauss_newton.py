"""The Gauss-Newton operator and precisions through both clients and a real server process."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from hvp_client import (
    AsyncClient,
    Batch,
    Checkpoint,
    Client,
    InvalidArgumentError,
    Operator,
)
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, LlamaForCausalLM

from tests.client.conftest import HVP, Server
from tests.core import references


@pytest.fixture(name="G")
def ggn(client: Client, checkpoint: Checkpoint, batch: Batch) -> Operator:
    return client.operator(checkpoint, batch, kind="ggn", dtype="float64", micro_batch_size=2)


@pytest.fixture(scope="module")
def dense(llama_dir: Path, input_ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """Jᵀ H_out J of the tiny model, written by hand."""
    config = AutoConfig.from_pretrained(llama_dir)
    tensors = load_file(llama_dir / "model.safetensors")
    names = [name for name, _ in LlamaForCausalLM(config).named_parameters()]
    parameters = {name: torch.from_numpy(tensors[name]).double() for name in names}
    ids = torch.from_numpy(input_ids)
    matrix = references.gauss_newton(
        lambda p: references.llama(p, ids, None, config),
        ids,
        parameters,
        references.flatten(parameters),
    )
    return np.asarray(matrix.numpy())


def test_products_are_those_of_the_model_written_by_hand(
    G: Operator, H: Operator, dense: NDArray[np.float64]
) -> None:
    V = np.random.default_rng(3).standard_normal((G.shape[0], 6))
    expected = dense @ V
    np.testing.assert_allclose(G @ V, expected, rtol=0, atol=1e-9 * float(np.linalg.norm(expected)))
    assert (G.kind, H.kind) == ("ggn", "hessian")
    assert np.linalg.norm(np.asarray(H @ V) - expected) > 1e-3 * np.linalg.norm(expected)
    assert G.loss() == H.loss()


def test_it_is_symmetric_and_has_no_negative_direction(G: Operator) -> None:
    u, v = (G.random_vector(seed=seed, distribution="gaussian") for seed in (1, 2))
    gu, gv = G @ [u, v]
    assert u.dot(gv) == pytest.approx(v.dot(gu), rel=1e-9)
    assert u.dot(gu) > 0
    assert v.dot(gv) > 0


def test_its_eigenvalues_are_never_negative_and_the_largest_are_found(
    G: Operator, dense: NDArray[np.float64]
) -> None:
    spectrum = np.linalg.eigvalsh(dense)
    result = G.eigsh(k=4, which="LM").result(timeout_s=300)
    np.testing.assert_allclose(result.eigenvalues, spectrum[-4:], rtol=1e-9)
    assert result.provenance["operator"] == "ggn"
    assert result.provenance["precision"] == "full"
    assert "schedule_ggn" in result.provenance
    ends = G.eigsh(k=4, which="BE", tol=1e-6, max_products=200).result(timeout_s=300)
    assert ends.eigenvalues.min() > -1e-6 * spectrum[-1]


async def test_the_asynchronous_client_takes_the_same_words(
    server: Server, llama_dir: Path, input_ids: NDArray[np.int64], dense: NDArray[np.float64]
) -> None:
    async with AsyncClient(server.address) as client:
        checkpoint = await client.upload_checkpoint(llama_dir)
        batch = await client.upload_batch({"input_ids": input_ids})
        G = await client.operator(checkpoint, batch, kind="ggn", dtype="float64", precision="full")
        v = await G.random_vector(seed=4)
        expected = dense @ await v.numpy()
        np.testing.assert_allclose(
            await (await (G @ v)).numpy(),
            expected,
            rtol=0,
            atol=1e-9 * float(np.linalg.norm(expected)),
        )
        assert (G.kind, G.precision) == ("ggn", "full")
        assert set((await client.server_info()).operator_kinds) == {
            *("hessian", "ggn", "fisher"),
            *("empirical_fisher_token", "empirical_fisher_sequence"),
            *("gradient_covariance_token", "gradient_covariance_sequence"),
            "jacobian",
        }


def test_a_precision_is_chosen_by_the_server_or_asked_for(
    client: Client, checkpoint: Checkpoint, batch: Batch
) -> None:
    assert client.operator(checkpoint, batch).precision == "full"
    assert client.operator(checkpoint, batch, dtype="float64").precision == "full"
    low = client.operator(checkpoint, batch, precision="bfloat16")
    assert (low.precision, low.dtype.name) == ("bfloat16", "float32")
    assert client.server_info().precisions == ("bfloat16", "full")
    for arguments in (
        {"precision": "bfloat16", "dtype": "float64"},
        {"precision": "tf32", "dtype": "float64"},
        {"precision": "tf32"},  # of GPUs
        {"precision": "half"},
    ):
        with pytest.raises(InvalidArgumentError) as caught:
            client.operator(checkpoint, batch, **arguments)  # type: ignore[arg-type]
        assert caught.value.reason == "PRECISION_UNSUPPORTED"
        assert caught.value.field == "operator.precision"


def test_a_product_in_bfloat16_is_that_of_float32_to_its_rounding(
    client: Client, checkpoint: Checkpoint, batch: Batch
) -> None:
    for kind in ("hessian", "ggn"):
        full = client.operator(checkpoint, batch, kind=kind)
        low = client.operator(checkpoint, batch, kind=kind, precision="bfloat16")
        v = full.random_vector(seed=1)
        exact, rounded = full @ v, low @ v
        # Three digits of eight bits each, through a dozen matrix products one after another.
        assert (exact - rounded).norm() < 0.1 * exact.norm()


def test_a_job_tells_of_which_operator_it_is(
    server: Server, checkpoint: Checkpoint, input_ids: NDArray[np.int64], tmp_path: Path
) -> None:
    ids = tmp_path / "ids.safetensors"
    save_file({"input_ids": input_ids}, ids)
    what = ("--checkpoint", checkpoint.name, "--ids", ids, "--operator", "ggn", "-k", "1")
    where = ("--precision", "full", "--address", server.address, "--format", "json")
    done = hvp("eigsh", *what, *where, "--no-watch")
    name = done.partition('"job": "')[2].partition('"')[0]
    with Client(server.address) as client:
        job = client.job(name)
        assert (job.spec["operator"], job.spec["precision"]) == ("ggn", "full")
        assert job.result(timeout_s=300).eigenvalues[0] > 0
    assert '"operator": "ggn"' in hvp("jobs", "--address", server.address, "--format", "json")


def hvp(*arguments: str | Path) -> str:
    return subprocess.run(
        [str(HVP), *map(str, arguments)], capture_output=True, text=True, timeout=120, check=True
    ).stdout
