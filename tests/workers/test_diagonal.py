"""Diagonals of a real model's curvature through the engine, against torch.func's dense matrices."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio
import torch
from hvp_core.model.data import token_batch
from hvp_core.model.huggingface import attention
from hvp_operations.checking import Seed
from hvp_operations.diagonal import DiagonalResult, DiagonalSpec
from hvp_workers.backend import Backend, Operator
from hvp_workers.opening import open_backend
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tests.core import references
from tests.core.problems import llama_config, scatter
from tests.workers.test_certificates import operator_of, written

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def backend() -> AsyncIterator[Backend]:
    """One for the module: the model is loaded and its blocks traced once for each dtype."""
    opened = open_backend(kind="inprocess", num_workers=1, device="cpu")
    await opened.start()
    yield opened
    await opened.close()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A folder with a Llama and a batch, and the diagonals of its matrices by torch.func."""
    attention.register()
    sizes = {"hidden_size": 4, "intermediate_size": 6, "num_attention_heads": 2, "vocab_size": 12}
    fewer = {"num_hidden_layers": 1, "num_key_value_heads": 1}
    config = LlamaConfig(**{**llama_config().to_dict(), **sizes, **fewer})
    config._attn_implementation = attention.NAME
    model = LlamaForCausalLM(config).double()
    scatter(model)
    ids = torch.randint(12, (3, 6), generator=torch.Generator().manual_seed(0))
    folder = tmp_path_factory.mktemp("llama")
    written(model, folder, ids, "float64")
    like = {name: each.detach() for name, each in model.named_parameters()}
    flat, mask = references.flatten(like), token_batch(ids).inputs.get("attention_mask")

    def logits(p: references.Params) -> Tensor:
        return references.llama(p, ids, mask, config)

    gradient = torch.func.grad(references.token_loss(logits, ids, like))
    hessian = torch.func.jacfwd(gradient)(flat)
    ggn = references.gauss_newton(logits, ids, like, flat)
    return folder, {"hessian": hessian.diagonal(), "ggn": ggn.diagonal()}


async def diagonal(
    backend: Backend, operator: Operator, spec: DiagonalSpec, folder: Path
) -> tuple[DiagonalResult, Tensor, Tensor]:
    """The result with the estimate and its standard error."""
    outputs = ["estimate", "error"]
    async for step in backend.run(operator, "diagonal", spec, outputs):
        if isinstance(step, DiagonalResult):
            for name in outputs:
                await backend.save_vector(name, folder / name)
            kind = np.float64 if operator.space.dtype == "float64" else np.float32
            estimate, error = (
                torch.from_numpy(np.fromfile(folder / name, kind)).double() for name in outputs
            )
            await backend.delete_vectors(outputs)
            return step, estimate, error
    raise AssertionError("the run gave no result")


@pytest.mark.parametrize("kind", ["hessian", "ggn"])
async def test_diagonals_are_those_of_the_dense_matrix(
    backend: Backend, llama: tuple[Path, dict[str, Tensor]], kind: str, tmp_path: Path
) -> None:
    folder, true = llama
    operator = operator_of(folder, "float64", kind=kind)
    spec = DiagonalSpec(rtol=1e-9, max_products=1000)
    found, exact, error = await diagonal(backend, operator, spec, tmp_path)
    assert found.outcome == "CONVERGED"
    # Angles of positions are rounded to float32, here and there in other places.
    assert references.relative_error(exact, true[kind]) < 1e-6
    assert not error.any()
    spec = DiagonalSpec(rtol=1e-4, max_products=100)
    found, estimate, error = await diagonal(backend, operator, spec, tmp_path)
    assert (found.method, found.outcome) == ("xdiag", "MAX_PRODUCTS")
    distance = (estimate - exact).abs()
    assert float((distance <= found.interval_factor * error).double().mean()) > 0.8
    assert float(distance.norm()) <= 2 * float(error.norm())


async def test_in_bfloat16_errors_are_those_of_the_exact_diagonal(
    backend: Backend, llama: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    folder, true = llama
    operator = operator_of(folder, "float32", kind="ggn", precision="bfloat16")
    spec = DiagonalSpec(rtol=0.3, max_products=200, per="layer", seed=Seed(3))
    found, estimate, error = await diagonal(backend, operator, spec, tmp_path)
    assert (found.method, found.outcome) == ("hutchinson", "CONVERGED")
    assert found.num_exact_products >= 4
    distance = (estimate - true["ggn"]).abs()
    assert float((distance <= found.interval_factor * error).double().mean()) > 0.85
    assert float(error.norm()) <= 0.3 * found.norm * (1 + 1e-6)
    assert float(distance.norm()) <= 0.6 * found.norm
    sums = torch.stack(
        [each.sum() for each in true["ggn"].split([p.num_parameters for p in found.parts])]
    )
    for part, block in zip(found.parts, sums.tolist(), strict=True):
        assert abs(part.value - block) <= 5 * part.standard_error
