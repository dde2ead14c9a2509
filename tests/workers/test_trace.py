"""Traces of a real model's curvature through the engine, in coarse products and in closed form."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hvp_operations.checking import Seed
from hvp_operations.trace import TraceResult, TraceSpec
from hvp_workers.backend import Backend, Operator
from hvp_workers.opening import open_backend

from tests.workers.test_certificates import blank_head, closed_form, operator_of, written


async def trace(backend: Backend, operator: Operator, spec: TraceSpec) -> TraceResult:
    async for step in backend.run(operator, "trace", spec, []):
        if isinstance(step, TraceResult):
            return step
    raise AssertionError("the run gave no result")


async def test_traces_of_a_gauss_newton_matrix_hold_its_closed_form_in_every_precision(
    tmp_path: Path,
) -> None:
    backend = open_backend(kind="inprocess", num_workers=1, device="cpu")
    await backend.start()
    model = blank_head()
    ids = torch.randint(5, (3, 6), generator=torch.Generator().manual_seed(0))
    written(model, tmp_path, ids, "float64")
    true = float(closed_form(model, ids).sum())
    # Its range has 32 dimensions, which a sketch finds; all of it is of the head's 40 parameters.
    for dtype in ("float64", "float32"):
        found = await trace(backend, operator_of(tmp_path, dtype, kind="ggn"), TraceSpec())
        assert (found.method, found.outcome) == ("xnystrace", "CONVERGED")
        assert found.low - 1e-6 * true <= true <= found.high + 1e-6 * true  # angles are float32
        assert found.num_products <= 40
    operator = operator_of(tmp_path, "float32", kind="ggn", precision="bfloat16")
    inside = 0
    for seed in range(20):
        found = await trace(backend, operator, TraceSpec(rtol=0.1, seed=Seed(seed)))
        assert (found.method, found.outcome) == ("hutchinson", "CONVERGED")
        assert found.num_exact_products >= 4
        inside += found.low <= true <= found.high
    assert inside >= 17
    per_layer = await trace(backend, operator, TraceSpec(rtol=0.1, per="layer"))
    heads = {part.name: part for part in per_layer.parts}
    assert heads["lm_head"].value == pytest.approx(per_layer.value, rel=1e-2)
    assert heads["lm_head"].low <= true <= heads["lm_head"].high
    assert abs(heads["model.layers.0"].value) <= 1e-2 * true
    await backend.close()
