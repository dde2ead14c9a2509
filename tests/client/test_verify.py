"""`client.verify` and `hvp verify`: right models pass, and a wrong kernel does not."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hvp_client import Batch, Checkpoint, Client, JobFailedError
from hvp_client._verification import extrapolated, of_differences, rescalings
from numpy.typing import NDArray
from safetensors.numpy import save_file

from tests.client.conftest import HVP, Server

#: What a kernel that is wrong in float32 alone looks like: checks in float64 do not meet it.
WRONG = """
import hvp_core.attention.tiled as tiled
right = tiled.Tiled.backward_tangents
def wrong(self, at, dots, pattern, span):
    found = right(self, at, dots, pattern, span)
    if at.x.q.itemsize == 4:
        found = [each._replace(k=each.k * 1.01) for each in found]
    return found
tiled.Tiled.backward_tangents = wrong
"""


@pytest.fixture(scope="module")
def rough_llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers with weights of size one, so that attention counts."""
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    set_seed(0)
    config = LlamaConfig(
        vocab_size=19,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
    )
    folder = tmp_path_factory.mktemp("rough")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def rough(client: Client, rough_llama_dir: Path) -> Checkpoint:
    """The rough model on the server."""
    return client.upload_checkpoint(rough_llama_dir)


@pytest.mark.parametrize("dtype", [pytest.param("float64", marks=pytest.mark.slow), "float32"])
def test_a_right_model_passes_every_check(
    client: Client, rough: Checkpoint, batch: Batch, dtype: str
) -> None:
    found = client.verify(rough, batch, dtype)
    assert found.passed
    assert all(check.verdict == "pass" for check in found.checks), found.checks
    names = [check.what for check in found.checks]
    assert names[:3] == ["u·Hv = v·Hu", "H(2v - 3u) = 2Hv - 3Hu", "slope along ∇L = ∇L·∇L"]
    assert sum("difference of L" in name for name in names) == 2
    pairs = {check.note for check in found.checks if check.what == "H(Gθ) = -G∇L"}
    assert {note.partition(":")[0] for note in pairs} == {
        "up and down projection",
        "values and output projection",
        "norm and what it feeds",
    }
    assert found.loss == pytest.approx(client.operator(rough, batch, dtype=dtype).loss())


def test_sixteen_bits_pass_too(client: Client, rough: Checkpoint, batch: Batch) -> None:
    """Differences are of the loss in full precision: in sixteen bits they are of its roundings."""
    for seed in (0, 3):
        found = client.verify(rough, batch, precision="bfloat16", seed=seed)
        assert all(check.verdict == "pass" for check in found.checks), found.checks
        assert found.passed
        assert found.precision == "bfloat16"


@pytest.fixture(scope="module")
def wrong_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of which a kernel is one hundredth off."""
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(WRONG)
    server = Server.start(folder / "state", packages=folder / "site")
    yield server
    assert server.stop() == 0


def test_a_kernel_that_is_a_hundredth_off_is_noticed(
    wrong_server: Server,
    rough_llama_dir: Path,
    input_ids: NDArray[np.int64],
    tmp_path: Path,
) -> None:
    with Client(wrong_server.address) as client:
        checkpoint = client.upload_checkpoint(rough_llama_dir)
        batch = client.upload_batch({"input_ids": input_ids})
        found = client.verify(checkpoint, batch)
        failed = [check.what for check in found.checks if check.verdict == "fail"]
        assert "u·Hv = v·Hu" in failed
        assert not found.passed
        assert "failed" in repr(found)
        assert client.verify(checkpoint, batch, "float64").passed  # where the kernel is right
        # A question does not answer at all, and says why after its first products.
        job = client.operator(checkpoint, batch).eigsh(k=2)
        with pytest.raises(JobFailedError, match="rounding explains") as failure:
            job.result()
        assert failure.value.reason == "SYMMETRY_BROKEN"
    save_file({"input_ids": input_ids}, tmp_path / "batch.safetensors")
    command = [
        str(HVP),
        "verify",
        f"--address={wrong_server.address}",
        f"--checkpoint={checkpoint.name}",
    ]
    told = subprocess.run(
        [*command, f"--ids={tmp_path / 'batch.safetensors'}", "--format=json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.returncode == 1, told.stderr
    assert json.loads(told.stdout)["passed"] is False


def test_difference_quotients_are_believed_where_they_agree() -> None:
    steps = [4.0 * 0.5**place for place in range(8)]
    limit, doubt = extrapolated([2 + h**2 + 0.1 * h**4 for h in steps])
    assert limit == pytest.approx(2, abs=1e-4)
    assert doubt < 1e-3
    noisy, _ = extrapolated([2 + h**2 + 1e-3 * math.sin(9 * h) / h**2 for h in steps])
    assert noisy == pytest.approx(2, abs=0.2)
    assert extrapolated([math.nan, 4.0, 2.5, 2.125, 2.03125])[0] == pytest.approx(2.0)
    hidden = of_differences("x", [1.0, 5.0, -3.0, 9.0], 2.0, 2.0, 1e-2, "")
    assert hidden.verdict == "undecided"
    wrong = of_differences("x", [2 + h**2 for h in steps], 2.1, 2.0, 1e-2, "")
    assert wrong.verdict == "fail"


def test_a_rescaling_takes_the_first_and_the_last_layer_of_its_kind() -> None:
    names = [f"l.{layer}.{part}_proj.weight" for layer in range(3) for part in ("up", "down")]
    found = rescalings([*names, "l.9.up_proj.weight"])
    assert [each.up for each in found] == [("l.0.up_proj.weight",), ("l.2.up_proj.weight",)]
    assert [each.down for each in found] == [("l.0.down_proj.weight",), ("l.2.down_proj.weight",)]
    assert rescalings(["weight"]) == []
