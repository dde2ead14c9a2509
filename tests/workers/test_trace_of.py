"""Functions of a real model's curvature through the engine, where they are known in closed form."""

from __future__ import annotations

from pathlib import Path

import torch
from hvp_operations.checking import Seed
from hvp_operations.trace_of import Function, TraceOfResult, TraceOfSpec
from hvp_workers.backend import Backend, Operator
from hvp_workers.opening import open_backend

from tests.workers.test_certificates import blank_head, closed_form, operator_of, written


async def trace_of(backend: Backend, operator: Operator, spec: TraceOfSpec) -> TraceOfResult:
    async for step in backend.run(operator, "trace_of", spec, []):
        if isinstance(step, TraceOfResult):
            return step
    raise AssertionError("the run gave no result")


async def test_functions_of_a_gauss_newton_matrix_hold_their_closed_forms_in_coarse_precision_too(
    tmp_path: Path,
) -> None:
    backend = open_backend(kind="inprocess", num_workers=1, device="cpu")
    await backend.start()
    model = blank_head()
    ids = torch.randint(5, (3, 6), generator=torch.Generator().manual_seed(0))
    written(model, tmp_path, ids, "float64")
    values = closed_form(model, ids)
    damping = 0.01 * float(values[0])
    cases: list[tuple[Function, str, str]] = [
        ("log", "float64", "full"),
        ("inverse", "float32", "bfloat16"),
    ]
    for function, dtype, precision in cases:
        operator = operator_of(tmp_path, dtype, kind="ggn", precision=precision)
        spec = TraceOfSpec(function=function, damping=damping, max_products=30, seed=Seed(1))
        found = await trace_of(backend, operator, spec)
        n = int(found.provenance["num_parameters"])
        spectrum = torch.cat((values, torch.zeros(n - len(values)).double())) + damping
        true = float((spectrum.log() if function == "log" else 1 / spectrum).sum())
        slack = 1e-6 * abs(true)  # angles of positions are rounded to float32
        assert found.low - slack <= true <= found.high + slack
        assert found.outcome in ("CONVERGED", "MAX_PRODUCTS")
        exact = found.num_products if precision == "bfloat16" else 0
        assert found.num_exact_products == exact
    # Its null space is most of it: without damping there is no log determinant.
    operator = operator_of(tmp_path, "float64", kind="ggn")
    found = await trace_of(backend, operator, TraceOfSpec(num_steps=12, max_products=36))
    assert found.outcome == "INDEFINITE"
    assert abs(found.smallest) <= 1e-9 * float(values[0])
    await backend.close()
