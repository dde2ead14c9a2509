"""numpy and torch in and out of vectors, products and batches."""

from __future__ import annotations

import subprocess
import sys
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hvp_client import (
    AsyncClient,
    AsyncVector,
    Client,
    InvalidArgumentError,
    Operator,
    ParameterTensor,
    Vector,
)
from hvp_client._arrays import as_numpy, like
from hvp_client._batches import encode_batch
from hvp_protos.v1 import vector_pb2
from safetensors.numpy import load, load_file

from tests.client.conftest import Server

NUMBERS = torch.tensor([1.0, -2.5, 0.0, 3e38, 1e-30])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e5m2, torch.float16, torch.int32])
def test_what_numpy_lacks_becomes_float32_exactly(dtype: torch.dtype) -> None:
    tensor = torch.tensor([1.0, -2.5, 0.0, 448.0, 3.0]).to(dtype)
    array = as_numpy(tensor)
    same = {torch.float16: np.float16, torch.int32: np.int32}
    assert array.dtype == same.get(dtype, np.float32)
    assert torch.equal(torch.from_numpy(array).to(torch.float64), tensor.to(torch.float64))


def test_a_parameter_is_taken_without_its_gradient_and_without_a_copy() -> None:
    parameter = torch.nn.Parameter(NUMBERS.clone())
    array = as_numpy(parameter * 1)  # no leaf either
    np.testing.assert_array_equal(array, NUMBERS.numpy())
    assert as_numpy(parameter).ctypes.data == parameter.data_ptr()
    assert parameter.requires_grad


def test_the_answer_is_of_the_kind_of_the_question() -> None:
    array = np.arange(3.0)
    assert like(np.ones(3), array) is array
    assert like([1, 2, 3], array) is array
    tensor = like(torch.ones(3, dtype=torch.bfloat16), array[::-1])
    assert (tensor.dtype, tensor.tolist()) == (torch.float64, [2.0, 1.0, 0.0])


@pytest.mark.parametrize(
    "tensor",
    [torch.ones(3, device="meta"), torch.eye(3).to_sparse(), torch.ones(3) * 1j],
    ids=["without elements", "sparse", "complex"],
)
def test_tensors_that_are_no_real_numbers_are_refused(tensor: Any) -> None:
    from hvp_client._bulk import as_elements

    with pytest.raises(InvalidArgumentError) as caught:
        as_elements(tensor, 3, np.dtype("float32"), "v")
    assert (caught.value.reason, caught.value.field) == ("DTYPE_UNSUPPORTED", "v")


def test_a_batch_of_tensors_is_the_batch_of_their_numbers() -> None:
    ids = torch.arange(6).reshape(2, 3)
    one = encode_batch({"input_ids": ids, "labels": ids.int(), "attention_mask": ids < 9})
    assert one == encode_batch(
        {"input_ids": ids.numpy(), "labels": ids.numpy(), "attention_mask": np.ones((2, 3), int)}
    )
    assert load(one)["labels"].dtype == np.int64
    # Numbers of 16 bits are floating numbers: whether a field takes them, its model's schema says.
    assert load(encode_batch({"input_ids": ids.bfloat16()}))["input_ids"].dtype == np.float32


def test_a_vector_is_an_array_to_numpy_and_a_tensor_to_torch(H: Operator) -> None:
    v = H.random_vector(seed=1, distribution="gaussian")
    numbers = v.numpy()
    np.testing.assert_array_equal(np.asarray(v), numbers)
    assert np.asarray(v, np.float32).dtype == np.float32
    assert np.array(v, copy=True).dtype == np.float64
    assert np.linalg.norm(v) == pytest.approx(v.norm(), rel=1e-12)
    with pytest.raises(ValueError, match="copy"):
        np.array(v, copy=False)
    assert torch.equal(v.torch(), torch.from_numpy(numbers))
    assert v.torch().dtype == torch.float64
    with pytest.raises(TypeError):
        _ = numbers + v  # not fetched by accident


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_tensor_gives_the_product_as_a_tensor(H: Operator, dtype: torch.dtype) -> None:
    t = torch.randn(H.shape[0], 2, generator=torch.Generator().manual_seed(0)).to(dtype)
    t.requires_grad_()
    expected = H @ t.detach().double().numpy()
    assert isinstance(expected, np.ndarray)
    for product in (H @ t, H.matmat(t), (t.T @ H).T):
        assert isinstance(product, torch.Tensor)
        assert (product.dtype, product.requires_grad) == (torch.float64, False)
        np.testing.assert_allclose(product, expected, rtol=1e-11, atol=1e-13)
    column = H @ t[:, 0]
    assert isinstance(column, torch.Tensor)
    np.testing.assert_allclose(column, expected[:, 0], rtol=1e-11, atol=1e-13)
    np.testing.assert_array_equal(H.vector(t[:, 1]).numpy(), t[:, 1].detach().double())


def test_a_vector_is_read_by_parameter(H: Operator, llama_dir: Path) -> None:
    stored = load_file(llama_dir / "model.safetensors")
    theta = H.parameters()
    named = theta.named()
    assert named.keys() == stored.keys()
    for name, tensor in stored.items():
        for found in (named[name], theta[name]):
            assert (found.dtype, found.shape) == (np.dtype("float64"), tensor.shape)
            np.testing.assert_array_equal(found, tensor)
    np.testing.assert_array_equal(np.concatenate([each.ravel() for each in named.values()]), theta)
    with pytest.raises(KeyError, match=r"model\.layers\.0\.mlp\.up_proj\.weight"):
        _ = theta["model.layers.0.mlp.up_proj"]
    with pytest.raises(TypeError):
        iter(theta)  # type: ignore[call-overload]


async def test_a_vector_of_another_space_has_no_parts_by_the_parameters_names() -> None:
    tensors = {"w": ParameterTensor(name="w", shape=(2, 3), offset=0)}
    session: Any = SimpleNamespace(parameters={"c": tensors}, released=deque())
    message = vector_pb2.Vector(
        name="v", checkpoint="c", num_elements=6, dtype="float64", data_batch="b", shape=[1, 2, 3]
    )
    v = AsyncVector(session, message, temporary=False)
    for read in (v.named(), v["w"]):
        with pytest.raises(InvalidArgumentError) as caught:
            await read
        assert caught.value.reason == "VECTOR_SPACE_MISMATCH"


def test_h_may_stand_on_the_right(H: Operator) -> None:
    V = np.random.default_rng(0).standard_normal((H.shape[0], 3))
    W = H @ V
    np.testing.assert_allclose(V.T @ H, W.T, rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(V[:, 0] @ H, W[:, 0], rtol=1e-11, atol=1e-13)
    v = H.vector(V[:, 1])
    product = v @ H
    assert isinstance(product, Vector)
    np.testing.assert_allclose(product.numpy(), W[:, 1], rtol=1e-11, atol=1e-13)
    with pytest.raises(InvalidArgumentError) as caught:
        _ = np.ones((2, 3)) @ H
    assert caught.value.reason == "SHAPE_MISMATCH"


async def test_the_awaited_side_takes_and_gives_the_same(H: Operator, server: Server) -> None:
    async with AsyncClient(server.address) as client:
        again = await client.operator(H.checkpoint, H.batch, dtype="float64")
        t = torch.ones(H.shape[0], dtype=torch.bfloat16)
        product = await (again @ t)
        assert isinstance(product, torch.Tensor)
        assert torch.equal(product, await (t @ again))
        v = await again.vector(t)
        norm = await v["model.norm.weight"]
        assert norm.tolist() == [1.0] * 8
        assert torch.equal(await v.torch(), t.double())
        assert (await (v @ again)).dtype == np.float64


def test_products_of_arrays_bring_no_torch(H: Operator, server: Server) -> None:
    code = f"""
import sys
import numpy as np
from hvp_client import Client
with Client("{server.address}") as client:
    H = client.operator("{H.checkpoint}", "{H.batch}")
    v = np.ones(H.shape[0]) @ H
    np.asarray(H.vector(v))
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_handle_in_the_place_of_numbers_and_a_mixed_list_are_refused_in_words(
    client: Client, H: Operator
) -> None:
    v = H.zeros()
    for given in (v, [v, v]):
        with pytest.raises(InvalidArgumentError, match=r"np\.asarray\(v\)") as caught:
            H.vector(given)
        assert caught.value.reason == "DTYPE_UNSUPPORTED"
    with pytest.raises(InvalidArgumentError) as caught:
        client.upload_batch({"input_ids": v})
    assert caught.value.reason == "BATCH_FIELD_INVALID"
    with pytest.raises(InvalidArgumentError) as caught:
        H.matmat([v, 1])
    assert caught.value.reason == "VECTOR_EXPECTED"


@pytest.mark.parametrize("labels", [3, "a", {"a": 1}, {1: "a"}, {"a": None}, ["a"]], ids=repr)
def test_what_are_no_labels_is_refused(H: Operator, labels: Any) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        H.density(labels=labels)
    assert (caught.value.reason, caught.value.field) == ("LABELS_INVALID", "labels")
