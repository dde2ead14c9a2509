"""The Fisher matrix of labels drawn from the model, through a server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hvp_client import Client, InvalidArgumentError, Operator
from hvp_client._specs import operator_spec
from numpy.typing import NDArray


@pytest.fixture(name="F")
def fisher(client: Client, small_llama_dir: Path, small_input_ids: NDArray[np.int64]) -> Operator:
    """The small model's, n = 184, of three labels for each of its 8 targets."""
    return client.operator(
        client.upload_checkpoint(small_llama_dir),
        client.upload_batch({"input_ids": small_input_ids}),
        kind="fisher",
        sample_seed=2**64 - 1,
        num_samples=3,
        dtype="float64",
    )


def test_it_is_one_semidefinite_matrix_for_each_seed_however_the_batch_is_cut(
    client: Client, F: Operator
) -> None:
    dense = F @ np.eye(F.shape[0])
    scale = np.abs(dense).max()
    np.testing.assert_allclose(dense, dense.T, rtol=0, atol=1e-12 * scale)
    values = np.linalg.eigvalsh(dense)
    assert values[0] > -1e-12 * values[-1]
    assert (values > 1e-10 * values[-1]).sum() <= 24

    v = np.random.default_rng(0).standard_normal(len(dense))
    settings: dict[str, Any] = {"kind": "fisher", "dtype": "float64", "num_samples": 3}
    cut = client.operator(
        F.checkpoint, F.batch, sample_seed=2**64 - 1, micro_batch_size=1, **settings
    )
    np.testing.assert_allclose(cut @ v, dense @ v, rtol=0, atol=1e-12 * np.abs(dense @ v).max())
    other = client.operator(F.checkpoint, F.batch, sample_seed=1, **settings)
    assert np.abs(other @ v - dense @ v).max() > 1e-3 * np.abs(dense @ v).max()
    assert F.quadratic(v) == pytest.approx(v @ dense @ v, rel=1e-12)
    (name,) = [each for each in F.parameter_names if "down_proj" in each]
    part = next(each for each in F.parameter_tensors if each.name == name)
    here = slice(part.offset, part.offset + part.num_elements)
    block = F.restrict(name)
    assert (block.sample_seed, block.num_samples) == (2**64 - 1, 3)
    np.testing.assert_allclose(block @ v[here], dense[here, here] @ v[here], rtol=0, atol=1e-12)

    found = F.eigsh(2, "LA").result()
    np.testing.assert_allclose(found.eigenvalues, values[-2:], rtol=1e-9)
    assert found.outcome == "CONVERGED"
    told = found.provenance
    assert (told["operator"], told["sample_seed"]) == ("fisher", str(2**64 - 1))
    assert told["num_samples"] == "3"


def test_the_handle_and_the_job_say_the_seed(client: Client, F: Operator, H: Operator) -> None:
    assert "fisher (seed 18446744073709551615, 3 drawn)" in repr(F)
    plain = client.operator(F.checkpoint, F.batch, kind="fisher")
    assert (plain.sample_seed, plain.num_samples) == (0, 1)
    assert (H.sample_seed, H.num_samples) == (None, None)
    job = F.trace(rtol=0.5)
    assert (job.spec["sample_seed"], job.spec["num_samples"]) == (2**64 - 1, 3)
    job.cancel()


@pytest.mark.parametrize(
    ("kind", "given", "reason", "words"),
    [
        ("fisher", {"num_samples": 0}, "NUM_SAMPLES_INVALID", "from 1 to 64"),
        ("fisher", {"num_samples": 65}, "NUM_SAMPLES_INVALID", "1 to 64 labels"),
        ("fisher", {"num_samples": True}, "NUM_SAMPLES_INVALID", "from 1 to 64"),
        ("fisher", {"num_samples": 1.5}, "NUM_SAMPLES_INVALID", "from 1 to 64"),
        ("fisher", {"sample_seed": -1}, "SEED_INVALID", "sample_seed must be"),
        ("fisher", {"sample_seed": 2**64}, "SEED_INVALID", "sample_seed must be"),
        ("hessian", {"sample_seed": 1}, "SEED_INVALID", "the hessian draws no labels"),
        ("ggn", {"num_samples": 1}, "NUM_SAMPLES_INVALID", "the ggn draws no labels"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_it_travels(
    kind: str, given: dict[str, Any], reason: str, words: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=words) as refused:
        operator_spec("c", "b", kind, None, None, None, None, **given)
    assert refused.value.reason == reason
    assert refused.value.field == next(iter(given))


def test_the_server_refuses_it_too(client: Client, F: Operator, H: Operator) -> None:
    for operator, field, value in ((F, "num_samples", 65), (H, "sample_seed", 3)):
        spec = type(operator._twin._spec)()
        spec.CopyFrom(operator._twin._spec)
        setattr(spec, field, value)
        twin = operator._twin
        wrong = type(twin)(twin._session, spec, twin._domain, twin._codomain, twin._tensors)
        with pytest.raises(InvalidArgumentError) as refused:
            client._portal.run(wrong.loss())
        assert refused.value.field == f"operator.{field}"
