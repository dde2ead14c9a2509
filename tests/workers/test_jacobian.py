"""The Jacobian of a model's logits behind the backend interface, against torch's own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio
import torch
from hvp_core.model.huggingface import attention
from hvp_core.precision import exact
from hvp_workers.backend import (
    Backend,
    BackendError,
    Combination,
    Operator,
    RawFile,
    Seeded,
    Space,
    Zeros,
)
from hvp_workers.opening import open_backend
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from tests.core.problems import llama_config, ragged_tokens, scatter
from tests.core.test_checkpoint import save

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    attention.register()
    made = LlamaForCausalLM(llama_config())
    scatter(made)
    rotary = made.model.rotary_emb
    angles = rotary.inv_freq.clone()
    made.double()
    rotary.inv_freq = angles  # which models keep in float32
    return made.eval()


@pytest.fixture(scope="module")
def J(model: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Operator:  # noqa: N802
    folder = tmp_path_factory.mktemp("jacobian")
    ids, labels, mask = ragged_tokens()
    save_file({"input_ids": ids, "labels": labels, "attention_mask": mask}, folder / "batch")
    return Operator(
        space=Space(checkpoint_dir=save(model, folder / "model"), dtype="float64"),
        batch_path=folder / "batch",
        kind="jacobian",
    )


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def backend() -> AsyncIterator[Backend]:
    """One for the module: models are loaded and their blocks traced once."""
    opened = open_backend(kind="inprocess", num_workers=1, device="cpu")
    await opened.start()
    yield opened
    await opened.close()


async def read(backend: Backend, name: str, folder: Path) -> Tensor:
    path = folder / f"{name}.raw"
    await backend.save_vector(name, path)
    return torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.float64)


def logits_of(model: LlamaForCausalLM) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """θ -> logits as a function of one flat vector, and θ."""
    ids, _, mask = ragged_tokens()
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    theta = torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])

    def logits(flat: Tensor) -> Tensor:
        pieces = flat.split([shape.numel() for shape in shapes.values()])
        parameters = {
            name: piece.view(shape)
            for (name, shape), piece in zip(shapes.items(), pieces, strict=True)
        }
        out = torch.func.functional_call(
            model, parameters, (ids,), {"attention_mask": mask, "use_cache": False}
        )
        flat_logits: Tensor = out.logits.reshape(-1)
        return flat_logits

    return logits, theta


async def test_products_both_ways_are_torchs_own(
    backend: Backend, J: Operator, model: LlamaForCausalLM, tmp_path: Path
) -> None:
    transposed = replace(J, kind="jacobian_transposed")
    await backend.create_vector("v", J.space, Seeded(1, "gaussian"))
    await backend.create_vector("u", J.outputs, Seeded(2, "gaussian"))
    await backend.apply(J, ["v"], ["Jv"])
    await backend.apply(transposed, ["u"], ["Ju"])
    v, u, Jv, Ju = [await read(backend, name, tmp_path) for name in ("v", "u", "Jv", "Ju")]
    logits, theta = logits_of(model)
    with exact():  # the model's norms stay in float64
        expected: Tensor = torch.func.jvp(logits, (theta,), (v,))[1]
        (pulled_back,) = torch.func.vjp(logits, theta)[1](u)
    torch.testing.assert_close(Jv, expected, rtol=0, atol=1e-9 * float(expected.abs().max()))
    torch.testing.assert_close(Ju, pulled_back, rtol=0, atol=1e-9 * float(pulled_back.abs().max()))
    forth, back = await backend.inner_products([("u", "Jv"), ("Ju", "v")])
    assert forth == pytest.approx(back, rel=1e-12)


async def test_outputs_are_vectors_like_others(
    backend: Backend, J: Operator, tmp_path: Path
) -> None:
    await backend.create_vector("u", J.outputs, Seeded(2, "sphere"))
    await backend.create_vector("zero", J.outputs, Zeros())
    await backend.create_vector("twice", J.outputs, Combination(((2.0, "u"), (1.0, "zero"))))
    assert await backend.inner_products([("u", "u"), ("u", "twice")]) == pytest.approx([1.0, 2.0])
    whole = await read(backend, "twice", tmp_path)
    await backend.create_vector("again", J.outputs, RawFile(tmp_path / "twice.raw"))
    assert await backend.inner_products([("again", "again")]) == pytest.approx([4.0])
    await backend.save_vector("twice", tmp_path / "part", 5, 17)
    part = torch.frombuffer(bytearray((tmp_path / "part").read_bytes()), dtype=torch.float64)
    torch.testing.assert_close(part, whole[5:17], rtol=0, atol=0)


async def test_vectors_of_the_other_side_are_refused(backend: Backend, J: Operator) -> None:
    await backend.create_vector("v", J.space, Zeros())
    await backend.create_vector("u", J.outputs, Zeros())
    for call in (
        backend.apply(J, ["u"], ["x"]),
        backend.apply(replace(J, kind="jacobian_transposed"), ["v"], ["x"]),
        backend.inner_products([("u", "v")]),
        backend.create_vector("x", J.outputs, Combination(((1.0, "v"),))),
    ):
        with pytest.raises(BackendError, match="VECTOR_SPACE_MISMATCH"):
            await call
