"""What one call keeps for the next never answers another question."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import pytest
import torch
from hvp_core.autodiff import comparison, looks, verdicts, verify
from hvp_core.autodiff.product_spec import HESSIAN
from hvp_core.autodiff.trace import trace_graph
from hvp_core.autodiff.traced import TracedHead
from hvp_core.autodiff.verdicts import Verdicts
from hvp_core.losses.loss import CrossEntropy, Loss
from torch import Tensor, nn

from tests.core.problems import CPU, Problem, llama_problem, module_problem
from tests.core.references import relative_error
from tests.core.test_schedules import curvature_of, distance, probes

X = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TARGETS = torch.tensor([0, 1, 2, 1, 0])


def three_blocks(loss: Loss | None = None) -> Problem:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    return module_problem(module, loss or CrossEntropy(), X, TARGETS)


def test_a_last_block_that_one_product_refuses_is_used_by_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    problem = three_blocks()
    v = probes(problem, 1)
    expected = curvature_of(problem).hvp(v)
    right = TracedHead.run

    def wrong(self: TracedHead, *args: Any, **kwargs: Any) -> Any:
        if self.dual.passes == HESSIAN.passes:
            for each in args[3][0]._views.values():
                each.add_(1e-3)
        return right(self, *args, **kwargs)

    monkeypatch.setattr(TracedHead, "run", wrong)
    monkeypatch.setattr(verify, "_verified", set())
    curvature = curvature_of(problem)
    curvature.gradient()  # keeps the last block's trace, which is right for a gradient
    found = curvature.hvp(v)
    assert "torch does not confirm its trace" in curvature.notes()["fallback_2"]
    assert distance(found, expected) < 1e-12


@final
@dataclass(frozen=True)
class Smoothed(Loss):
    """Cross-entropy against labels of which a part is spread over all classes."""

    smoothing: float

    def _goal(self, output: Tensor, target: Tensor) -> Tensor:
        sure = nn.functional.one_hot(target, output.shape[-1]).to(output.dtype)
        return sure * (1 - self.smoothing) + self.smoothing / output.shape[-1]

    def weight(self, target: Tensor) -> int:
        return target.numel()

    def value(self, output: Tensor, target: Tensor) -> Tensor:
        return -(self._goal(output, target) * output.log_softmax(-1)).sum(dtype=torch.float64)

    def gradient(self, output: Tensor, target: Tensor) -> Tensor:
        return output.softmax(-1) - self._goal(output, target)

    def curve(self, output: Tensor, tangent: Tensor, target: Tensor) -> Tensor:
        p = output.softmax(-1)
        return p * (tangent - (p * tangent).sum(-1, keepdim=True))

    def by_target(self, values: Tensor) -> Tensor:
        return values.sum(-1, keepdim=True)


def test_two_losses_of_one_class_are_two_losses() -> None:
    for smoothing in (0.1, 0.2):
        problem = three_blocks(Smoothed(smoothing))

        def loss(flat: Tensor, problem: Problem = problem, smoothing: float = smoothing) -> Tensor:
            shapes = [each.shape for each in problem.parameters.values()]
            sizes = [shape.numel() for shape in shapes]
            w, b, u, c = (
                part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)
            )
            z = torch.tanh(X @ w.T + b) @ u.T + c
            return nn.functional.cross_entropy(z, TARGETS, label_smoothing=smoothing)

        (v,) = probes(problem, 1)
        curvature = curvature_of(problem)
        gradient = torch.func.grad(loss)(problem.flat)
        assert relative_error(curvature.gradient(), gradient) < 1e-12
        hv = torch.func.hessian(loss)(problem.flat) @ v
        assert relative_error(curvature.hvp([v])[0], hv) < 1e-12
        assert not any(name.startswith("fallback") for name in curvature.notes())


def test_losses_of_equal_settings_share_their_programs() -> None:
    assert Smoothed(0.1) == Smoothed(0.1) != Smoothed(0.2)
    assert CrossEntropy() == CrossEntropy()
    assert len({CrossEntropy(), CrossEntropy(), Smoothed(0.1), Smoothed(0.1)}) == 2


class Twice(nn.Module):
    """Two weights of one shape."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.eye(3) + 0.3)
        self.other = nn.Parameter(torch.eye(3) - 0.2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(torch.tanh(x @ self.one.T) @ self.other.T)


def test_operators_of_one_chain_look_at_its_blocks_once_and_are_each_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = nn.Sequential(Twice(), Twice(), nn.Linear(3, 3)).double()
    problem = module_problem(module, CrossEntropy(), X, TARGETS)
    sizes = [each.numel() for each in problem.parameters.values()]

    def loss(flat: Tensor) -> Tensor:
        values = {
            name: part.view(each.shape)
            for (name, each), part in zip(
                problem.parameters.items(), flat.split(sizes), strict=True
            )
        }
        return nn.functional.cross_entropy(
            torch.func.functional_call(module, values, (X,)), TARGETS
        )

    hessian = torch.func.hessian(loss)(problem.flat)
    seen: list[object] = []
    right = trace_graph

    def counted(*arguments: Any) -> Any:
        seen.append(arguments)
        return right(*arguments)

    monkeypatch.setattr(looks, "trace_graph", counted)
    names = list(problem.parameters)
    # Parameters of one shape in turn; of the second block alone, whose input then is data.
    for selected in (["0.one", "2.weight"], ["0.other", "2.weight"], ["1.one"], ["1.other"], names):
        of = torch.cat(
            [torch.full((size,), name in selected) for name, size in zip(names, sizes, strict=True)]
        )
        for _ in range(2):
            before = len(seen)
            curvature = problem.curvature(2, selected=selected)
            identity = torch.eye(int(of.sum()), dtype=torch.float64)
            found = torch.stack(curvature.hvp(list(identity)))
            assert relative_error(found, hessian[of][:, of]) < 1e-9
        assert len(seen) == before  # the second operator had none of its own


class Power(nn.Module):
    """A block whose program differs from its kin's in one number, or in where it takes it from."""

    def __init__(self, exponent: int, doubles: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(3) + 0.1 * exponent)
        self.exponent, self.doubles = exponent, doubles

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(x @ self.weight.T)
        z = y if self.doubles else x
        return y + 0.1 * z**self.exponent


def test_blocks_that_differ_in_one_number_or_one_operand_share_no_program() -> None:
    parts = [Power(2, True), Power(2, True), Power(3, True), Power(2, False)]
    module = nn.Sequential(*parts, nn.Linear(3, 3)).double()
    problem = module_problem(module, CrossEntropy(), X, TARGETS)
    curvature = problem.curvature(2)
    identity = torch.eye(len(problem.flat), dtype=torch.float64)
    found = torch.stack(curvature.hvp(list(identity)))
    names = list(problem.parameters)
    sizes = [each.numel() for each in problem.parameters.values()]

    def loss(flat: Tensor) -> Tensor:
        parts = flat.split(sizes)
        shapes = [each.shape for each in problem.parameters.values()]
        values = {
            name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)
        }
        return nn.functional.cross_entropy(
            torch.func.functional_call(module, values, (X,)), TARGETS
        )

    assert relative_error(found, torch.func.hessian(loss)(problem.flat)) < 1e-9
    executors = curvature._executors.executor_of
    programs = [executors[index, 0].key for index in range(len(parts))]
    assert programs[1] not in (programs[2], programs[3])


def test_what_is_known_to_be_right_is_compared_once_for_all_processes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    problem = llama_problem()
    v = probes(problem, 1)
    compared: list[str] = []
    matches = comparison.Comparer._matches

    def counted(self: comparison.Comparer, link: Any, *args: Any) -> bool | None:
        compared.append(link.name)
        return matches(self, link, *args)

    monkeypatch.setattr(comparison.Comparer, "_matches", counted)

    def process(source: str = "", loss: Loss | None = None) -> list[str]:
        """What another process compares for the same product."""
        fresh = Verdicts()
        if source:
            monkeypatch.setattr(verdicts, "_source", lambda: source)
        fresh.keep_in(tmp_path / "verified", CPU)
        monkeypatch.setattr(verify, "_verified", fresh)
        monkeypatch.setattr(problem.chain, "loss", loss or CrossEntropy())
        compared.clear()
        curvature_of(problem).hvp(v)
        return list(compared)

    everything = ["embedding", "model.layers.0", "head"]
    assert process() == everything
    assert process() == []
    assert process(source="another version of this package") == everything
    assert process(source="another version of this package") == []
    # Nobody knows what a loss of somebody else's will be in another process.
    for _ in range(2):
        assert process(loss=Smoothed(0.1)) == ["head"]
    (tmp_path / "verified").rename(tmp_path / "gone")
    (tmp_path / "verified").write_text("no folder")
    assert process() == everything
