"""Eigenpairs of real models through the engine: what is certified holds for the exact operator."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
import torch
from hvp_core.model.huggingface import attention
from hvp_core.precision import exact
from hvp_operations.eigsh import OPERATION, EigshResult, EigshSpec
from hvp_operations.operation import Facts
from hvp_workers.backend import Backend, BackendError, Operator, Space
from hvp_workers.memory import Memory
from hvp_workers.opening import open_backend
from hvp_workers.room import needed_bytes
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tests.core.problems import llama_config, ragged_tokens, scatter
from tests.core.test_checkpoint import save


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def backend() -> AsyncIterator[Backend]:
    """One for the module: models are loaded and their blocks traced once."""
    opened = open_backend(kind="inprocess", num_workers=1, device="cpu")
    await opened.start()
    yield opened
    await opened.close()


async def eigenpairs(backend: Backend, operator: Operator, spec: EigshSpec) -> EigshResult:
    outputs = [f"e{index}" for index in range(spec.k)]
    async for step in backend.run(operator, "eigsh", spec, outputs):
        if isinstance(step, EigshResult):
            return step
    raise AssertionError("the run gave no result")


def written(
    model: LlamaForCausalLM, folder: Path, ids: Tensor, dtype: str, **more: str
) -> Operator:
    save_file({"input_ids": ids}, folder / "batch")
    save(model, folder / "model")
    return operator_of(folder, dtype, **more)


def operator_of(folder: Path, dtype: str, **more: str) -> Operator:
    """Of what was written to a folder."""
    return Operator(
        space=Space(checkpoint_dir=folder / "model", dtype=dtype),  # type: ignore[arg-type]
        batch_path=folder / "batch",
        **more,  # type: ignore[arg-type]
    )


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Llama and a batch."""
    attention.register()
    model = LlamaForCausalLM(llama_config())
    scatter(model)
    folder = tmp_path_factory.mktemp("llama")
    written(model, folder, ragged_tokens()[0], "float64")
    return folder


@pytest.fixture(scope="module")
def blank(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """A folder with a Llama whose head is zero, and the eigenvalues of its G."""
    model, folder = blank_head(), tmp_path_factory.mktemp("blank")
    ids = torch.randint(5, (3, 6), generator=torch.Generator().manual_seed(0))
    written(model, folder, ids, "float64")
    return folder, closed_form(model, ids)


def blank_head(vocabulary: int = 5) -> LlamaForCausalLM:
    """A Llama whose logits are all zero."""
    attention.register()
    config = LlamaConfig(
        **{**llama_config().to_dict(), "vocab_size": vocabulary, "tie_word_embeddings": False}
    )
    config._attn_implementation = attention.NAME
    model = LlamaForCausalLM(config)
    scatter(model)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    return model


def closed_form(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """Eigenvalues other than zero of G where the head is zero, largest first.

    The logits then depend on the head alone, z = W h, and every token's Hessian in them is
    (I - 11ᵀ/V) / V: G is its Kronecker product with the mean of hhᵀ, and each eigenvalue of that
    comes V - 1 times.
    """
    with torch.no_grad(), exact():  # its norms stay in float64
        h = model.double().model(ids).last_hidden_state[:, :-1].flatten(0, 1)
    values: Tensor = torch.linalg.eigvalsh(h.T @ h / len(h)).flip(0) / model.config.vocab_size
    return values.repeat_interleave(model.config.vocab_size - 1)


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("tol", [0.0, 1e-2])
async def test_each_largest_eigenvalue_of_a_gauss_newton_matrix_comes_as_often_as_it_is_there(
    backend: Backend, blank: tuple[Path, Tensor], tol: float
) -> None:
    folder, true = blank
    operator = operator_of(folder, "float64", kind="ggn")
    assert float(true[0] - true[3]) == 0
    found = await eigenpairs(backend, operator, EigshSpec(k=6, which="LA", tol=tol))
    assert found.outcome == "CONVERGED"
    assert found.completeness.shown
    errors = torch.tensor(found.eigenvalues).flip(0) - true[:6]
    # Angles of positions are rounded to float32, here and there in other places.
    assert float(errors.abs().max()) <= found.completeness.margin + 1e-7 * float(true[0])


@pytest.mark.asyncio(loop_scope="module")
async def test_where_no_basis_fits_two_passes_find_the_same_pairs(
    backend: Backend, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    operator = operator_of(llama, "float64")
    spec = EigshSpec(k=6, which="LA", tol=1e-6, max_products=600)
    roomy = await eigenpairs(backend, operator, spec)
    assert roomy.provenance["method"] == "lanczos"
    vector_bytes = 8 * LlamaForCausalLM(llama_config()).num_parameters()
    vectors = OPERATION.cost(spec, Facts(num_parameters=600, kind="hessian")).least_vectors
    monkeypatch.setattr(Memory, "least_available", lambda self: 0)
    with pytest.raises(BackendError, match="INSUFFICIENT_CLUSTER_MEMORY") as caught:
        await eigenpairs(backend, operator, spec)
    promised = -int(caught.value.metadata["available_bytes"])  # to the products themselves

    def room(count: int) -> None:
        available = needed_bytes(count, vector_bytes) + vector_bytes // 2 + promised
        monkeypatch.setattr(Memory, "least_available", lambda self: available)

    room(vectors)
    scarce = await eigenpairs(backend, operator, spec)
    assert scarce.provenance["method"] == "two_pass"
    assert scarce.provenance["num_lanczos_vectors"] == "8"
    assert roomy.outcome == scarce.outcome == "CONVERGED"
    assert scarce.eigenvalues == pytest.approx(roomy.eigenvalues, abs=1e-9)
    room(vectors - 1)
    with pytest.raises(BackendError, match="INSUFFICIENT_CLUSTER_MEMORY"):
        await eigenpairs(backend, operator, spec)


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("tol", [0.0, 1e-2])
async def test_the_smallest_of_a_gauss_newton_matrix_are_k_zeros(
    backend: Backend, llama: Path, tol: float
) -> None:
    operator = operator_of(llama, "float64", kind="ggn")
    found = await eigenpairs(backend, operator, EigshSpec(k=4, which="SA", tol=tol))
    largest = (await eigenpairs(backend, operator, EigshSpec(k=1, which="LA"))).eigenvalues[0]
    # Where the budget ends before a tolerance of rounding, that none is negative still tells.
    assert found.outcome == ("CONVERGED" if tol else "MAX_PRODUCTS")
    assert found.completeness.shown
    assert found.completeness.margin <= (2e-2 if tol else 1e-3) * largest
    assert max(map(abs, found.eigenvalues)) <= found.completeness.margin


@pytest.mark.asyncio(loop_scope="module")
async def test_a_coarse_precision_is_named_as_the_limit_and_its_intervals_hold(
    backend: Backend, llama: Path
) -> None:
    operator = operator_of(llama, "float32", precision="bfloat16")
    found = await eigenpairs(backend, operator, EigshSpec(k=6, which="BE"))
    assert found.outcome == "NOISE_LIMIT"
    assert found.provenance["verified_in"] == "float64"
    exact = operator_of(llama, "float64")
    true = torch.tensor((await eigenpairs(backend, exact, EigshSpec(k=60, which="BE"))).eigenvalues)
    for value, bound in zip(found.eigenvalues, found.error_bounds, strict=True):
        assert float((true - value).abs().min()) <= bound
    assert max(found.residuals) > 1e-3 * max(map(abs, found.eigenvalues))
    assert found.num_products < 60
    loose = await eigenpairs(backend, operator, EigshSpec(k=6, which="BE", tol=0.1))
    assert loose.outcome == "CONVERGED"


@pytest.mark.asyncio(loop_scope="module")
async def test_in_float32_pairs_meet_a_tolerance_that_float64_confirms(
    backend: Backend, llama: Path
) -> None:
    operator = operator_of(llama, "float32")
    found = await eigenpairs(backend, operator, EigshSpec(k=4, which="LA", tol=1e-4))
    assert found.outcome == "CONVERGED"
    wide = operator_of(llama, "float64")
    true = (await eigenpairs(backend, wide, EigshSpec(k=4, which="LA"))).eigenvalues
    for value, bound, other in zip(found.eigenvalues, found.error_bounds, true, strict=True):
        assert abs(value - other) <= min(bound, found.completeness.margin)
