"""What a model's code does wrong has a reason and names the block; what ours does is INTERNAL."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hvp_core.autodiff import builder, subprograms, trace
from hvp_core.autodiff.cache import Cache
from hvp_core.autodiff.eager import EagerExecutor, EagerHead
from hvp_core.autodiff.product_spec import GRADIENT
from hvp_core.blame import whose
from hvp_core.curvature.curvature import Curvature
from hvp_core.errors import CurvatureError
from hvp_core.losses.loss import CrossEntropy, SquaredError
from hvp_core.model.chain import ModuleChain, function_of
from torch import Tensor, nn

from tests.core.problems import Problem, module_problem
from tests.core.test_schedules import KINDS, curvature_of, distance, probes

X = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TARGETS = torch.tensor([0, 1, 2, 1, 0])
CALLS: dict[str, Callable[[Curvature, Tensor], Any]] = {
    "loss": lambda curvature, v: curvature.loss(),
    "gradient": lambda curvature, v: curvature.gradient(),
    "Hv": lambda curvature, v: curvature.hvp([v]),
    "Gv": lambda curvature, v: curvature.ggn([v]),
}


class OddError(Exception):
    """Of nobody's hierarchy."""


class Raises(nn.Module):
    """Raises when it is called for the n-th time and after."""

    def __init__(self, error: Exception, after: int = 0):
        super().__init__()
        self.error, self.after = error, after

    def forward(self, x: Tensor) -> Tensor:
        self.after -= 1
        if self.after < 0:
            raise self.error
        return torch.tanh(x)


def in_a_row(middle: nn.Module, last: nn.Module | None = None) -> Problem:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), middle, last or nn.Linear(4, 3)).double()
    return module_problem(module, CrossEntropy(), X, TARGETS)


ERRORS = [
    ValueError("no"),
    KeyError("no"),
    RuntimeError("no"),
    AssertionError("no"),
    OddError("no"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("last", [False, True], ids=["a block", "the last block"])
def test_whatever_a_models_code_raises_has_a_reason_and_names_the_block(
    call: str, error: Exception, last: bool
) -> None:
    blocks = (nn.Tanh(), Raises(error)) if last else (Raises(error), nn.Linear(4, 3))
    problem = in_a_row(*blocks)
    with pytest.raises(CurvatureError) as caught:
        CALLS[call](curvature_of(problem), problem.flat)
    assert caught.value.reason == "MODEL_UNSUPPORTED"
    assert caught.value.metadata["block"] == ("2" if last else "1")
    assert caught.value.metadata["operation"]
    assert f"{type(error).__name__}: " in caught.value.message
    assert "test_models_own_code.py" in caught.value.message  # and the line


@pytest.mark.parametrize("call", CALLS)
def test_a_model_that_fails_only_while_it_is_walked_names_the_block_too(call: str) -> None:
    # Not traced, and not the first time: what was seen while routes were found has run.
    class Later(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            if bool(x.sum() > 1e9) or self.calls > 30:
                raise OddError("too often")
            type(self).calls += 1
            return torch.tanh(x)

    problem = in_a_row(Later())
    curvature = curvature_of(problem)
    CALLS[call](curvature, problem.flat)

    def again() -> None:
        for _ in range(30):
            CALLS[call](curvature, problem.flat)

    with pytest.raises(CurvatureError) as caught:
        again()
    assert (caught.value.reason, caught.value.metadata["block"]) == ("MODEL_UNSUPPORTED", "1")


BUGS = [AssertionError("ours"), TypeError("ours"), KeyError("ours"), ZeroDivisionError("ours")]


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: type(bug).__name__)
@pytest.mark.parametrize("where", [(trace, "_clean"), (trace, "terms_of"), (builder, "signature")])
def test_a_bug_of_ours_never_becomes_a_slow_success(
    monkeypatch: pytest.MonkeyPatch, where: Any, bug: Exception
) -> None:
    module, name = where
    # Raised in a frame of this library, as a bug of it would be.
    source = compile("def broken(*_, **__):\n    raise bug", subprograms.__file__, "exec")
    scope: dict[str, Any] = {"bug": bug}
    exec(source, scope)  # noqa: S102 (a function that claims to be of another file)
    monkeypatch.setattr(module, name, scope["broken"])
    monkeypatch.setattr(builder, "_duals", Cache(64))
    problem = in_a_row(nn.Tanh())
    with pytest.raises(CurvatureError) as caught:
        curvature_of(problem).hvp([problem.flat])
    assert caught.value.reason == "INTERNAL"
    assert caught.value.metadata["exception"] == type(bug).__name__
    assert "in broken" in caught.value.metadata["traceback"]


@pytest.mark.parametrize(
    "error",
    [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate")],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("call", CALLS)
def test_a_lack_of_memory_is_said_and_never_a_reason_for_a_slower_way(
    call: str, error: Exception
) -> None:
    problem = in_a_row(Raises(error))
    with pytest.raises(CurvatureError) as caught:
        CALLS[call](curvature_of(problem), problem.flat)
    assert (caught.value.reason, caught.value.metadata["block"]) == ("OUT_OF_MEMORY", "1")


def test_an_error_is_the_models_if_a_line_of_the_models_raised_it() -> None:
    def blamed(function: Callable[[], object]) -> str:
        try:
            function()
        except Exception as error:
            return whose(error)
        raise AssertionError

    nothing: dict[str, int] = {}
    assert blamed(lambda: nothing["of a model"]) == "model"
    assert blamed(lambda: ModuleChain(3, None)) == "ours"  # type: ignore[arg-type]
    assert blamed(lambda: torch.ones(2) @ torch.ones(3)) == "model"
    # torch refuses an operation that we call with what the model gave us.
    problem = in_a_row(nn.Tanh())
    target = TARGETS + 100
    weights = function_of(problem.chain.blocks[2].body((), dense=True))
    closing = EagerHead(weights, (), GRADIENT, CrossEntropy(), target, 1.0)
    y = torch.ones(5, 3)
    assert blamed(lambda: closing._cotangents(y, y)) == "model"
    assert blamed(lambda: EagerExecutor(None, ()).value({}, X)) == "ours"  # type: ignore[arg-type]


class Looks(nn.Module):
    """Looks at its values: no trace holds for the next ones."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x) if bool(x.sum() > 1e9) else torch.tanh(x)


@pytest.mark.parametrize("kind", KINDS)
def test_a_strict_policy_refuses_the_slower_way_and_names_it(kind: Any) -> None:
    problem = in_a_row(Looks())
    v = probes(problem, 1)
    expected = curvature_of(in_a_row(nn.Tanh()), strict=True).product(kind, v)
    assert distance(curvature_of(problem).product(kind, v), expected) < 1e-12
    with pytest.raises(CurvatureError, match="fallback_1: it is differentiated line by line"):
        curvature_of(problem, strict=True).product(kind, v)


# Rows --------------------------------------------------------------------------------------------


class Function(nn.Module):
    def __init__(self, f: Callable[[Tensor], Tensor]):
        super().__init__()
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x)


ACROSS: dict[str, Callable[[Tensor], Tensor]] = {
    "a mean over rows": lambda x: x - x.mean(0),
    "a sum along rows": lambda x: x.cumsum(0),
    "rows turned round": lambda x: x.flip(0),
    "dropout that asks nobody": lambda x: nn.functional.dropout(x, 0.5),
    "noise": lambda x: x + torch.randn_like(x),
}


@pytest.mark.parametrize("what", ACROSS)
@pytest.mark.parametrize("micro_batch_size", [1, 5])
@pytest.mark.parametrize("call", CALLS)
def test_an_operation_across_rows_is_refused_whatever_the_micro_batch(
    what: str, micro_batch_size: int, call: str
) -> None:
    problem = in_a_row(Function(ACROSS[what]))
    with pytest.raises(CurvatureError, match="block 1 does not give each row") as caught:
        CALLS[call](curvature_of(problem, micro_batch_size), problem.flat)
    assert (caught.value.reason, caught.value.metadata["block"]) == ("MODEL_UNSUPPORTED", "1")


def test_operations_within_a_row_are_not_refused() -> None:
    within = Function(lambda x: x.flip(1).cumsum(1) - x.mean(1, keepdim=True))
    assert curvature_of(in_a_row(within)).loss() > 0
    alone = module_problem(nn.Linear(3, 3).double(), CrossEntropy(), X[:1], TARGETS[:1])
    assert curvature_of(alone).loss() > 0


@pytest.mark.parametrize("part", [nn.Dropout(0.5), nn.Identity(), nn.BatchNorm1d(3)])
def test_train_mode_of_any_part_is_refused_and_the_part_named(part: nn.Module) -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Tanh(), part)).eval()
    part.train()
    with pytest.raises(CurvatureError, match=r": 1\.1 \(") as caught:
        ModuleChain(module, SquaredError())
    assert (caught.value.reason, caught.value.metadata["block"]) == ("MODEL_UNSUPPORTED", "1.1")
    ModuleChain(module.eval(), SquaredError())


class OfItsOwn(nn.Module):
    def __init__(self, *parts: nn.Module):
        super().__init__()
        self.inner = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return nn.functional.dropout(y, 0.1, self.training)


@pytest.mark.parametrize(
    ("parts", "named"),
    [
        ((nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5)), "inner.1 (BatchNorm1d) normalises"),
        ((nn.Linear(3, 3), nn.Dropout(0.5), nn.BatchNorm1d(3)), "inner.1 (Dropout) is in train"),
        ((nn.Dropout(0.0), nn.InstanceNorm1d(3), nn.RReLU()), "inner.2 (RReLU) is in train"),
        ((nn.Linear(3, 3), nn.Tanh()), "the model (OfItsOwn) is in train"),
    ],
)
def test_the_part_that_is_to_blame_is_named_among_all_that_are_in_train_mode(
    parts: tuple[nn.Module, ...], named: str
) -> None:
    with pytest.raises(CurvatureError) as caught:
        ModuleChain(OfItsOwn(*parts).train(), SquaredError())
    assert caught.value.message.startswith(named)
    assert "call model.eval()" in caught.value.message


def test_batch_norm_without_running_statistics_is_refused_in_eval_mode_too() -> None:
    module = nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False)).eval()
    with pytest.raises(CurvatureError, match=r": 0 \(BatchNorm1d\) normalises.*running statistics"):
        ModuleChain(module, SquaredError())


# Stopped gradients -------------------------------------------------------------------------------


class Stopped(nn.Module):
    """A recurrence whose first half is kept out of training, in each of the ways there are."""

    def __init__(self, how: str):
        super().__init__()
        self.how = how
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "no_grad":
            with torch.no_grad():
                z = torch.tanh(self.inner(x))
        elif self.how == "set_grad_enabled":
            before = torch.is_grad_enabled()
            torch.set_grad_enabled(False)
            z = torch.tanh(self.inner(x))
            torch.set_grad_enabled(before)
        elif self.how == "decorated":
            z = torch.no_grad()(lambda y: torch.tanh(self.inner(y)))(x)
        else:
            z = torch.tanh(self.inner(x))
            z = z.detach() if self.how == "detach" else z.data
        return torch.tanh(self.inner(z)) * z


@pytest.mark.parametrize("how", ["no_grad", "set_grad_enabled", "decorated", "detach", "data"])
@pytest.mark.parametrize("last", [False, True], ids=["a block", "the last block"])
def test_derivatives_are_those_of_the_loss_as_a_function_whatever_its_code_stops(
    how: str, last: bool
) -> None:
    problem = in_a_row(nn.Linear(4, 4), Stopped(how)) if last else in_a_row(Stopped(how))
    (v,) = probes(problem, 1)
    v /= v.norm()
    curvature = curvature_of(problem, strict=True)
    gradient, hv = curvature.gradient(), curvature.hvp([v])[0]
    grad_mode = torch.is_grad_enabled()

    def loss(step: float) -> float:
        moved = curvature_of(problem)
        moved.parameters = problem.flat + step * v
        return moved.loss()

    steps = {step: loss(step) for step in (-2e-3, -1e-3, 0.0, 1e-3, 2e-3)}
    near, far = (
        (steps[step] - steps[-step], steps[step] + steps[-step] - 2 * steps[0.0])
        for step in (1e-3, 2e-3)
    )
    slope = (8 * near[0] - far[0]) / (12 * 1e-3)
    bend = (16 * near[1] - far[1]) / (12 * 1e-6)
    assert float(gradient @ v) == pytest.approx(slope, rel=1e-8, abs=1e-10)
    assert float(hv @ v) == pytest.approx(bend, rel=1e-6, abs=1e-8)
    assert grad_mode is torch.is_grad_enabled() is True
    name = "remark_2" if last else "remark_1"
    assert "no_grad and detach in its code are ignored" in curvature.notes()[name]
    # Said again where the program is known already.
    again = curvature_of(problem)
    again.hvp([v])
    assert name in again.notes()
