"""One rank's engine behind the backend interface, in process."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import pytest_asyncio
import torch
from hvp_core.autodiff.product_spec import MATRICES, Draws
from hvp_core.model.huggingface import attention
from hvp_core.sharding.collective import Alone
from hvp_operations.checking import Seed
from hvp_operations.eigsh import EigshResult, EigshSpec
from hvp_operations.operation import Result
from hvp_workers.backend import (
    Backend,
    BackendError,
    Combination,
    Operator,
    Parameters,
    RawFile,
    RunProgress,
    Seeded,
    Space,
    Tuning,
    Zeros,
)
from hvp_workers.engine import RankEngine
from hvp_workers.opening import open_backend
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

from tests.core.problems import llama_config, ragged_tokens, scatter
from tests.core.test_checkpoint import save

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def operator(tmp_path_factory: pytest.TempPathFactory) -> Operator:
    folder = tmp_path_factory.mktemp("engine")
    attention.register()
    model = LlamaForCausalLM(llama_config())
    scatter(model)
    ids, labels, mask = ragged_tokens()
    save_file({"input_ids": ids, "labels": labels, "attention_mask": mask}, folder / "batch")
    return Operator(
        space=Space(checkpoint_dir=save(model, folder / "model"), dtype="float64"),
        batch_path=folder / "batch",
    )


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def backend() -> AsyncIterator[Backend]:
    """One for the module: models are loaded and their blocks traced once."""
    opened = open_backend(kind="inprocess", num_workers=1, device="cpu")
    await opened.start()
    yield opened
    await opened.close()


async def finish(run: AsyncIterator[RunProgress | Result]) -> EigshResult:
    async for step in run:
        if isinstance(step, EigshResult):
            return step
    raise AssertionError("the run gave no result")


async def test_a_gradient_is_the_derivative_of_the_loss(
    backend: Backend, operator: Operator, tmp_path: Path
) -> None:
    space = operator.space
    await backend.gradient(operator, "g")
    await backend.create_vector("v", space, Seeded(1, "sphere"))
    await backend.create_vector("theta", space, Parameters())
    slope = (await backend.inner_products([("g", "v")]))[0]
    losses = []
    for step in (1e-5, -1e-5):
        await backend.create_vector("moved", space, Combination(((1.0, "theta"), (step, "v"))))
        await backend.save_vector("moved", tmp_path / "moved")
        losses.append(await moved_loss(backend, operator, tmp_path))
    assert (losses[0] - losses[1]) / 2e-5 == pytest.approx(slope, rel=1e-6)


async def moved_loss(backend: Backend, operator: Operator, folder: Path) -> float:
    """The loss of a checkpoint whose parameters are the vector in folder/moved."""
    described = await backend.describe_checkpoint(operator.space.checkpoint_dir)
    flat = torch.frombuffer(bytearray((folder / "moved").read_bytes()), dtype=torch.float64)
    tensors = {
        p.name: flat[p.offset : p.offset + torch.Size(p.shape).numel()].view(p.shape).clone()
        for p in described.parameters
    }
    target = folder / f"moved-{hash(float(flat[0]))}"
    target.mkdir()
    save_file(tensors, target / "model.safetensors")
    config = (operator.space.checkpoint_dir / "config.json").read_text()
    (target / "config.json").write_text(config)
    there = Operator(
        space=Space(checkpoint_dir=target, dtype="float64"), batch_path=operator.batch_path
    )
    return await backend.loss(there)


async def test_vectors_have_the_algebra_of_vectors(backend: Backend, operator: Operator) -> None:
    space = operator.space
    await backend.create_vector("u", space, Seeded(1, "gaussian"))
    await backend.create_vector("v", space, Seeded(2, "rademacher"))
    await backend.create_vector("zero", space, Zeros())
    await backend.create_vector("w", space, Combination(((2.0, "u"), (-3.0, "v"), (1.0, "zero"))))
    uu, uv, vv, ww, zz = await backend.inner_products(
        [("u", "u"), ("u", "v"), ("v", "v"), ("w", "w"), ("zero", "zero")]
    )
    assert ww == pytest.approx(4 * uu - 12 * uv + 9 * vv, rel=1e-12)
    n = (await backend.describe_checkpoint(space.checkpoint_dir)).num_parameters
    assert (vv, zz) == (n, 0)


async def test_products_and_other_calls_fit_between_the_products_of_a_run(
    backend: Backend, operator: Operator
) -> None:
    await backend.create_vector("v", operator.space, Seeded(4, "gaussian"))
    run = backend.run(operator, "eigsh", EigshSpec(k=2, which="BE"), ["e0", "e1"])
    seen = 0
    async for step in run:
        if isinstance(step, EigshResult):
            break
        seen += 1
        if seen % 10 == 0:
            await backend.apply(operator, ["v"], ["hv"])
    assert isinstance(step, EigshResult)
    assert step.outcome == "CONVERGED"
    assert seen == step.num_products + 1  # and the one that says it is loading
    await backend.apply(operator, ["e0"], ["he"])
    (rayleigh, square) = await backend.inner_products([("e0", "he"), ("he", "he")])
    assert rayleigh == pytest.approx(step.eigenvalues[0], rel=1e-10)
    assert square == pytest.approx(step.eigenvalues[0] ** 2, rel=1e-10)


async def test_a_run_that_is_closed_frees_its_basis(backend: Backend, operator: Operator) -> None:
    run = backend.run(operator, "eigsh", EigshSpec(k=2), ["f0", "f1"])
    for _ in range(4):
        await anext(run)
    await run.aclose()  # type: ignore[attr-defined]
    with pytest.raises(BackendError, match="f0 is not on the ranks"):
        await backend.inner_products([("f0", "f0")])


async def test_the_same_seed_gives_the_same_run(backend: Backend, operator: Operator) -> None:
    spec = EigshSpec(k=3, which="LA", seed=Seed(9), max_products=20)
    first = await finish(backend.run(operator, "eigsh", spec, ["a0", "a1", "a2"]))
    second = await finish(backend.run(operator, "eigsh", spec, ["b0", "b1", "b2"]))
    assert first.eigenvalues == pytest.approx(second.eigenvalues, rel=1e-9)
    assert first.outcome == "MAX_PRODUCTS"


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda b, o: b.apply(o, ["nothing"], ["x"]), "INPUT_MISSING"),
        (lambda b, o: b.inner_products([("nothing", "nothing")]), "INPUT_MISSING"),
        (lambda b, o: b.evaluate_forms(o, "quadratic", ["nothing"]), "INPUT_MISSING"),
        (lambda b, o: b.save_vector("nothing", Path("x")), "INPUT_MISSING"),
        (lambda b, o: finish(b.run(o, "eigsh", EigshSpec(k=0), [])), "K_INVALID"),
        (lambda b, o: finish(b.run(o, "eigsh", EigshSpec(k=10**9), [])), "K_INVALID"),
        (
            lambda b, o: finish(b.run(o, "eigsh", EigshSpec(k=3, max_products=5), [])),
            "MAX_PRODUCTS_INVALID",
        ),
        (
            lambda b, o: finish(b.run(o, "eigsh", EigshSpec(k=3, num_lanczos_vectors=3), [])),
            "NUM_LANCZOS_VECTORS_INVALID",
        ),
    ],
)
async def test_a_call_that_cannot_be_says_why_and_the_next_one_works(
    call: Callable[[Backend, Operator], object],
    reason: str,
    backend: Backend,
    operator: Operator,
) -> None:
    with pytest.raises(BackendError) as caught:
        await call(backend, operator)  # type: ignore[misc]
    assert caught.value.reason == reason
    assert await backend.loss(operator) > 0


async def test_forms_are_the_products_inner_products_whatever_is_taken_at_once(
    backend: Backend, operator: Operator
) -> None:
    names = [f"v{seed}" for seed in range(10)]
    for seed, name in enumerate(names):
        await backend.create_vector(name, operator.space, Seeded(seed, "gaussian"))
    products = [f"A{name}" for name in names]
    for kind in MATRICES:
        matrix = replace(operator, kind=kind)
        await backend.apply(matrix, names, products)
        expected = await backend.inner_products(list(zip(names, products, strict=True)))
        forms = await backend.evaluate_forms(matrix, "quadratic", names)
        assert forms == pytest.approx(expected, rel=1e-11)
    await backend.gradient(operator, "g")
    slopes = await backend.evaluate_forms(operator, "slope", names)
    expected = await backend.inner_products([("g", name) for name in names])
    assert slopes == pytest.approx(expected, rel=1e-11)


async def test_the_labels_of_a_fisher_matrix_are_those_of_its_seed_in_every_precision(
    operator: Operator,
) -> None:
    engine = RankEngine(Alone(), "cpu", Tuning())
    space = replace(operator.space, dtype="float32")
    whole = replace(operator, space=space, kind="fisher", num_samples=40)
    full = engine._operator(whole)
    coarse = engine._operator(replace(whole, precision="bfloat16"))
    draws = Draws(5, 40)
    for ours, theirs in zip(
        full.curvature.labels.draw(draws), coarse.curvature.labels.draw(draws), strict=True
    ):
        assert torch.equal(ours, theirs)
    exact = coarse.exact()
    assert exact is not None
    assert exact.curvature.labels is coarse.curvature.labels
    in_its_own = torch.cat(coarse.curvature.draw(draws))  # with outputs in 16 bits, that is
    assert not torch.equal(in_its_own, torch.cat(full.curvature.labels[draws]))


async def test_a_form_that_takes_a_product_is_refused_where_there_is_room_for_none(
    operator: Operator,
) -> None:
    engine = RankEngine(Alone(), "cpu", Tuning())
    engine.create_vector("v", operator.space, Seeded(1, "gaussian"))
    (expected,) = engine.evaluate_forms(operator, "quadratic", ["v"])
    shard = engine._vectors["v"].shard
    engine._vector_budget = 2 * shard.nbytes
    assert engine.evaluate_forms(operator, "quadratic", ["v"]) == [expected]
    assert list(engine._vectors) == ["v"]
    engine._vector_budget = 2 * shard.nbytes - 1
    with pytest.raises(BackendError) as caught:
        engine.evaluate_forms(operator, "quadratic", ["v"])
    assert caught.value.reason == "VECTOR_MEMORY"
    assert engine.evaluate_forms(replace(operator, kind="ggn"), "quadratic", ["v"])[0] > 0
    assert engine.evaluate_forms(operator, "slope", ["v"])


async def test_vectors_of_two_spaces_do_not_mix(backend: Backend, operator: Operator) -> None:
    single = Space(checkpoint_dir=operator.space.checkpoint_dir, dtype="float32")
    await backend.create_vector("double", operator.space, Zeros())
    await backend.create_vector("single", single, Zeros())
    for call in (
        backend.inner_products([("single", "double")]),
        backend.apply(operator, ["single"], ["x"]),
        backend.evaluate_forms(operator, "slope", ["single"]),
        backend.create_vector("x", single, Combination(((1.0, "double"),))),
    ):
        with pytest.raises(BackendError, match="VECTOR_SPACE_MISMATCH"):
            await call


async def test_a_vector_file_with_nan_is_refused(
    backend: Backend, operator: Operator, tmp_path: Path
) -> None:
    n = (await backend.describe_checkpoint(operator.space.checkpoint_dir)).num_parameters
    data = torch.zeros(n, dtype=torch.float64)
    data[5] = torch.inf
    (tmp_path / "raw").write_bytes(data.numpy().tobytes())
    with pytest.raises(BackendError) as caught:
        await backend.create_vector("x", operator.space, RawFile(tmp_path / "raw"))
    assert (caught.value.reason, caught.value.metadata["index"]) == ("NON_FINITE", "5")


async def test_ids_outside_the_vocabulary_are_refused(
    backend: Backend, operator: Operator, tmp_path: Path
) -> None:
    save_file({"input_ids": torch.tensor([[1, 24, 3]])}, tmp_path / "batch")
    wrong = Operator(space=operator.space, batch_path=tmp_path / "batch")
    with pytest.raises(BackendError, match="TOKEN_ID_OUT_OF_RANGE"):
        await backend.loss(wrong)


async def test_a_rank_tells_what_memory_it_could_have_at_most(backend: Backend) -> None:
    (rank,) = await backend.ranks()
    assert rank.memory_bytes == psutil.virtual_memory().total
    assert rank.resident_bytes < rank.memory_bytes
