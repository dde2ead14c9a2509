"""What is claimed in bfloat16, by every question, holds for the float64 matrix of 200 models."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, final

import pytest
import torch
from hvp_core.model.huggingface import attention
from hvp_operations.checking import Seed
from hvp_operations.density import DensitySpec
from hvp_operations.density.record import DensityResult as Density
from hvp_operations.diagonal import DiagonalSpec
from hvp_operations.eigsh import EigshSpec
from hvp_operations.low_rank import LowRankSpec
from hvp_operations.operation import Result
from hvp_operations.solve import SolveSpec
from hvp_operations.svds import SvdsSpec
from hvp_operations.trace import TraceSpec
from hvp_operations.trace_of import TraceOfSpec
from hvp_workers.backend import Backend, Operator
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tests.core import references
from tests.core.problems import llama_config, scatter
from tests.workers.test_certificates import backend, operator_of, written
from tests.workers.test_solve import elements

__all__ = ["backend"]

#: So many of 50 intervals that hold the truth in 95 % of cases do, but with a chance of 1e-4.
_LEAST = 0.8


@final
class Case(NamedTuple):
    """A model with its matrices in float64.

    Attributes:
        operator: Its Hessian in bfloat16.
        folder: Where its vectors are written to.
        hessian: (n, n).
        gauss_newton: (n, n).
        jacobian: Of all logits (m, n).
        seed: Of the run.
    """

    operator: Operator
    folder: Path
    hessian: Tensor
    gauss_newton: Tensor
    jacobian: Tensor
    seed: Seed

    @property
    def size(self) -> float:
        """Norm of the Gauss-Newton matrix."""
        return float(torch.linalg.matrix_norm(self.gauss_newton, 2))

    def of(self, kind: str) -> Operator:
        """The operator of a kind."""
        return replace(self.operator, kind=kind)


def cases(folder: Path, numbers: range) -> Sequence[Case]:
    """Models of one block whose matrices are small enough to be dense."""
    attention.register()
    sizes = {"hidden_size": 4, "intermediate_size": 6, "num_attention_heads": 2, "vocab_size": 12}
    one = {"num_key_value_heads": 1, "num_hidden_layers": 1}
    config = LlamaConfig(**{**llama_config().to_dict(), **sizes, **one})
    config._attn_implementation = attention.NAME
    model = LlamaForCausalLM(config)
    ids = torch.randint(12, (3, 6), generator=torch.Generator().manual_seed(0))
    found = []
    for number in numbers:
        scatter(model, seed=number)
        place = folder / str(number)
        place.mkdir()
        written(model, place, ids, "float32", precision="bfloat16")
        values = {name: each.detach().double() for name, each in model.named_parameters()}

        def logits(p: Mapping[str, Tensor]) -> Tensor:
            return references.llama(p, ids, None, config)

        def outputs(flat: Tensor, values: Mapping[str, Tensor] = values) -> Tensor:
            return logits(references.unflatten(flat, values)).flatten()

        flat = references.flatten(values)
        loss = references.token_loss(logits, ids, values)
        hessian = torch.func.hessian(loss)(flat).detach()
        found.append(
            Case(
                operator_of(place, "float32", precision="bfloat16"),
                place,
                hessian,
                references.gauss_newton(logits, ids, values, flat).detach(),
                torch.func.jacrev(outputs)(flat).detach(),
                Seed(number),
            )
        )
    return found


async def answer(
    backend: Backend,
    operator: Operator,
    spec: Any,
    names: Sequence[str] = (),
    inputs: Mapping[str, Sequence[str]] | None = None,
) -> Any:
    """The result of a question; its vectors are stored under the names."""
    operation = type(spec).__module__.rpartition(".")[2]
    async for step in backend.run(operator, operation, spec, names, inputs or {}):
        if isinstance(step, Result):
            return step
    raise AssertionError("the run gave no result")


async def vectors(backend: Backend, case: Case, names: Sequence[str]) -> Tensor:
    """Vectors of the ranks, as columns."""
    columns = [await elements(backend, name, case.folder, torch.float32) for name in names]
    return torch.stack(columns, 1)


# A share of the claims that hold, which is 1 where they are certain -------------------------------


def near(values: Sequence[float], bounds: Sequence[float], true: Tensor) -> float:
    """Whether each interval holds one of the true values; they are given, and some bound."""
    assert len(values) == len(bounds) > 0
    for value, bound in zip(values, bounds, strict=True):
        assert float((true - value).abs().min()) <= bound
    return 1.0


async def eigsh(backend: Backend, case: Case) -> float:
    spec = EigshSpec(3, "BE", tol=0.02, seed=case.seed, max_products=60)
    found = await answer(backend, case.operator, spec, ["e0", "e1", "e2"])
    return near(found.eigenvalues, found.error_bounds, torch.linalg.eigvalsh(case.hessian))


async def svds(backend: Backend, case: Case) -> float:
    spec = SvdsSpec(2, tol=0.02, seed=case.seed, max_products=120)
    found = await answer(backend, case.of("jacobian"), spec, ["u0", "u1", "v0", "v1"])
    return near(found.singular_values, found.error_bounds, torch.linalg.svdvals(case.jacobian))


async def trace(backend: Backend, case: Case) -> float:
    spec = TraceSpec("hutchinson", rtol=1e-9, max_products=30, seed=case.seed)
    found = await answer(backend, case.operator, spec)
    return float(found.low <= float(case.hessian.trace()) <= found.high)


async def log_determinant(backend: Backend, case: Case) -> float:
    damping = 0.1 * case.size
    spec = TraceOfSpec("log", damping=damping, rtol=1e-9, max_products=50, seed=case.seed)
    found = await answer(backend, case.of("ggn"), spec)
    true = torch.linalg.eigvalsh(case.gauss_newton).clamp(min=0).add(damping).log().sum()
    return float(found.low <= float(true) <= found.high)


async def density(backend: Backend, case: Case) -> float:
    spec = DensitySpec(num_probes=6, num_steps=8, seed=case.seed)
    found = await answer(backend, case.operator, spec)
    record = Density(
        quadratures=found.quadratures,
        orthogonality_defect=found.orthogonality_defect,
        num_products=found.num_products,
        loss=0.0,
        provenance={
            "dtype": "float32",
            "precision": "bfloat16",
            "num_parameters": str(len(case.hessian)),
        },
    )
    count = record.count(0.1 * case.size, math.inf)
    true = int((torch.linalg.eigvalsh(case.hessian) > 0.1 * case.size).sum())
    return float(count.low <= true <= count.high)


async def diagonal(backend: Backend, case: Case) -> float:
    spec = DiagonalSpec("hutchinson", rtol=1e-9, max_products=24, seed=case.seed)
    found = await answer(backend, case.operator, spec, ["diagonal", "error"])
    columns = await vectors(backend, case, ["diagonal", "error"])
    away = (columns[:, 0] - case.hessian.diagonal()).abs()
    return float((away <= found.interval_factor * columns[:, 1] + found.rounding).double().mean())


async def solve(backend: Backend, case: Case) -> float:
    await backend.gradient(case.operator, "b")
    damping = 0.05 * case.size
    spec = SolveSpec(("b",), damping=damping, method="cg", tol=1e-3, max_products=60)
    inputs = {"b": ["b"], "x0": [], "preconditioner": []}
    found = await answer(backend, case.of("ggn"), spec, ["x", "d"], inputs)
    (system,) = found.systems
    x, b = (await vectors(backend, case, ["x", "b"])).unbind(1)
    residual = b - case.gauss_newton @ x - damping * x
    assert system.is_exact
    assert system.outcome != "CONVERGED" or system.relative_residual <= 1e-3
    told = system.relative_residual * float(b.norm())
    assert float(residual.norm()) == pytest.approx(told, rel=1e-3, abs=2e-5 * float(b.norm()))
    return 1.0


async def low_rank(backend: Backend, case: Case) -> float:
    spec = LowRankSpec(4, oversampling=4, seed=case.seed)
    names = [f"l{index}" for index in range(4)]
    found = await answer(backend, case.of("ggn"), spec, names)
    assert found.is_exact
    columns = await vectors(backend, case, names[: len(found.eigenvalues)])
    kept = columns * torch.tensor(found.eigenvalues) @ columns.T
    left = float(torch.linalg.matrix_norm(case.gauss_newton - kept, 2))
    rounding = 1e-5 * case.size
    assert found.error - rounding <= left <= found.error_bound + rounding
    return 1.0


#: Each question, and the share of its claims that have to hold.
QUESTIONS: Mapping[Callable[[Backend, Case], Awaitable[float]], float] = {
    eigsh: 1.0,
    svds: 1.0,
    trace: _LEAST,
    log_determinant: _LEAST,
    density: _LEAST,
    diagonal: 0.93,
    solve: 1.0,
    low_rank: 1.0,
}


@pytest.mark.slow
@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("part", range(4))
async def test_what_is_claimed_in_bfloat16_holds_for_the_float64_matrix(
    backend: Backend, tmp_path: Path, part: int
) -> None:
    held: dict[str, list[float]] = {question.__name__: [] for question in QUESTIONS}
    for case in cases(tmp_path, range(50 * part, 50 * part + 50)):
        for question in QUESTIONS:
            held[question.__name__].append(await question(backend, case))
    shares = {name: sum(each) / len(each) for name, each in held.items()}
    assert all(shares[each.__name__] >= least for each, least in QUESTIONS.items()), shares
