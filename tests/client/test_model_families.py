"""Classifiers and registered modules from the SDK, through a server that has a user's package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hvp_client import (
    Client,
    FailedPreconditionError,
    HvpError,
    InvalidArgumentError,
    UnimplementedError,
)

from tests.modules import families
from tests.modules.checkpoints import ROWS, classifier, module_checkpoint

ARRAYS = {name: each.numpy() for name, each in ROWS.items()}


def test_a_classifier_of_padded_sequences(client: Client, tmp_path: Path) -> None:
    model = classifier(tmp_path / "bert", "bert", num_labels=3)
    checkpoint = client.upload_checkpoint(tmp_path / "bert")
    assert checkpoint.task == "sequence classification"
    assert checkpoint.batch_schema is not None
    assert [each.name for each in checkpoint.batch_schema.fields if each.required] == [
        "input_ids",
        "labels",
    ]
    ids = torch.tensor([[3, 4, 5, 6], [7, 8, 0, 0]])
    inputs = {"input_ids": ids, "attention_mask": ids.ne(0).long(), "labels": torch.tensor([2, 0])}
    batch = client.upload_batch(inputs, checkpoint)
    assert batch.fields["labels"] == (2,)
    H = client.operator(checkpoint, batch, dtype="float64")
    loss = model(**inputs).loss
    assert H.loss() == pytest.approx(loss.item(), rel=1e-12)
    gradient = torch.autograd.grad(
        loss, list(model.parameters()), allow_unused=True, materialize_grads=True
    )
    flat = torch.cat([each.reshape(-1) for each in gradient]).numpy()
    np.testing.assert_allclose(H.gradient().numpy(), flat, rtol=1e-9, atol=1e-12)
    J = client.jacobian(checkpoint, batch, dtype="float64")
    assert J.output_shape == (2, 3)
    u, v = J.T.random_vector(seed=1), J.random_vector(seed=2)
    assert u.dot(J @ v) == pytest.approx((J.T @ u).dot(v), rel=1e-12)


def test_the_spectrum_of_a_registered_laplacian_is_the_known_one(
    client: Client, tmp_path: Path
) -> None:
    n = 40
    module_checkpoint(tmp_path / "chain", "laplacian", families.Chain(n), length=n)
    checkpoint = client.upload_checkpoint(tmp_path / "chain")
    assert (checkpoint.task, checkpoint.num_parameters) == ("module laplacian", n)
    batch = client.upload_batch({"x": [0.0]}, checkpoint)
    H = client.operator(checkpoint, batch, dtype="float64")
    spectrum = H.eigsh(k=3, which="LA").result(timeout_s=300)
    known = 2 - 2 * np.cos(np.pi * np.arange(n, n - 3, -1) / (n + 1))
    np.testing.assert_allclose(np.sort(spectrum.eigenvalues)[::-1], known, rtol=1e-8)
    for refused in (
        lambda: client.operator(checkpoint, batch, kind="ggn"),
        lambda: client.jacobian(checkpoint, batch),
    ):
        with pytest.raises(UnimplementedError, match="returns its loss alone") as found:
            refused()
        assert found.value.reason == "KIND_UNSUPPORTED"
    found_right = client.verify(checkpoint, batch, "float64")
    assert [check.verdict for check in found_right.checks] == ["pass"] * 5  # and none of the GGN


def test_the_one_eigenvalue_of_one_parameter_is_its_second_derivative(
    client: Client, tmp_path: Path
) -> None:
    module_checkpoint(tmp_path / "chain", "laplacian", families.Chain(1), length=1)
    checkpoint = client.upload_checkpoint(tmp_path / "chain")
    H = client.operator(checkpoint, client.upload_batch({"x": [0.0]}), parameters="theta")
    assert H.shape == (1, 1)
    found = H.eigsh(k=1).result(timeout_s=300)
    np.testing.assert_allclose(found.eigenvalues, [2.0])
    assert found.completeness.shown
    with pytest.raises(InvalidArgumentError, match="of order 1, 1 to 1 eigenpairs") as refused:
        H.eigsh(k=2)
    assert refused.value.reason == "K_INVALID"


def test_a_module_may_call_its_fields_as_language_models_do(client: Client, tmp_path: Path) -> None:
    module_checkpoint(tmp_path / "plain", "scaled-mlp", families.Net(5), width=5)
    module_checkpoint(tmp_path / "named", "mlp-of-tokens-names", families.Net(5), width=5)
    data = dict(zip(("input_ids", "attention_mask", "labels"), ARRAYS.values(), strict=True))
    named = client.upload_checkpoint(tmp_path / "named")
    batch = client.upload_batch(data)
    assert client.upload_batch(data, named).name == batch.name
    assert (batch.sequence_length, batch.num_targets, batch.max_token_id) == (0, 0, 0)
    plain = client.upload_checkpoint(tmp_path / "plain")
    expected = client.operator(plain, client.upload_batch(ARRAYS), dtype="float64").loss()
    assert client.operator(named, batch, dtype="float64").loss() == pytest.approx(expected)


def test_what_does_not_fit_is_refused_in_the_same_words_by_sdk_and_server(
    client: Client, tmp_path: Path
) -> None:
    module_checkpoint(tmp_path / "net", "scaled-mlp", families.Net(5), width=5)
    checkpoint = client.upload_checkpoint(tmp_path / "net")
    for change in (
        {"z": ARRAYS["x"]},
        {"y": None},
        {"y": ARRAYS["y"] + 1},
        {"x": ARRAYS["x"][:, :3]},
        {"y": ARRAYS["y"].astype(float)},
    ):
        data = {name: each for name, each in (ARRAYS | change).items() if each is not None}
        with pytest.raises(InvalidArgumentError) as early:
            client.upload_batch(data, checkpoint)
        batch = client.upload_batch(data)
        with pytest.raises(InvalidArgumentError) as late:
            client.operator(checkpoint, batch)
        assert (early.value.reason, early.value.message) == (late.value.reason, late.value.message)
        assert late.value.field == "operator.data_batch"
        assert late.value.metadata["tensor"] == early.value.field


@pytest.mark.parametrize(
    ("kind", "error", "reason"),
    [
        ("mlp-in-train-mode", FailedPreconditionError, "MODEL_UNSUPPORTED"),
        ("mlp-of-a-dict", FailedPreconditionError, "MODEL_UNSUPPORTED"),
        ("mlp-of-no-rows", InvalidArgumentError, "LOSS_MISMATCH"),
        ("missing", InvalidArgumentError, "ARCHITECTURE_UNKNOWN"),
    ],
)
def test_a_module_that_cannot_be_served_is_refused_as_it_is_uploaded(
    kind: str, error: type[HvpError], reason: str, client: Client, tmp_path: Path
) -> None:
    module_checkpoint(tmp_path / "net", kind, families.Net(5), width=5)
    with pytest.raises(error) as refused:
        client.upload_checkpoint(tmp_path / "net")
    assert refused.value.reason == reason
