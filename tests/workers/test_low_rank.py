"""Low-rank matrices of real models through the engine, of coarse products too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hvp_operations.low_rank import LowRankResult, LowRankSpec
from hvp_operations.solve import SolveSpec, System
from hvp_workers.backend import Backend, Operator, RawFile, Seeded
from torch import Tensor

from tests.workers.test_certificates import backend, blank_head, closed_form, operator_of, written
from tests.workers.test_solve import NONE, elements, tokens

__all__ = ["backend"]

K, HEAD = 20, 40


async def approximated(backend: Backend, operator: Operator, spec: LowRankSpec) -> LowRankResult:
    outputs = [f"u{index}" for index in range(spec.k)]
    async for step in backend.run(operator, "low_rank", spec, outputs):
        if isinstance(step, LowRankResult):
            return step
    raise AssertionError("the run gave no result")


async def preconditioned(
    backend: Backend, operator: Operator, values: tuple[float, ...], damping: float
) -> System:
    names = [f"u{index}" for index in range(len(values))]
    spec = SolveSpec(
        ("b",),
        damping=damping,
        tol=1e-5,
        preconditioner=tuple(names),
        preconditioner_values=values,
    )
    inputs = {**NONE, "b": ["b"], "preconditioner": names}
    async for step in backend.run(operator, "solve", spec, ["x", "d"], inputs):
        if hasattr(step, "systems"):
            system: System = step.systems[0]
            return system
    raise AssertionError("the run gave no result")


async def all_of_the_head(backend: Backend, operator: Operator, folder: Path, n: int) -> Tensor:
    """G (n, n) of a blank head: zero but for the rows and columns of the head, the last ones."""
    whole = torch.zeros(n, n, dtype=torch.float64)
    for index in range(n - HEAD, n):
        unit = torch.zeros(n, dtype=torch.float64)
        unit[index] = 1
        (folder / "unit.raw").write_bytes(unit.numpy().tobytes())
        await backend.create_vector("unit", operator.space, RawFile(folder / "unit.raw"))
        await backend.apply(operator, ["unit"], ["column"])
        whole[:, index] = await elements(backend, "column", folder, torch.float64)
    return whole


@pytest.mark.slow
async def test_of_coarse_products_the_error_is_that_of_the_exact_operator(
    backend: Backend, tmp_path: Path
) -> None:
    model, ids = blank_head(), tokens()
    operator = written(model, tmp_path, ids, "float32", kind="ggn", precision="bfloat16")
    true = closed_form(model, ids)
    size = float(true[0])
    found = await approximated(backend, operator, LowRankSpec(K))
    assert (found.method, found.outcome, found.is_exact) == ("nystrom", "CONVERGED", True)
    # Not those that bound the error alone: all are taken in float64.
    assert found.num_exact_products == found.num_products == K + 10 + 10
    wide = operator_of(tmp_path, "float64", kind="ggn")
    n = int(found.provenance["num_parameters"])
    whole = await all_of_the_head(backend, wide, tmp_path, n)
    assert float(whole.trace()) == pytest.approx(float(true.sum()), rel=1e-5)
    u = torch.stack(
        [await elements(backend, f"u{index}", tmp_path, torch.float32) for index in range(K)]
    )
    values = torch.tensor(found.eigenvalues, dtype=torch.float64)
    error = float(torch.linalg.matrix_norm(whole - u.T @ torch.diag(values) @ u, 2))
    assert found.error - 1e-5 * size <= error <= found.error_bound + 1e-5 * size
    assert (values <= torch.linalg.eigvalsh(whole)[-K:] + 1e-5 * size).all()
    await backend.create_vector("b", operator.space, Seeded(1, "gaussian"))
    system = await preconditioned(backend, operator, found.eigenvalues, 0.05 * size)
    assert (system.outcome, system.is_exact) == ("CONVERGED", True)
    assert system.relative_residual <= 1e-5
