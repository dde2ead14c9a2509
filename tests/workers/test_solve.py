"""Linear systems of real models through the engine, whatever precision the products have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hvp_operations.solve import SolveResult, SolveSpec, System
from hvp_workers.backend import Backend, BackendError, Operator, RawFile, RunProgress, Seeded
from hvp_workers.opening import open_backend
from torch import Tensor

from tests.workers.test_certificates import backend, blank_head, closed_form, operator_of, written

__all__ = ["backend"]


NONE: dict[str, list[str]] = {"x0": [], "preconditioner": []}


def tokens() -> Tensor:
    return torch.randint(5, (3, 6), generator=torch.Generator().manual_seed(0))


async def elements(backend: Backend, name: str, folder: Path, dtype: torch.dtype) -> Tensor:
    path = folder / f"{name}.raw"
    await backend.save_vector(name, path)
    return torch.frombuffer(bytearray(path.read_bytes()), dtype=dtype).double()


async def solved(backend: Backend, operator: Operator, spec: SolveSpec, num_b: int) -> SolveResult:
    outputs = [f"x{index}" for index in range(2 * num_b)]
    inputs = {"b": [f"b{index}" for index in range(num_b)], **NONE}
    async for step in backend.run(operator, "solve", spec, outputs, inputs):
        if isinstance(step, SolveResult):
            return step
    raise AssertionError("the run gave no result")


async def product(backend: Backend, operator: Operator, folder: Path, x: Tensor) -> Tensor:
    """The product of an operator in float64 with a vector."""
    path = folder / "x.raw"
    path.write_bytes(x.numpy().tobytes())
    await backend.create_vector("x", operator.space, RawFile(path))
    await backend.apply(operator, ["x"], ["product"])
    return await elements(backend, "product", folder, torch.float64)


@pytest.mark.parametrize(
    ("dtype", "precision"), [("float64", "full"), ("float32", "full"), ("float32", "bfloat16")]
)
async def test_the_residual_is_that_of_the_exact_operator(
    backend: Backend, tmp_path: Path, dtype: str, precision: str
) -> None:
    model, ids = blank_head(), tokens()
    operator = written(model, tmp_path, ids, dtype, kind="ggn", precision=precision)
    wide = operator_of(tmp_path, "float64", kind="ggn")
    damping = 0.1 * float(closed_form(model, ids)[0])
    kind = torch.float64 if dtype == "float64" else torch.float32
    for index in range(2):
        await backend.create_vector(f"b{index}", operator.space, Seeded(index, "gaussian"))
    spec = SolveSpec(("b0", "b1"), damping=damping, tol=2e-6)
    result = await solved(backend, operator, spec, 2)
    assert result.provenance["method"] == "cg"
    assert result.provenance["verified_in"] == "float64"
    assert result.provenance["right_hand_sides_in_lockstep"] == "2"
    for index, system in enumerate(result.systems):
        assert isinstance(system, System)
        assert system.outcome == "CONVERGED"
        x = await elements(backend, f"x{index}", tmp_path, kind)
        b = await elements(backend, f"b{index}", tmp_path, kind)
        ax = await product(backend, wide, tmp_path, x)
        true = float((b - ax - damping * x).norm() / b.norm())
        assert true <= 2e-6 * (1 + 1e-2)
        assert system.relative_residual == pytest.approx(true, rel=0.05, abs=1e-7)


async def test_vectors_that_are_not_on_the_ranks_end_a_run_before_it_begins(
    tmp_path: Path,
) -> None:
    backend = open_backend(kind="inprocess", num_workers=1, device="cpu")
    await backend.start()
    operator = written(blank_head(), tmp_path, tokens(), "float64", kind="ggn")
    run = backend.run(operator, "solve", SolveSpec(("b",)), ["x"], {"b": ["b"], **NONE})
    first = await anext(run)
    assert isinstance(first, RunProgress)
    assert first.stage == "loading"
    with pytest.raises(BackendError, match="INPUT_MISSING"):
        await anext(run)
    await backend.close()
