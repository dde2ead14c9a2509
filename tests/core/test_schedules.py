"""Schedules, probes and budgets: the same numbers, the work that is promised, the memory too."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hvp_core.autodiff import verify
from hvp_core.autodiff.executor import Bytes
from hvp_core.autodiff.product_spec import HESSIAN
from hvp_core.autodiff.sums import GradientTerm, Sums
from hvp_core.autodiff.traced import TracedHead
from hvp_core.autodiff.verdicts import Verdicts
from hvp_core.blame import working_on
from hvp_core.curvature.curvature import Curvature
from hvp_core.curvature.retention import BlockRetention, choose, pinned
from hvp_core.errors import CurvatureError
from hvp_core.model.data import token_batch
from hvp_core.model.huggingface import attention
from hvp_core.model.huggingface.layered import LayeredChain
from hvp_core.precision import reproducible
from hvp_core.settings import ComputeSettings, Schedule
from hvp_core.sharding.collective import Alone
from hvp_core.sharding.layout import Layout
from hvp_core.vectors.space import ParameterSpace
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from tests.core.problems import CPU, Problem, gpt2_problem, llama_problem

SCHEDULES: tuple[Schedule, ...] = ("lean", "fast", "cached", "auto")
KINDS: tuple[str, ...] = ("hessian", "ggn")


def curvature_of(problem: Problem, micro_batch_size: int = 2, **settings: Any) -> Curvature:
    layout = Layout(problem.chain.shapes, [b.parameters for b in problem.chain.blocks], 1)
    space = ParameterSpace(layout, Alone(), problem.flat.dtype, CPU)
    theta = space.from_flat(problem.flat)
    return Curvature(
        problem.chain, space, theta, problem.batch, micro_batch_size, ComputeSettings(**settings)
    )


def probes(problem: Problem, count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    shape = count, problem.flat.numel()
    return list(torch.randn(shape, generator=generator, dtype=problem.flat.dtype))


def distance(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    pairs = zip(found, expected, strict=True)
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


@pytest.mark.parametrize("make", [llama_problem, gpt2_problem])
@pytest.mark.parametrize("kind", KINDS)
def test_every_schedule_gives_the_same_products_alone_together_and_again(
    make: Any, kind: str
) -> None:
    problem = make()
    vectors = probes(problem, 3)
    expected = curvature_of(problem, 5, schedule="lean").product(kind, vectors)
    for schedule in SCHEDULES:
        curvature = curvature_of(problem, 2, schedule=schedule)
        for _ in range(2):
            alone = [curvature.product(kind, [each])[0] for each in vectors]
            assert distance(alone, expected) < 1e-13
        assert distance(curvature.product(kind, vectors), expected) < 1e-13


@pytest.mark.parametrize(
    "make", [llama_problem, pytest.param(gpt2_problem, marks=pytest.mark.slow)]
)
def test_a_deterministic_products_bits_do_not_depend_on_what_is_kept_or_was_made_before(
    make: Any,
) -> None:
    problem = make(torch.float32)
    vectors = probes(problem, 3)
    roomy = curvature_of(problem, 5, deterministic=True, budget_bytes=1 << 30)
    first = {kind: roomy.product(kind, vectors[:1])[0] for kind in KINDS}
    for kind in ("ggn", "ggn", "hessian"):  # from what was kept, and where another dropped that
        assert torch.equal(roomy.product(kind, vectors[:1])[0], first[kind])
    needed = sum(each.shared for each in _kept(roomy))
    tight = curvature_of(problem, 5, deterministic=True, budget_bytes=needed)
    for kind in KINDS:
        assert torch.equal(tight.product(kind, vectors[:1])[0], first[kind])
    nothing = curvature_of(problem, 5, deterministic=True, schedule="fast")
    assert torch.equal(nothing.hvp(vectors[:1])[0], first["hessian"])
    own, others = (each._executors.choose(HESSIAN, 1) for each in (nothing, roomy))
    assert {each.way for each in (*own, *others)} == {"shared"}
    assert not any(each.cached for each in own)
    assert all(each.cached for each in others)
    lean = curvature_of(problem, 5, schedule="lean").hvp(vectors[:1])[0]
    assert not torch.equal(lean, first["hessian"])  # without the flag this is what memory does
    assert distance([first["hessian"]], [lean]) < 1e-5
    with pytest.raises(CurvatureError, match="DETERMINISTIC_MEMORY") as caught:
        curvature_of(problem, 5, deterministic=True, budget_bytes=needed - 1).hvp(vectors[:1])
    assert caught.value.metadata["needed_bytes"] == str(needed)
    tight.allow(1 << 30)
    assert torch.equal(tight.hvp(vectors)[1], roomy.hvp(vectors)[1])


def _kept(curvature: Curvature) -> list[Bytes]:
    executors = curvature._executors.executor_of
    own = {index for index, _ in executors if index < len(curvature.chain.blocks) - 1}
    return [executors[index, 0].kept_bytes(HESSIAN.passes, 1) for index in sorted(own)]


def test_a_deterministic_product_is_the_product_and_a_constant_says_when_it_is_lean() -> None:
    problem = llama_problem()
    vectors = probes(problem, 2)
    expected = curvature_of(problem, 5, schedule="lean").hvp(vectors)
    curvature = curvature_of(problem, 5, deterministic=True)
    assert distance(curvature.hvp(vectors), expected) < 1e-13
    assert distance(curvature.ggn(vectors), curvature_of(problem).ggn(vectors)) < 1e-13
    assert curvature.notes()["schedule_hessian_of_2"] == "3 shared"
    blocks = [Bytes(lean=1, fast=5, shared=6, cached=9)] * 2
    for budget in (12, 18, 10**9):
        ways = [each.way for each in pinned("auto", blocks, budget, 12)]
        assert ways == ["shared", "shared"]
    for budget in (0, 12, 10**9):
        assert pinned("auto", blocks, budget, 11) == [BlockRetention("lean", False)] * 2
        assert pinned("lean", blocks, budget, 12) == [BlockRetention("lean", False)] * 2
    assert [each.cached for each in pinned("auto", blocks, 15, 12)] == [True, False]
    assert [each.cached for each in pinned("fast", blocks, 10**9, 12)] == [False, False]


def test_a_trace_that_torch_contradicts_is_no_slower_way_of_a_deterministic_operator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The gradient would have gone by the trace before, and another way ever after.
    run = TracedHead.run

    def wrong(self: TracedHead, *args: Any, **kwargs: Any) -> Any:
        found = run(self, *args, **kwargs)
        found.dots = [None if each is None else 1.01 * each for each in found.dots]
        return found

    curvature = curvature_of(llama_problem(torch.float32), 5, deterministic=True)
    monkeypatch.setattr(verify, "_verified", Verdicts())
    monkeypatch.setattr(TracedHead, "run", wrong)
    with pytest.raises(CurvatureError, match=r"DETERMINISM_UNSUPPORTED: .* block head"):
        curvature.hvp([curvature.space.random(1, "gaussian")])


def test_torchs_refusal_to_repeat_itself_has_a_reason_of_its_own() -> None:
    with (
        pytest.raises(CurvatureError, match="DETERMINISM_UNSUPPORTED") as caught,
        reproducible(),
        working_on("a block", "its value"),
    ):
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))
    assert caught.value.metadata["block"] == "a block"
    assert not torch.are_deterministic_algorithms_enabled()
    with reproducible(False):
        assert not torch.are_deterministic_algorithms_enabled()


def test_products_of_two_kinds_may_alternate() -> None:
    problem = llama_problem()
    v = probes(problem, 1)
    curvature = curvature_of(problem, schedule="cached")
    fresh = {kind: curvature_of(problem, schedule="fast").product(kind, v) for kind in KINDS}
    for kind in (*KINDS, *KINDS):
        assert distance(curvature.product(kind, v), fresh[kind]) < 1e-13


def test_a_gradient_between_two_products_changes_neither() -> None:
    problem = llama_problem()
    v = probes(problem, 1)
    curvature = curvature_of(problem, schedule="cached")
    first, gradient = curvature.hvp(v), curvature.gradient()
    assert distance(curvature.hvp(v), first) == 0
    assert distance([gradient], [curvature_of(problem, schedule="lean").gradient()]) < 1e-13


def test_what_is_kept_for_later_products_goes_when_the_parameters_move() -> None:
    problem = llama_problem()
    (v,) = probes(problem, 1)
    curvature = curvature_of(problem, schedule="cached")
    before = curvature.hvp([v])[0]
    curvature.parameters = problem.flat + 0.1
    after = curvature.hvp([v])[0]
    curvature.parameters = problem.flat
    assert distance([curvature.hvp([v])[0]], [before]) == 0
    moved = curvature_of(problem, schedule="fast")
    moved.parameters = problem.flat + 0.1
    assert distance([after], moved.hvp([v])) < 1e-13


def test_the_curvature_matrices_are_symmetric_and_gauss_newton_has_no_negative_direction() -> None:
    problem = llama_problem()
    u, v = probes(problem, 2)
    curvature = curvature_of(problem)
    for kind in KINDS:
        au, av = curvature.product(kind, [u, v])
        assert float(u @ av) == pytest.approx(float(v @ au), rel=1e-12)
    assert float(u @ au) > 0
    assert float(v @ av) > 0


@pytest.mark.parametrize("make", [llama_problem, gpt2_problem])
@pytest.mark.parametrize("kind", KINDS)
def test_a_product_is_of_its_vectors_type_and_only_stored_in_it(make: Any, kind: str) -> None:
    problem = make()
    (v,) = probes(problem, 1)
    v = v.bfloat16()
    for micro_batch_size in (1, 5):
        curvature = curvature_of(problem, micro_batch_size)
        (expected,) = curvature.product(kind, [v.double()])
        found, exact = curvature.product(kind, [v, v.double()])
        assert (found.dtype, exact.dtype) == (torch.bfloat16, torch.float64)
        assert distance([exact], [expected]) < 1e-13
        # A rounding or two; sums over micro-batches, tokens and tied places in 16 bits are worse.
        assert distance([found.double()], [expected]) < 1.5 * distance(
            [expected.bfloat16().double()], [expected]
        )


def test_numbers_of_16_bits_are_summed_in_32() -> None:
    view, term = torch.empty(3, dtype=torch.bfloat16), GradientTerm("rows", ("ids", "rows"))
    sums = Sums({"a": view.view(3, 1)}, {"a"})
    ids, rows = torch.zeros(1000, dtype=torch.long), torch.ones(1000, 1)
    sums.add("a", [term], {"ids": ids, "rows": rows})
    for _ in range(24):
        sums.add_dense({"a": torch.ones(3, 1)})
    sums.settle()
    assert view.tolist() == [1024, 24, 24]  # one by one, 256 + 1 = 256


def test_vectors_may_be_made_where_they_are_multiplied() -> None:
    problem = llama_problem()
    curvature = curvature_of(problem)
    places, vectors = curvature.probes(2), probes(problem, 2)
    for place, vector in zip(places, vectors, strict=True):
        place.copy_(vector)
    assert distance(curvature.hvp(curvature.probes(2)), curvature.hvp(vectors)) == 0


# The work ----------------------------------------------------------------------------------------


def wide_llama(length: int, vocabulary: int = 64, layers: int = 2) -> Problem:
    """Layers whose matrix products outweigh their attention, of parameters that fit 16 bits."""
    attention.register()
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocabulary,
        tie_word_embeddings=False,
        attn_implementation=attention.NAME,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).bfloat16().float().eval()
    ids = torch.randint(vocabulary, (1, length), generator=torch.Generator().manual_seed(1))
    parameters = {name: each.detach() for name, each in model.named_parameters()}
    return Problem(LayeredChain(model, torch.float32, CPU), parameters, token_batch(ids))


def test_several_probes_do_not_meet_what_was_kept_for_one() -> None:
    problem = llama_problem()
    vectors = probes(problem, 4)
    curvature = curvature_of(problem)
    expected = curvature.hvp(vectors)
    table = curvature._executors
    for exponent in range(30, 100):  # until some block is cached for one probe, lean for four
        table.budget_bytes = int(1.15**exponent)
        table._choices.clear()
        pairs = list(zip(*(table.choose(HESSIAN, n) for n in (1, 4)), strict=True))
        if any(one.cached and several.way == "lean" for one, several in pairs):
            break
    else:
        pytest.fail("no budget mixes the two")
    for _ in range(2):
        assert distance(curvature.hvp(vectors[:1]), expected[:1]) < 1e-12
        for _ in range(2):
            assert distance(curvature.hvp(vectors), expected) < 1e-12


def gemm_flops(run: Any) -> int:
    """FLOP of matrix products with parameters: attention's are batched and not counted."""
    with FlopCounterMode(display=False) as counter:
        run()
    counts = counter.get_flop_counts()["Global"]
    return sum(n for op, n in counts.items() if "bmm" not in str(op))


@pytest.mark.parametrize(
    ("schedule", "kind", "count", "units"),
    [
        ("fast", "hessian", 1, 8),
        ("cached", "hessian", 1, 6),
        ("lean", "hessian", 1, 11),
        ("fast", "hessian", 4, 2 + 6 * 4),
        ("fast", "ggn", 1, 5),
        ("cached", "ggn", 1, 4),
    ],
)
def test_a_product_takes_the_matrix_products_it_promises(
    schedule: Schedule, kind: str, count: int, units: int
) -> None:
    problem = wide_llama(16)
    curvature = curvature_of(problem, 1, schedule=schedule)
    vectors = probes(problem, count)
    plain = curvature_of(problem, 1, schedule="fast")
    plain.gradient()  # finds the routes, which takes work of its own
    gradient = gemm_flops(plain.gradient)
    curvature.product(kind, vectors)
    found = gemm_flops(lambda: curvature.product(kind, vectors)) / gradient * 3
    # The head's logits are not kept between products; a lean walk skips what it need not redo.
    least = {"lean": units - 1.5}.get(schedule, units - 0.01)
    assert least <= found <= units + (0.6 if schedule == "cached" else 0.01)


# The memory --------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().nbytes() > 0:
                size = leaf.untyped_storage().nbytes() // leaf.element_size()
                self.numel = max(self.numel, size)
                self.shapes.add(tuple(leaf.shape))
        return result


@pytest.mark.parametrize("schedule", ["lean", "fast", "cached"])
def test_no_tensor_of_tokens_by_tokens_or_tokens_by_vocabulary_is_made(schedule: Schedule) -> None:
    tokens, vocabulary = 1024, 768
    problem = wide_llama(tokens, vocabulary)
    problem.chain.positions_at_once = 128
    curvature = curvature_of(problem, 1, schedule=schedule)
    vectors = probes(problem, 2)
    parameters = problem.flat.numel()
    with Largest() as largest:
        curvature.loss()
        curvature.gradient()
        for kind in KINDS:
            curvature.product(kind, vectors[:1])
            curvature.product(kind, vectors)
    forbidden = {(tokens, tokens), (tokens, vocabulary)}
    assert not {shape for shape in largest.shapes if shape[-2:] in forbidden}
    sizes = {torch.Size(shape).numel() for shape in largest.shapes}
    # Vectors of parameters are the only tensors that large; probes are drawn two in one.
    assert not [
        n for n in sizes if n >= tokens * vocabulary and n not in (parameters, 2 * parameters)
    ]


BLOCKS = [Bytes(lean=1, fast=10, shared=12, cached=8)] * 3


@pytest.mark.parametrize(
    ("budget", "ways"),
    [
        (0, ["lean", "lean", "lean"]),
        (3, ["lean", "lean", "lean"]),
        (12, ["lean", "lean", "fast"]),
        (30, ["fast", "fast", "fast"]),
        (32, ["cached", "fast", "fast"]),
        (36, ["cached", "cached", "cached"]),
    ],
)
def test_a_budget_buys_speed_block_by_block(budget: int, ways: list[str]) -> None:
    found = choose("auto", BLOCKS, budget, 1)
    assert ["cached" if each.cached else each.way for each in found] == ways


def test_a_schedule_that_is_asked_for_is_taken() -> None:
    assert choose("lean", BLOCKS, 10**9, 1) == [BlockRetention("lean", False)] * 3
    assert choose("fast", BLOCKS, 0, 1) == [BlockRetention("fast", False)] * 3
    assert choose("fast", BLOCKS, 0, 4) == [BlockRetention("shared", False)] * 3
    assert choose("cached", BLOCKS, 0, 1) == [BlockRetention("shared", True)] * 3


def test_a_loss_in_bfloat16_is_rounded_in_its_logits_and_no_more() -> None:
    problem = wide_llama(16)
    exact = curvature_of(problem, 1).loss()
    found = curvature_of(problem, 1, precision="bfloat16").loss()
    assert found == pytest.approx(exact, rel=2e-3)
    # Sums of numbers of eight bits would be multiples of 1/32, for numbers of this size.
    total = found * curvature_of(problem, 1).num_targets * 32
    assert abs(total - round(total)) > 1e-3


@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
def test_reduced_precision_is_for_float32(precision: Any) -> None:
    with pytest.raises(CurvatureError) as caught:
        curvature_of(llama_problem(), precision=precision)
    assert caught.value.reason == "PRECISION_UNSUPPORTED"


def test_a_bfloat16_product_is_as_good_as_torchs_bfloat16_gradient() -> None:
    """Of a deep model: what blocks hand on is in float32, as in torch's autocast."""
    problem = wide_llama(64, layers=8)
    exact = curvature_of(problem, 1)
    v = [each.sign() for each in probes(problem, 1)]
    truth, gauss_newton, slope = exact.hvp(v), exact.ggn(v), exact.gradient()
    gradient = distance([torchs_bfloat16_gradient(problem)], [slope])
    assert 1e-3 < gradient < 0.1
    for schedule in ("lean", "fast", "cached"):
        rounded = curvature_of(problem, 1, precision="bfloat16", schedule=schedule)
        assert distance(rounded.hvp(v), truth) < gradient
        assert distance(rounded.ggn(v), gauss_newton) < gradient
        assert distance([rounded.gradient()], [slope]) < gradient


def torchs_bfloat16_gradient(problem: Problem) -> Tensor:
    """Of the model as it is, in bfloat16 throughout but for the loss."""
    wide: Any = problem.chain._parts.model  # type: ignore[attr-defined]
    model: Any = LlamaForCausalLM(copy.deepcopy(wide.config)).bfloat16()
    model.load_state_dict(wide.state_dict())
    model.set_attn_implementation("sdpa")
    ids, targets = problem.batch.inputs["input_ids"], problem.batch.targets
    logits = model(input_ids=ids, use_cache=False).logits.float()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    gradients = torch.autograd.grad(
        loss, [model.get_parameter(name) for name in problem.parameters]
    )
    return torch.cat([each.flatten() for each in gradients]).float()
