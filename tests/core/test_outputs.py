"""Derivatives of the model's outputs, and what takes only a pass forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hvp_core.autodiff import looks, verify
from hvp_core.autodiff.traced import TracedExecutor, TracedHead
from hvp_core.curvature.curvature import Curvature
from hvp_core.losses.loss import CrossEntropy, SquaredError
from torch import Tensor, nn

from tests.core.problems import Problem, llama_problem, module_problem, ragged_tokens
from tests.core.references import relative_error, unflatten
from tests.core.test_gauss_newton import DECODERS, data, probes_of
from tests.core.test_schedules import (
    Largest,
    curvature_of,
    distance,
    gemm_flops,
    probes,
    wide_llama,
)

EXACT = 1e-9


def logits_of(name: str, problem: Problem) -> Callable[[Tensor], Tensor]:
    """(rows, positions, vocabulary) of the flat parameters, by the model written by hand."""
    _, reference, config = DECODERS[name]
    ids, _, mask = ragged_tokens()
    return lambda flat: reference(unflatten(flat, problem.parameters), ids, mask, config())


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("pieces", [None, 4])
def test_the_logits_have_torchs_own_jvp_and_vjp(name: str, pieces: int | None) -> None:
    problem = DECODERS[name][0](positions_at_once=pieces)
    logits, vectors = logits_of(name, problem), probes_of(problem, 3)
    jacobian = [torch.func.jvp(logits, (problem.flat,), (v,))[1] for v in vectors]
    generator = torch.Generator().manual_seed(9)
    u = torch.randn(2, *jacobian[0].shape, generator=generator, dtype=torch.float64)
    pulled = [torch.func.vjp(logits, problem.flat)[1](each)[0] for each in u]
    for micro_batch_size in (1, 2, 3, 5):
        curvature = problem.curvature(micro_batch_size)
        space = curvature.output_space
        assert space.shape == (5, 6, 24)
        together = [space.to_whole(each) for each in curvature.jvp(vectors)]
        assert distance(together, jacobian) < EXACT
        (alone,) = [space.to_whole(each) for each in curvature.jvp(vectors[:1])]
        assert relative_error(alone, jacobian[0]) < EXACT
        found = curvature.vjp([space.from_whole(each) for each in u])
        assert distance(found, pulled) < EXACT
        assert distance(curvature.vjp([space.from_whole(u[0])]), pulled[:1]) < EXACT


def test_jvp_and_vjp_are_adjoint_and_linear() -> None:
    problem = llama_problem()
    curvature = problem.curvature(2)
    space = curvature.output_space
    v, w = probes_of(problem, 2)
    u = space.random(7, "gaussian")
    jv, jw, both = curvature.jvp([v, w, 2 * v - 3 * w])
    (pulled,) = curvature.vjp([u])
    for direction, moved in ((v, jv), (w, jw)):
        left, right = space.dots(moved.unsqueeze(0), u), pulled @ direction
        assert float(left[0]) == pytest.approx(float(right), rel=1e-12)
    assert distance([both], [2 * jv - 3 * jw]) < 1e-13


@pytest.mark.parametrize("way", ["traced", "by torch"])
def test_the_gauss_newton_matrix_is_made_of_both(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    if way == "by torch":

        def refuse(*_: Any) -> Any:
            raise RuntimeError("nothing is traced")

        monkeypatch.setattr(looks, "trace_graph", refuse)
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    problem = module_problem(module, SquaredError(), data(6, 3), data(6, 2))
    curvature = problem.curvature(4, strict=way == "traced")
    vectors = probes_of(problem, 2)
    found = [each / 6 for each in curvature.vjp(curvature.jvp(vectors))]
    assert curvature.output_space.shape == (6, 2)
    assert distance(found, curvature.ggn(vectors)) < 1e-12
    assert distance(found[:1], [curvature.vjp(curvature.jvp(vectors[:1]))[0] / 6]) < 1e-13


def test_a_model_of_one_block_has_outputs_too() -> None:
    module = nn.Linear(3, 2, bias=False).double()
    x = data(5, 3)
    problem = module_problem(module, CrossEntropy(), x, torch.tensor([0, 1, -100, 1, 0]))
    curvature = problem.curvature(2)
    v, u = data(6, 1)[:, 0], data(5, 2)
    space = curvature.output_space
    assert relative_error(space.to_whole(curvature.jvp([v])[0]), x @ v.view(2, 3).T) < 1e-14
    pulled = curvature.vjp([space.from_whole(u)])[0]
    assert relative_error(pulled, (u.T @ x).reshape(-1)) < 1e-14


@pytest.mark.parametrize("name", DECODERS)
def test_slopes_are_the_gradients_inner_products(name: str) -> None:
    problem = DECODERS[name][0]()
    assert problem.loss is not None
    vectors = probes_of(problem, 3)
    expected = [float(torch.func.jvp(problem.loss, (problem.flat,), (v,))[1]) for v in vectors]
    for micro_batch_size in (1, 2, 5):
        curvature = problem.curvature(micro_batch_size)
        assert curvature.slopes(vectors) == pytest.approx(expected, rel=EXACT)
        assert curvature.slopes(vectors[:1]) == pytest.approx(expected[:1], rel=EXACT)
        gradient = curvature.gradient()
        inner = [float(gradient @ v) for v in vectors]
        assert curvature.slopes(vectors) == pytest.approx(inner, rel=1e-12)


@pytest.mark.parametrize("kind", ["ggn", "empirical_fisher_token", "empirical_fisher_sequence"])
def test_quadratic_forms_are_the_products_inner_products(kind: Any) -> None:
    problem = llama_problem(positions_at_once=4)
    vectors = probes_of(problem, 3)
    curvature = problem.curvature(2)
    products = curvature.product(kind, vectors)
    expected = [float(v @ av) for v, av in zip(vectors, products, strict=True)]
    assert curvature.quadratic(kind, vectors) == pytest.approx(expected, rel=1e-12)
    assert curvature.quadratic(kind, vectors[:1]) == pytest.approx(expected[:1], rel=1e-12)


def test_nothing_is_asked_of_no_vectors() -> None:
    curvature = llama_problem().curvature(2)
    assert curvature.slopes([]) == curvature.jvp([]) == curvature.vjp([]) == []
    assert curvature.empirical_fisher([], "token") == curvature.quadratic("ggn", []) == []


def test_a_pass_forward_leaves_what_is_kept_for_products() -> None:
    problem = llama_problem()
    (v,) = probes_of(problem, 1)
    curvature = curvature_of(problem, schedule="cached")
    first = curvature.hvp([v])
    slope, form = curvature.slopes([v]), curvature.quadratic("ggn", [v])
    pulled = curvature.vjp(curvature.jvp([v]))
    assert distance(curvature.hvp([v]), first) == 0
    fresh = curvature_of(problem, schedule="lean")
    assert fresh.slopes([v]) == pytest.approx(slope, rel=1e-13)
    assert fresh.quadratic("ggn", [v]) == pytest.approx(form, rel=1e-13)
    assert distance(fresh.vjp(fresh.jvp([v])), pulled) < 1e-13


def test_random_outputs_do_not_depend_on_the_micro_batches() -> None:
    problem = llama_problem()
    spaces = [problem.curvature(size).output_space for size in (1, 2, 5)]
    for law in ("gaussian", "rademacher", "sphere"):
        whole = [space.to_whole(space.random(3, law)) for space in spaces]
        assert torch.equal(whole[0], whole[1])
        assert relative_error(whole[2], whole[0]) < 1e-15
    assert float(whole[0].norm()) == pytest.approx(1)
    assert spaces[0].dimension == whole[0].numel() == 5 * 6 * 24


ASKED: dict[str, Callable[[Curvature, list[Tensor]], list[Tensor]]] = {
    "slopes": lambda c, v: [torch.tensor(c.slopes(v), dtype=torch.float64)],
    "form": lambda c, v: [torch.tensor(c.quadratic("ggn", v), dtype=torch.float64)],
    "jvp": lambda c, v: c.jvp(v),
    "vjp": lambda c, v: c.vjp([c.output_space.random(1, "gaussian")]),
    "fisher of tokens": lambda c, v: c.empirical_fisher(v, "token"),
    "fisher of sequences": lambda c, v: c.empirical_fisher(v, "sequence"),
}


@pytest.mark.parametrize("what", ASKED)
@pytest.mark.parametrize("where", ["head", "block"])
def test_a_trace_that_is_wrong_is_never_used(
    monkeypatch: pytest.MonkeyPatch, what: str, where: str
) -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    problem = module_problem(module, CrossEntropy(), data(5, 3), torch.tensor([0, 1, 2, 1, 0]))
    vectors = probes_of(problem, 2)
    expected = ASKED[what](problem.curvature(2), vectors)
    measure, run, forward, backward = (
        *(TracedHead.measure, TracedHead.run),
        *(TracedExecutor.forward, TracedExecutor.backward),
    )

    def wrong_measure(self: Any, *args: Any) -> Any:
        return [each * 1.01 for each in measure(self, *args)]

    def wrong_run(self: Any, *args: Any, **kwargs: Any) -> Any:
        for each in args[3][0]._views.values():
            each.add_(1e-2)
        return run(self, *args, **kwargs)

    def wrong_forward(self: Any, *args: Any) -> Any:
        y, y_dots, tape = forward(self, *args)
        return y, [None if each is None else each * 1.01 for each in y_dots], tape

    def wrong_backward(self: Any, *args: Any) -> Any:
        for each in args[5][0]._views.values():
            each.add_(1e-2)
        return backward(self, *args)

    if where == "head":
        monkeypatch.setattr(TracedHead, "measure", wrong_measure)
        monkeypatch.setattr(TracedHead, "run", wrong_run)
    else:
        monkeypatch.setattr(TracedExecutor, "forward", wrong_forward)
        monkeypatch.setattr(TracedExecutor, "backward", wrong_backward)
    monkeypatch.setattr(verify, "_verified", set())
    curvature = problem.curvature(2, strict=False)
    assert distance(ASKED[what](curvature, vectors), expected) < 1e-12
    notes = [note for name, note in curvature.notes().items() if name.startswith("fallback")]
    assert any("torch does not confirm its trace" in note for note in notes)


@pytest.mark.slow
@pytest.mark.parametrize("what", ASKED)
def test_compiled_parts_give_the_same(what: str) -> None:
    problem = llama_problem(torch.float32)
    vectors = [each.float() for each in probes_of(llama_problem(), 2)]
    expected = ASKED[what](curvature_of(problem), vectors)
    compiled = curvature_of(problem, compile=True)
    found = ASKED[what](compiled, vectors)
    assert distance(found, expected) < 1e-4
    assert "not_compiled" not in compiled.notes()


#: What, of how many vectors, units of the blocks, units of the head.
CALLS: dict[str, tuple[Callable[[Curvature, list[Tensor]], Any], int, int, int]] = {
    "slopes": (lambda c, v: c.slopes(v), 1, 3, 3),
    "slopes of 4": (lambda c, v: c.slopes(v), 4, 1 + 2 * 4, 1 + 2 * 4),
    "form of 4": (lambda c, v: c.quadratic("ggn", v), 4, 1 + 2 * 4, 1 + 2 * 4),
    "jvp": (lambda c, v: c.jvp(v), 1, 3, 2),  # the output's value is not asked for
    "vjp": (lambda c, v: c.vjp([c.output_space.zeros()]), 1, 3, 2),
    "vjp of 4": (lambda c, v: c.vjp([c.output_space.zeros() for _ in v]), 4, 1 + 2 * 4, 2 * 4),
    "fisher of tokens": (lambda c, v: c.empirical_fisher(v, "token"), 1, 5, 5),
    "fisher of sequences": (lambda c, v: c.empirical_fisher(v, "sequence"), 1, 5, 6),
}


@pytest.mark.parametrize("what", CALLS)
def test_each_takes_the_matrix_products_it_promises(what: str) -> None:
    call, count, units, of_head = CALLS[what]
    problem = wide_llama(16)
    sizes = {name: each.numel() for name, each in problem.parameters.items() if each.dim() == 2}
    share = sizes["lm_head.weight"] / (sum(sizes.values()) - sizes["model.embed_tokens.weight"])
    curvature = curvature_of(problem, 1, schedule="fast")
    vectors = probes(problem, count)
    curvature.gradient()  # finds the routes, which takes work of its own
    gradient = gemm_flops(curvature.gradient)
    call(curvature, vectors)
    found = gemm_flops(lambda: call(curvature, vectors)) / gradient * 3
    assert found == pytest.approx(units + (of_head - units) * share, rel=1e-3)


def test_no_tensor_of_tokens_by_vocabulary_is_made_for_numbers_and_fisher_products() -> None:
    tokens, vocabulary = 1024, 768
    problem = wide_llama(tokens, vocabulary)
    problem.chain.positions_at_once = 128
    curvature = curvature_of(problem, 1)
    vectors = probes(problem, 2)
    with Largest() as largest:
        for some in (vectors[:1], vectors):
            curvature.slopes(some)
            curvature.quadratic("ggn", some)
            curvature.empirical_fisher(some, "token")
            curvature.empirical_fisher(some, "sequence")
    assert not {shape for shape in largest.shapes if shape[-2:] == (tokens, vocabulary)}
    assert (128, vocabulary) in {shape[-2:] for shape in largest.shapes}
