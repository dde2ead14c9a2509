"""Jacobians of submodules from the SDK: of layers and what is inside them, by θ and by others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hvp_client import Batch, Checkpoint, Client, HvpError, InvalidArgumentError, Jacobian
from numpy.typing import NDArray

Take = Callable[..., Jacobian]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers."""
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    set_seed(0)
    config = LlamaConfig(
        vocab_size=19,
        hidden_size=8,
        intermediate_size=10,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        bos_token_id=1,
        eos_token_id=2,
    )
    found = tmp_path_factory.mktemp("two-layers")
    LlamaForCausalLM(config).save_pretrained(found)
    return found


@pytest.fixture
def checkpoint(client: Client, folder: Path) -> Checkpoint:
    return client.upload_checkpoint(folder)


@pytest.fixture
def take(client: Client, checkpoint: Checkpoint, batch: Batch) -> Take:
    def taken(**asked: Any) -> Jacobian:
        return client.jacobian(checkpoint, batch, dtype="float64", **asked)

    return taken


def dense(J: Jacobian) -> NDArray[np.float64]:
    return np.asarray(J @ np.eye(J.shape[1]))


@pytest.mark.slow
def test_layers_follow_the_chain_rule(take: Take) -> None:
    """∂logits/∂(layer 0) = ∂logits/∂(layer 1) ∂(layer 1)/∂(layer 0), and by θ as well."""
    to_end, between = take(input="model.layers.1"), take(output="model.layers.1", input="input")
    first = take(output="model.layers.0", parameters=["model.layers.0.*"])
    whole = take(parameters=["model.layers.0.*"])
    assert (between.output, between.input) == ("model.layers.1", "input")
    assert between.input_shape == between.output_shape == first.output_shape == (3, 7, 8)
    assert to_end.output_shape == (3, 7, 19)
    assert first.input_shape == (first.shape[1],)
    v = np.random.default_rng(0).standard_normal(first.shape[1])
    expected = whole @ v
    found = to_end @ (between @ (first @ v))
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-11 * np.abs(expected).max())
    u = np.random.default_rng(1).standard_normal(to_end.shape[0])
    back = first.T @ (between.T @ (to_end.T @ u))
    np.testing.assert_allclose(back, whole.T @ u, rtol=1e-9, atol=1e-11)


def test_vectors_of_activations_are_vectors_of_their_space(take: Take) -> None:
    J = take(output="model.layers.1", input="model.layers.0")
    v, u = J.random_vector(seed=1), J.T.random_vector(seed=2)
    assert (v.module, v.of_input, v.output_shape) == ("model.layers.0", False, (3, 7, 8))
    assert (u.module, u.batch) == ("model.layers.1", J.batch)
    Jv = J @ v
    assert u.dot(Jv) == pytest.approx(v.dot(J.T @ u), rel=1e-11)
    assert (2.0 * Jv + Jv).norm() == pytest.approx(3 * Jv.norm(), rel=1e-13)
    with pytest.raises(InvalidArgumentError) as refusal:
        J @ u
    assert refusal.value.reason == "VECTOR_SPACE_MISMATCH"
    own = take(output="model.layers.1.mlp.down_proj", input="input")
    x = own.random_vector(seed=1)
    assert (x.module, x.of_input) == ("model.layers.1.mlp.down_proj", True)
    again = own.vector(x.numpy().reshape(own.input_shape))
    assert (again - x).norm() == 0


def test_a_projections_own_jacobian_is_its_weight(
    client: Client, checkpoint: Checkpoint, take: Take
) -> None:
    J = take(output="model.layers.0.mlp.gate_proj", input="input")
    names = ["model.layers.0.mlp.gate_proj.weight"]
    weight = take(parameters=names).parameter_tensors[0]
    theta = client.operator(checkpoint, J.batch, dtype="float64", parameters=names).parameters()
    W = theta.numpy().reshape(weight.shape)
    x = np.random.default_rng(2).standard_normal(J.input_shape)
    np.testing.assert_allclose(
        (J @ x.reshape(-1)).reshape(J.output_shape), x @ W.T, rtol=1e-12, atol=1e-12
    )
    found = J.svds(2).result()
    np.testing.assert_allclose(found.singular_values, np.full(2, np.linalg.norm(W, 2)), rtol=1e-11)
    assert (found.u[0].module, found.v[0].module) == (J.output, J.output)
    assert (found.u[0].of_input, found.v[0].of_input) == (False, True)
    assert (J @ found.v[0]).dot(found.u[0]) == pytest.approx(found.singular_values[0], rel=1e-10)


@pytest.mark.slow
def test_singular_values_between_layers_are_those_of_the_dense_matrix(take: Take) -> None:
    J = take(output="model.layers.1", input="model.layers.0.mlp")
    found = J.svds(3).result()
    true = np.linalg.svd(dense(J), compute_uv=False)
    np.testing.assert_allclose(found.singular_values, true[:3], rtol=1e-10)
    assert found.outcome == "CONVERGED"
    assert found.provenance["output"] == "output of model.layers.1"
    assert found.provenance["input"] == "output of model.layers.0.mlp"


@pytest.mark.parametrize(
    ("asked", "reason", "words"),
    [
        ({"output": "model.layers.9"}, "MODULE_NOT_FOUND", "model.layers"),
        ({"input": "model.layer.0"}, "MODULE_NOT_FOUND", "nearest are model.layers"),
        ({"output": "model.layers.0.self_attn"}, "MODULE_UNSUPPORTED", "gives a tuple"),
        ({"output": "model.rotary_emb"}, "MODULE_UNSUPPORTED", "gives a tuple"),
        (
            {"output": "model.layers.0", "input": "model.layers.1"},
            "MODULES_OUT_OF_ORDER",
            "exchange them",
        ),
        (
            {"output": "model.layers.0.mlp.up_proj", "input": "model.layers.0.mlp"},
            "MODULES_OUT_OF_ORDER",
            "not made after",
        ),
        (
            {"output": "model.layers.0", "input": "model.layers.0"},
            "MODULES_OUT_OF_ORDER",
            "itself|identity",
        ),
        ({"input": "input"}, "MODULES_INVALID", "one of a submodule"),
        ({"output": ""}, "MODULES_INVALID", "name of a submodule"),
        ({"input": 3}, "MODULES_INVALID", "name of a submodule"),
        ({"output": "m" * 600}, "MODULES_INVALID", "512"),
        ({"input": "model.layers.0", "parameters": ["*"]}, "PARAMETERS_INVALID", "constants"),
    ],
)
def test_what_no_jacobian_can_be_taken_of_is_refused(
    take: Take, asked: dict[str, Any], reason: str, words: str
) -> None:
    with pytest.raises(HvpError, match=words) as refusal:
        take(**asked)
    assert (type(refusal.value), refusal.value.reason) == (InvalidArgumentError, reason)


def test_the_loss_of_a_job_is_that_of_the_model(take: Take, client: Client) -> None:
    J = take(output="model.layers.1", input="model.layers.0")
    H = client.operator(J.checkpoint, J.batch, dtype="float64")
    assert J.svds(1).result().loss == pytest.approx(H.loss(), rel=1e-12)
