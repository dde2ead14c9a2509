"""Blocks find the fast route, or a slower one that is right, and say so."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hvp_core.attention.mask import Mask, make_mask
from hvp_core.attention.rule import Span
from hvp_core.autodiff import directions, inductor, looks, traced, verify
from hvp_core.autodiff.compiler import Compiler
from hvp_core.autodiff.programs import trace_block
from hvp_core.autodiff.recorder import Env
from hvp_core.autodiff.subprograms import Subprogram, group, partition
from hvp_core.autodiff.trace import Phase, Trace
from hvp_core.autodiff.traced import TracedHead
from hvp_core.errors import CurvatureError
from hvp_core.losses.loss import CrossEntropy
from hvp_core.model.data import token_batch
from hvp_core.model.huggingface import attention
from hvp_core.model.huggingface.layered import LayeredChain
from torch import Tensor, nn
from transformers import (
    DiffLlamaConfig,
    Gemma2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen3Config,
)
from transformers.models.auto import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from tests.core.problems import (
    CPU,
    VOCABULARY,
    Problem,
    llama_problem,
    module_problem,
    ragged_tokens,
    scatter,
)
from tests.core.test_schedules import KINDS, curvature_of, distance, probes
from tests.core.test_selected_parameters import curvature_of as of_some

SMALL: dict[str, Any] = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
GATED = {**SMALL, "intermediate_size": 12, "num_key_value_heads": 1, "head_dim": 4}
CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "sliding window": lambda: MistralConfig(**GATED, sliding_window=3),
    "soft-capped, two kinds of layer": lambda: Gemma2Config(
        **{**GATED, "num_hidden_layers": 2},
        sliding_window=2,
        query_pre_attn_scalar=4,
        final_logit_softcapping=5.0,
    ),
    "norms of heads": lambda: Qwen3Config(**GATED),
    "attention beside the MLP": lambda: GPTNeoXConfig(
        **SMALL, intermediate_size=12, rotary_pct=0.5
    ),
    "positions counted by the mask": lambda: OPTConfig(
        **SMALL, ffn_dim=12, word_embed_proj_dim=8, activation_function="gelu"
    ),
    "two attentions side by side": lambda: DiffLlamaConfig(
        **{**GATED, "num_key_value_heads": 2, "intermediate_size": 8}
    ),
}


def decoder(config: PretrainedConfig) -> Problem:
    attention.register()
    config._attn_implementation = attention.NAME
    model = AutoModelForCausalLM.from_config(config).double().eval()
    scatter(model)
    ids, labels, mask = ragged_tokens()
    parameters = {name: each.detach() for name, each in model.named_parameters()}
    chain = LayeredChain(model, torch.float64, CPU)
    return Problem(chain, parameters, token_batch(ids, labels, mask))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture_is_cut_at_its_attention_and_equals_torchs_own_differentiation(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = decoder(CONFIGS[name]())
    v = probes(problem, 1)
    curvature = curvature_of(problem)
    found = {kind: curvature.product(kind, v) for kind in KINDS}
    assert not [note for note in curvature.notes() if note.startswith("fallback")]

    def refuse(*_: Any) -> Any:
        raise RuntimeError("nothing is traced")

    monkeypatch.setattr(looks, "trace_graph", refuse)
    whole = curvature_of(problem, 5)  # every block as it is, with dense masks
    for kind in KINDS:
        assert distance(found[kind], whole.product(kind, v)) < 1e-11
    refused = [note for note in whole.notes() if note.startswith("fallback")]
    assert len(refused) == len(problem.chain.blocks) > 2


class AttendsTwice(LlamaDecoderLayer):  # type: ignore[misc]
    """A second attention, of what the first has given."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x = hidden_states
        for _ in range(2):
            x = x + self.self_attn(self.input_layernorm(x), *args, **kwargs)[0]
        return x + self.mlp(self.post_attention_layernorm(x))


@pytest.mark.parametrize(
    ("selected", "num_layers"),
    [("everything", 1), pytest.param("the second layer", 2, marks=pytest.mark.slow)],
)
def test_a_block_is_cut_at_each_of_its_attentions(selected: str, num_layers: int) -> None:
    def make() -> Problem:
        problem = decoder(LlamaConfig(**{**GATED, "num_hidden_layers": num_layers}))
        model = problem.chain._parts.model  # type: ignore[attr-defined]
        for layer in model.model.layers:
            layer.__class__ = AttendsTwice
        return replace(problem, chain=LayeredChain(model, torch.float64, CPU))

    problem = make()
    of = {
        "everything": lambda name: True,
        "the second layer": lambda name: "layers.1." in name,
    }[selected]
    names = [name for name in problem.chain.shapes if of(name)]
    fast = of_some(problem, names)
    v = [fast.space.random(seed, "gaussian") for seed in (1, 2, 3)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(looks, "trace_graph", _refuse)
        whole = of_some(problem, names, strict=False)
        expected = {kind: whole.product(kind, v) for kind in KINDS}
        gradient, slopes = whole.gradient(), whole.slopes(v)
    for schedule in ("lean", "fast", "cached"):
        ours = of_some(problem, names, schedule=schedule)
        for kind in (*KINDS, *KINDS):  # and again, of what was kept
            assert distance(ours.product(kind, v), expected[kind]) < 1e-11, (schedule, kind)
        assert not [note for note in ours.notes() if note.startswith("fallback")]
    assert distance([fast.gradient()], [gradient]) < 1e-11
    assert fast.slopes(v) == pytest.approx(slopes, rel=1e-11)


def _refuse(*_: Any) -> Any:
    raise RuntimeError("nothing is traced")


class Cast(nn.Module):
    """Rounds to 16 bits whatever it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x).bfloat16().double()


class Branches(nn.Module):
    """Looks at its values: no trace holds for the next ones."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x) if bool(x.sum() > 1e9) else x * torch.tanh(x)


def test_a_block_that_looks_at_its_values_is_differentiated_by_torch_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    targets = torch.tensor([0, 1, 2, 1, 0])
    modules = [
        nn.Sequential(nn.Linear(3, 4), middle, nn.Linear(4, 3)).double()
        for middle in (Branches(), Traced())
    ]
    modules[1].load_state_dict(modules[0].state_dict())
    branching, plain = (module_problem(each, CrossEntropy(), x, targets) for each in modules)
    v = probes(branching, 2)
    with caplog.at_level(logging.WARNING):
        curvature = curvature_of(branching)
        for kind in KINDS:
            expected = curvature_of(plain).product(kind, v)
            assert distance(curvature.product(kind, v), expected) < 1e-12
    assert distance([curvature.gradient()], [curvature_of(plain).gradient()]) < 1e-12
    assert curvature.notes()["fallback_1"].startswith("it is differentiated line by line")
    assert sum("block 1 is slower" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("shift", [1e-3, torch.nan], ids=["wrong values", "no numbers"])
def test_a_closing_whose_trace_is_wrong_is_never_used(
    monkeypatch: pytest.MonkeyPatch, shift: float
) -> None:
    problem = module_problem(
        nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double(),
        CrossEntropy(),
        torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
        torch.tensor([0, 1, 2, 1, 0]),
    )
    v = probes(problem, 1)
    expected = {kind: curvature_of(problem).product(kind, v) for kind in KINDS}
    right = TracedHead.run

    def wrong(self: TracedHead, *args: Any, **kwargs: Any) -> Any:
        for each in args[3][0]._views.values():
            each.add_(shift)
        return right(self, *args, **kwargs)

    monkeypatch.setattr(TracedHead, "run", wrong)
    monkeypatch.setattr(verify, "_verified", set())
    for kind in KINDS:
        curvature = curvature_of(problem)
        assert distance(curvature.product(kind, v), expected[kind]) < 1e-12
        assert "torch does not confirm its trace" in curvature.notes()["fallback_2"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["parameters", "input", "gradient"])
def test_a_block_whose_trace_is_wrong_is_never_used_large_ones_neither(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, kind: Any, where: str
) -> None:
    # Blocks with many parameters are compared in float32; here, all that are in float32 are. Along
    # one direction alone, one in eight of these models would hide the fault.
    monkeypatch.setattr(directions, "_LARGE", 0)
    # Two blocks of one program: of the first one's input, which is data, there is no derivative.
    problem = module_problem(
        nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).to(dtype),
        CrossEntropy(),
        torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).to(dtype),
        torch.tensor([0, 1, 2, 1, 0]),
    )
    v = probes(problem, 1)
    monkeypatch.setattr(verify, "_verified", set())
    trusted = curvature_of(problem)
    expected = trusted.product(kind, v)
    assert not any(name.startswith("fallback") for name in trusted.notes())
    right = traced.TracedExecutor.backward

    def wrong(self: traced.TracedExecutor, mode: Any, way: Any, weights: Any, *args: Any) -> Any:
        if weights.p and where == "parameters":
            for each in args[2][0]._views.values():
                each.add_(1e-2)
        found = right(self, mode, way, weights, *args)
        if weights.p and where == "input":
            found.dots = [None if each is None else each * 1.01 for each in found.dots]
        if weights.p and where == "gradient" and found.primal is not None:
            found.primal = found.primal * 1.01
        return found

    monkeypatch.setattr(traced.TracedExecutor, "backward", wrong)
    # What was found without numbers says nothing of the next.
    for seen in (False, True):
        monkeypatch.setattr(verify, "_verified", set())
        if seen:
            theta = problem.flat.clone()
            theta[0] = torch.nan
            broken = curvature_of(problem)
            broken.parameters = theta
            with pytest.raises(CurvatureError, match="NON_FINITE"):
                broken.product(kind, v)
        curvature = curvature_of(problem)
        off = distance(curvature.product(kind, v), expected)
        assert off < (1e-12 if dtype.itemsize == 8 else 1e-6)
        if where == "gradient" and kind == "ggn":
            continue  # has none
        notes = [note for name, note in curvature.notes().items() if name.startswith("fallback")]
        assert any("torch does not confirm its trace" in note for note in notes)


def test_a_closing_is_compared_where_labels_are_ignored_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    problem = llama_problem()
    problem.batch.targets[0] = -100
    v = probes(problem, 1)
    expected = curvature_of(problem).hvp(v)
    right = TracedHead.run

    def wrong(self: TracedHead, *args: Any, **kwargs: Any) -> Any:
        found = right(self, *args, **kwargs)
        found.dots = [None if each is None else -each for each in found.dots]
        return found

    monkeypatch.setattr(TracedHead, "run", wrong)
    monkeypatch.setattr(verify, "_verified", set())
    assert distance(curvature_of(problem).hvp(v), expected) < 1e-12


@pytest.mark.parametrize("layer", [nn.GLU(), Cast()])
@pytest.mark.parametrize("kind", KINDS)
def test_layers_that_torch_cannot_take_forward_twice_keep_their_trace(
    layer: nn.Module, kind: Any
) -> None:
    width = 2 if isinstance(layer, nn.GLU) else 4
    module = nn.Sequential(nn.Linear(3, 4), layer, nn.Linear(width, 3)).double()
    scatter(module)
    problem = module_problem(
        module,
        CrossEntropy(),
        torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
        torch.tensor([0, 1, 2, 1, 0]),
    )
    curvature = curvature_of(problem)
    curvature.product(kind, probes(problem, 1))
    assert not any(name.startswith("fallback") for name in curvature.notes())


class _CubeBack(torch.autograd.Function):
    """The derivative of a cube, 3 x² g, with a rule of its own for its tangent."""

    factor = 6.0

    @staticmethod
    def forward(x: Tensor, g: Tensor) -> Tensor:
        return 3 * x * x * g

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, g = ctx.saved_tensors
        return _CubeBack.factor * x * g * grads[0], 3 * x * x * grads[0]

    @staticmethod
    def jvp(ctx: Any, *dots: Tensor) -> Tensor:
        x, g = ctx.saved_tensors
        return _CubeBack.factor * x * g * dots[0] + 3 * x * x * dots[1]


class _Cube(torch.autograd.Function):
    """A cube, with derivatives by hand."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * x * x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        found: Any = _CubeBack.apply(ctx.saved_tensors[0], grads[0])
        return found

    @staticmethod
    def jvp(ctx: Any, *dots: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return 3 * x * x * dots[0]


class Cube(nn.Module):
    """A layer with derivatives of its own."""

    def forward(self, x: Tensor) -> Any:
        return _Cube.apply(x)


class PlainCube(nn.Module):
    """The same with torch's derivatives."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x * x


def with_a_cube(layer: nn.Module, *, last: bool = False) -> Problem:
    torch.manual_seed(0)
    layers = [nn.Linear(3, 3), layer] if last else [nn.Linear(3, 4), layer, nn.Linear(4, 3)]
    return module_problem(
        nn.Sequential(*layers).double(),
        CrossEntropy(),
        torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
        torch.tensor([0, 1, 2, 1, 0]),
    )


@pytest.mark.parametrize("factor", [6.0, 7.0])
def test_an_operation_whose_second_rule_contradicts_its_first_is_not_believed(
    monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    """Torch's own second derivative is then wrong too: only differences of first ones tell."""
    monkeypatch.setattr(_CubeBack, "factor", factor)
    monkeypatch.setattr(verify, "_verified", set())
    if factor == 6.0:
        for last in (False, True):
            pair = [with_a_cube(layer, last=last) for layer in (Cube(), PlainCube())]
            found, expected = (curvature_of(each).hvp(probes(each, 1)) for each in pair)
            assert distance(found, expected) < 1e-12
        return
    for last in (False, True):
        problem = with_a_cube(Cube(), last=last)
        with pytest.raises(CurvatureError, match="contradicts the first") as caught:
            curvature_of(problem).hvp(probes(problem, 1))
        assert (caught.value.reason, caught.value.metadata["block"]) == ("MODEL_UNSUPPORTED", "1")


class Traced(nn.Module):
    """The same without the question."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.tanh(x)


# Compiling ---------------------------------------------------------------------------------------


def affine(p: Env, inputs: Env, constants: Env) -> Env:
    return {"y": torch.tanh(inputs["x"]) @ p["0"].t()}


def parts_of(
    f: Callable[[Env, Env, Env], Env], rows: int = 5, dtype: torch.dtype = torch.float32
) -> tuple[Trace, list[Subprogram], Env]:
    generator = torch.Generator().manual_seed(0)
    p, x = (torch.randn(m, 4, generator=generator).to(dtype) for m in (3, rows))
    trace = trace_block(f, {"0": p}, {"x": x}, {})
    parts = partition(trace, [group([Phase(0, False), Phase(0, True)], ["y", "y_dot"])])
    return trace, parts, {"p/0": p, "p_dot/0": p.cos(), "x": x, "x_dot": x.sin()}


@pytest.mark.parametrize(
    "kernels",
    [
        lambda part: lambda *args: [each * 1.01 for each in part.module(*args)],
        lambda part: lambda *args: [each[:1] for each in part.module(*args)],
        lambda part: lambda *args: [each * torch.nan for each in part.module(*args)],
    ],
    ids=["wrong values", "wrong shapes", "no numbers"],
)
def test_a_compiled_part_that_is_wrong_is_never_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kernels: Any
) -> None:
    monkeypatch.setattr(inductor, "compiled", kernels)
    _, (part,), env = parts_of(affine)
    expected = part(env)
    ours = Compiler()
    ours(part)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert all(torch.equal(part(env)[name], each) for name, each in expected.items())
    assert (ours.compiled, len(ours.refused)) == (0, 1)
    assert sum("slower and as correct" in record.message for record in caplog.records) == 1


def one_row_wrong(part: Subprogram) -> Any:
    """Kernels that leave the last row of each result unwritten."""

    def run(*arguments: Tensor) -> list[Tensor]:
        found = [each.clone() for each in part.module(*arguments)]
        for each in found:
            each[-1] = 0
        return found

    return run


def masked(p: Env, inputs: Env, constants: Env) -> Env:
    y = inputs["x"] @ p["0"].t()
    return {"y": torch.where(y > 1, -torch.inf, y)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("f", [affine, masked], ids=["finite", "masked scores"])
def test_one_wrong_row_of_thousands_is_enough(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, f: Callable[[Env, Env, Env], Env]
) -> None:
    _, (part,), env = parts_of(f, rows=2048, dtype=dtype)
    env["x"][7] *= 1e3  # as the first token of a language model often is
    for kernels, is_right in ((lambda part: part.module, True), (one_row_wrong, False)):
        monkeypatch.setattr(inductor, "compiled", kernels)
        ours = Compiler()
        ours(part)
        part(env)
        assert (ours.compiled, len(ours.refused)) == ((1, 0) if is_right else (0, 1))


def test_a_compiler_that_fails_leaves_the_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(part: Subprogram) -> Any:
        raise FileNotFoundError("no C++ compiler")

    with monkeypatch.context() as broken:
        broken.setattr(inductor, "compiled", fail)
        assert "no C++ compiler" in refusal()
    # Another release of torch, whose compiler's inside lies elsewhere.
    monkeypatch.setitem(sys.modules, "hvp_core.autodiff.inductor", None)
    assert "import of hvp_core.autodiff.inductor halted" in refusal()


def test_a_compiler_out_of_memory_is_no_reason_to_run_the_lines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    for kernels in (full, lambda part: full):
        monkeypatch.setattr(inductor, "compiled", kernels)
        _, (part,), env = parts_of(affine)
        ours = Compiler()
        ours(part)
        for _ in range(2):  # and it is not forgotten by the second call
            with pytest.raises(torch.OutOfMemoryError):
                part(env)
        assert not ours.refused


def refusal() -> str:
    """Why a part is not compiled; its lines run."""
    _, (part,), env = parts_of(affine)
    expected = part(env)
    ours = Compiler()
    ours(part)
    assert all(torch.equal(part(env)[name], each) for name, each in expected.items())
    return ours.refused[0]


@pytest.mark.slow
def test_a_compiled_product_is_the_product() -> None:
    from tests.core.test_schedules import wide_llama

    problem = wide_llama(8)
    v = probes(problem, 1)
    expected = curvature_of(problem, 1).hvp(v)
    curvature = curvature_of(problem, 1, schedule="fast", compile=True)
    for _ in range(2):
        assert distance(curvature.hvp(v), expected) < 1e-5
    notes = curvature.notes()
    assert int(notes["compiled_parts"]) > 3
    assert "not_compiled" not in notes


# What is kept ------------------------------------------------------------------------------------


def gated(p: Env, inputs: Env, constants: Env) -> Env:
    x = inputs["x"]
    return {"y": (torch.sigmoid(x @ p["0"].t()) * (x @ p["1"].t())) @ p["2"].t()}


def test_between_forward_and_backward_only_what_is_dear_is_kept() -> None:
    p = {"0": torch.randn(6, 4), "1": torch.randn(6, 4), "2": torch.randn(4, 6)}
    trace = trace_block(gated, p, {"x": torch.randn(5, 4)}, {})
    forward, _ = partition(
        trace,
        [
            group([Phase(0, False), Phase(0, True)], ["y", "y_dot"]),
            group([Phase(1, False), Phase(1, True)], ["x_bar", "x_bar_dot", *trace.terms]),
        ],
    )
    kept = {name: size for name, size in forward.bytes_of.items() if name.startswith("r/")}
    # Two projections and their tangents: everything else follows from them by pointwise work.
    assert sorted(kept.values()) == [5 * 6 * 4] * 4


# Masks -------------------------------------------------------------------------------------------


def causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return j <= i


def windowed(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return (j <= i) & (j > i - 3)


def chunked(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return (j <= i) & (j // 4 == i // 4)


def everything(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return (i >= 0) & (j >= 0)


def mask_of(rule: Any, valid: Sequence[Sequence[int]] | None = None) -> Mask:
    keys = None if valid is None else torch.tensor(valid)
    return make_mask(2, 7, 7, mask_function=rule, attention_mask=keys)


def test_regular_masks_are_recognised_and_irregular_ones_are_not() -> None:
    assert mask_of(causal).shape == (True, None, None)
    assert mask_of(windowed).shape == (True, 3, None)
    assert mask_of(everything).shape == (False, None, None)
    assert mask_of(chunked).shape is None
    padded = mask_of(causal, [[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]]).shape
    assert padded is not None
    assert isinstance(padded.span, Span)
    assert (padded.span.start.tolist(), padded.span.stop.tolist()) == ([2, 0], [7, 4])
    assert mask_of(causal, [[1, 0, 1, 1, 1, 1, 1], [1] * 7]).shape is None
    nothing = mask_of(causal, [[0] * 7, [1] * 7]).shape
    assert nothing is not None
    assert nothing.span is not None
    assert nothing.span.start[0] == nothing.span.stop[0]
