"""What is rounded: by request, by torch's settings, and by operands of several types."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hvp_core.curvature.curvature import Curvature
from hvp_core.losses.loss import CrossEntropy
from hvp_core.model.agreement import disagreement
from hvp_core.model.chain import MicroBatch
from hvp_core.model.huggingface.families import CausalLanguageModels
from hvp_core.precision import exact, exact_products, matmuls
from hvp_core.settings import Precision
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.core.problems import llama_problem, module_problem
from tests.core.references import relative_error
from tests.core.test_schedules import KINDS, curvature_of, probes


@pytest.mark.parametrize("before", ["none", "ieee", "tf32"])
def test_torchs_two_settings_of_float32_products_agree_meanwhile_and_come_back(before: str) -> None:
    device: Any = torch.backends.cuda.matmul
    device.fp32_precision = before
    try:
        kinds: dict[Precision, bool] = {"full": False, "tf32": True, "bfloat16": False}
        for precision, in_tf32 in kinds.items():
            with matmuls(precision):
                assert device.allow_tf32 is in_tf32  # raises where they disagree
                assert torch.get_float32_matmul_precision() == ("high" if in_tf32 else "highest")
            assert device.fp32_precision == before
    finally:
        device.fp32_precision = "none"


class Settings(TorchDispatchMode):
    """Notes torch's setting whenever something is multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__.partition(".")[0] in ("mm", "mv", "addmm", "bmm", "dot"):
            self.seen.add(torch.get_float32_matmul_precision())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("told", ["high", "medium"])
def test_checks_are_not_rounded_whatever_torch_was_told(told: str) -> None:
    problem = llama_problem(torch.float32)
    model: Any = problem.chain._parts.model  # type: ignore[attr-defined]
    family = CausalLanguageModels()
    facts = family.facts(model, Path())
    space = problem.curvature(5).space

    def loss(batch: MicroBatch) -> float:
        return Curvature(problem.chain, space, problem.flat, batch, 1).loss()

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(told)
    try:
        for work in (
            lambda: disagreement(family, facts, model, problem.chain, space, problem.flat, loss),
            exact_products()(lambda: torch.ones(2, 2) @ torch.ones(2, 2)),
        ):
            with Settings() as settings:
                work()
            assert settings.seen == {"highest"}
            assert torch.get_float32_matmul_precision() == told
    finally:
        torch.set_float32_matmul_precision(before)


def test_positions_are_not_rounded_whatever_torch_was_told() -> None:
    problem = llama_problem()
    model: Any = problem.chain._parts.model  # type: ignore[attr-defined]
    seen = []

    def look(*_: Any) -> None:
        seen.append(torch.get_float32_matmul_precision())

    before = torch.get_float32_matmul_precision()
    handle = model.model.rotary_emb.register_forward_hook(look)
    torch.set_float32_matmul_precision("high")
    try:
        problem.curvature(5).loss()
    finally:
        torch.set_float32_matmul_precision(before)
        handle.remove()
    assert set(seen) == {"highest"}


def test_products_take_the_narrower_type_and_nothing_else_is_rounded() -> None:
    wide, narrow = torch.randn(4, 4), torch.randn(4, 4).bfloat16()
    expected = wide.bfloat16() @ narrow
    with exact():
        assert torch.equal(wide @ narrow, expected)
        assert torch.equal(torch.nn.functional.linear(wide, narrow.T), expected)
        assert torch.equal(torch.addmm(torch.zeros(4), wide, narrow), expected)
        assert (wide + narrow).dtype == torch.float32
        assert torch.equal(torch.mv(wide, narrow[0]), torch.mv(wide.bfloat16(), narrow[0]))
        norm = torch.nn.functional.group_norm(wide, 2, narrow[0], narrow[1])
        assert torch.equal(
            norm, torch.nn.functional.group_norm(wide, 2, narrow[0].float(), narrow[1].float())
        )
        assert torch.lerp(wide, narrow, 0.5).dtype == torch.bfloat16  # takes no mixed ones
        total = torch.zeros(4, 4).index_add_(0, torch.arange(4), narrow)
        assert torch.equal(total, narrow.float())
        with pytest.raises(RuntimeError, match="dtype"):
            _ = wide.double() @ wide


def modules() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {
        "linear": nn.Linear(8, 8),
        "norms": nn.Sequential(nn.GroupNorm(2, 8), nn.Linear(8, 8), nn.RMSNorm(8), nn.LayerNorm(8)),
        "convolutions": nn.Sequential(
            nn.Unflatten(1, (2, 4)),
            nn.Conv1d(2, 3, 3, padding=1),
            nn.Tanh(),
            nn.ConvTranspose1d(3, 2, 1),
            nn.Flatten(),
        ),
        "recurrent": nn.Sequential(nn.Unflatten(1, (2, 4)), Recurrent(), nn.Flatten()),
        "residual": Residual(),
    }


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.RNNCell(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        first = self.cell(x[:, 0])
        return torch.stack([first, self.cell(x[:, 1], first)], 1)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tensordot(torch.tanh(x), self.inner.weight, 1)


@pytest.mark.parametrize("name", modules())
def test_modules_of_all_kinds_take_float32_into_bfloat16_parameters(name: str) -> None:
    chain = nn.Sequential(nn.Linear(8, 8), modules()[name], nn.Linear(8, 3)).bfloat16().float()
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(3))
    problem = module_problem(chain, CrossEntropy(), x, torch.tensor([0, 1, 2, 0, 1]))
    (v,) = probes(problem, 1)
    exact_one = curvature_of(problem, 5)
    rounded = curvature_of(problem, 5, precision="bfloat16")
    for kind in KINDS:
        found, truth = rounded.product(kind, [v]), exact_one.product(kind, [v])
        assert relative_error(found[0], truth[0]) < 0.1  # of 8 bits, through three norms
    assert rounded.loss() == pytest.approx(exact_one.loss(), rel=0.01)
