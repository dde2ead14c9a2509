"""Jacobians of activations against torch's own, of the whole model with hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import pytest
import torch
from hvp_core.autodiff.reference import value_and_tangent
from hvp_core.curvature.curvature import Curvature
from hvp_core.curvature.sections import section_of
from hvp_core.errors import CurvatureError
from hvp_core.losses.loss import CrossEntropy
from hvp_core.model.huggingface.layered import LayeredChain
from hvp_core.model.places import Place
from hvp_core.precision import exact
from hvp_core.settings import ComputeSettings
from torch import Tensor, nn

from tests.core.problems import (
    Problem,
    gpt2_problem,
    llama_problem,
    module_problem,
    ragged_tokens,
)
from tests.core.references import relative_error, unflatten
from tests.core.test_gauss_newton import data

PROBLEMS = {"llama": llama_problem, "gpt2": gpt2_problem}
LAYERS = {"llama": "model.layers", "gpt2": "transformer.h"}
EXACT = 1e-10


def section(
    problem: Problem,
    output: Place | None,
    input: Place | None,  # noqa: A002
    micro_batch_size: int = 2,
    *,
    strict: bool = True,
    whole: Curvature | None = None,
) -> Curvature:
    whole = whole or problem.curvature(micro_batch_size)
    settings = ComputeSettings(strict=strict)
    chain, space, selected, recorded = section_of(whole, output, input)
    return Curvature(
        chain,
        space,
        whole.parameters,
        problem.batch,
        micro_batch_size,
        settings,
        selected,
        recorded=recorded,
    )


def of_torch(
    problem: Problem,
    output: Place | None,
    input: Place | None,  # noqa: A002
) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The activation as a function of the other, or of the flat parameters, and its point."""
    assert isinstance(problem.chain, LayeredChain)
    model = problem.chain._parts.model
    ids, _, mask = ragged_tokens()

    def run(
        parameters: Any, replace: Tensor | None, see: Place | None
    ) -> tuple[Tensor, Tensor | None]:
        seen: list[Tensor] = []
        handles = []
        if replace is not None:
            assert input is not None
            module = model.get_submodule(input.module)
            if input.side == "input":

                def before(module: Any, args: Any, kwargs: Any) -> Any:
                    return (replace, *args[1:]), kwargs

                handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            else:

                def after(module: Any, args: Any, out: Any) -> Any:
                    return (replace, *out[1:]) if isinstance(out, tuple) else replace

                handles.append(module.register_forward_hook(after))
        if see is not None:

            def look(module: Any, args: Any, out: Any) -> None:
                out = out[0] if isinstance(out, tuple) else out
                seen.append(args[0] if see.side == "input" else out)

            handles.append(model.get_submodule(see.module).register_forward_hook(look))
        # Angles are the model's own, in float32; what else there is stays in float64.
        rotary = getattr(getattr(model, "model", None), "rotary_emb", None)
        angles: Any = None if rotary is None else rotary.inv_freq
        if rotary is not None:
            rotary.inv_freq = angles.float()
        try:
            with exact():
                out = torch.func.functional_call(
                    model, parameters, (ids,), {"attention_mask": mask, "use_cache": False}
                )
        finally:
            for handle in handles:
                handle.remove()
            if rotary is not None:
                rotary.inv_freq = angles
        return out.logits, seen[0] if seen else None

    def found(parameters: Any, replace: Tensor | None) -> Tensor:
        logits, seen = run(parameters, replace, output)
        return logits if output is None else seen  # type: ignore[return-value]

    if input is None:
        return lambda flat: found(unflatten(flat, problem.parameters), None), problem.flat
    point = run(problem.parameters, None, input)[1]
    assert point is not None
    return lambda x: found(problem.parameters, x), point


def places(layers: str, mlp: str, projection: str, norm: str) -> dict[str, tuple[Any, Any]]:
    """Pairs of places by what they are."""

    def out(name: str) -> Place:
        return Place(name)

    return {
        "a layer by the parameters": (out(f"{layers}.0"), None),
        "the last layer by the parameters": (out(f"{layers}.1"), None),
        "the last layer by the first": (out(f"{layers}.1"), out(f"{layers}.0")),
        "the logits by a layer": (None, out(f"{layers}.0")),
        "a layer by its own input": (out(f"{layers}.1"), Place(f"{layers}.1", "input")),
        "a projection by its own input": (
            out(f"{layers}.1.{projection}"),
            Place(f"{layers}.1.{projection}", "input"),
        ),
        "an inner module by its own input": (
            out(f"{layers}.0.{mlp}"),
            Place(f"{layers}.0.{mlp}", "input"),
        ),
        "an inner module by the parameters": (out(f"{layers}.1.{mlp}"), None),
        "an inner module by a layer": (out(f"{layers}.1.{mlp}"), out(f"{layers}.0")),
        "a layer by an inner module": (out(f"{layers}.1"), out(f"{layers}.0.{mlp}")),
        "the logits by a projection": (None, out(f"{layers}.1.{projection}")),
        "within a block": (out(f"{layers}.0.{mlp}"), out(f"{layers}.0.{projection}")),
        "its own block": (out(f"{layers}.0"), out(f"{layers}.0.{projection}")),
        "the norm at the end by the parameters": (out(norm), None),
        "the norm at the end by its own input": (out(norm), Place(norm, "input")),
    }


CASES = {
    "llama": places("model.layers", "mlp", "mlp.gate_proj", "model.norm"),
    "gpt2": places("transformer.h", "mlp", "mlp.c_fc", "transformer.ln_f"),
}


#: Those of every run; a section that has not been met before is traced, which takes seconds.
ALWAYS = {
    ("llama", "the last layer by the first"),
    ("llama", "within a block"),
    ("gpt2", "a projection by its own input"),
}
PAIRS = [
    pytest.param(name, what, marks=[] if (name, what) in ALWAYS else [pytest.mark.slow])
    for name, cases in CASES.items()
    for what in cases
]


@pytest.mark.parametrize(("name", "what"), PAIRS)
def test_products_both_ways_are_torchs_own(name: str, what: str) -> None:
    output, by = CASES[name][what]
    problem = PROBLEMS[name]()
    f, point = of_torch(problem, output, by)
    generator = torch.Generator().manual_seed(4)
    v = torch.randn(2, *point.shape, generator=generator, dtype=torch.float64)
    y, expected = value_and_tangent(f, (point,), (v[0],))
    u = torch.randn(2, *y.shape, generator=generator, dtype=torch.float64)
    (pulled,) = torch.func.vjp(f, point)[1](u[0])
    curvature = section(problem, output, by)
    domain: Any = curvature.input_space
    codomain = curvature.output_space
    assert codomain.shape == tuple(y.shape)
    assert domain.dimension == point.numel()
    flat = [domain.from_flat(each.reshape(-1)) for each in v]
    whole = [codomain.from_whole(each) for each in u]
    found = curvature.jvp(flat)
    assert relative_error(codomain.to_whole(found[0]), expected) < EXACT
    back = curvature.vjp(whole)
    assert relative_error(domain.to_flat(back[0]), pulled.reshape(-1)) < EXACT
    assert codomain.dot(whole[1], found[1]) == pytest.approx(
        domain.dot(back[1], flat[1]), rel=1e-11
    )
    assert relative_error(curvature.jvp(flat[:1])[0], found[0]) < EXACT
    assert relative_error(curvature.vjp(whole[:1])[0], back[0]) < EXACT


def test_the_transpose_is_that_of_the_dense_jacobian() -> None:
    """Against jacrev, in which nothing of ours is."""
    problem = llama_problem()
    output, by = CASES["llama"]["the last layer by the first"]
    f, point = of_torch(problem, output, by)
    dense = torch.func.jacrev(f)(point).reshape(5 * 6 * 8, 5 * 6 * 8)
    curvature = section(problem, output, by)
    domain: Any = curvature.input_space
    few = range(0, 240, 37)
    found = torch.stack(
        [
            domain.to_flat(each)
            for each in curvature.vjp([curvature.output_space.coordinate(index) for index in few])
        ]
    )
    assert relative_error(found, dense[list(few)]) < EXACT


def test_a_section_of_a_sequential_begins_at_its_data() -> None:
    """A model whose input is no token ids has a derivative by that too, row by row."""
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    problem = module_problem(module, CrossEntropy(), data(5, 3), torch.tensor([0, 1, 1, 0, 1]))
    curvature = section(problem, Place("2"), Place("0", "input"))
    assert isinstance(module[0], nn.Linear)
    v = data(5, 3)
    (found,) = curvature.jvp([v.reshape(-1)])
    expected = torch.func.jvp(module, (problem.batch.inputs["x"],), (v,))[1].detach()
    assert relative_error(found.view(5, 2), expected) < 1e-14
    inner = section(problem, Place("1"), Place("0"))
    slope = 1 - torch.tanh(module[0](problem.batch.inputs["x"])).square()
    (found,) = inner.jvp([torch.ones(20, dtype=torch.float64)])
    assert relative_error(found.view(5, 4), slope.detach()) < 1e-14


@final
class Branched(nn.Module):
    """A module whose parts are called in every way that no Jacobian is taken of."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.never = nn.Linear(3, 3), nn.Linear(3, 3)
        self.flat, self.pair, self.last = Flat(), Pair(), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(x))
        return self.last(self.pair(x, x)[0] + self.flat(x).view_as(x))


@final
class Flat(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(-1)


@final
class Pair(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x, y


@pytest.mark.parametrize(
    ("output", "by", "reason", "words"),
    [
        (Place("twice"), None, "MODULE_UNSUPPORTED", "called more than once"),
        (Place("never"), None, "MODULE_UNSUPPORTED", "is not called"),
        (Place("flat"), None, "MODULE_UNSUPPORTED", "not a row for each"),
        (Place("pair"), None, "MODULE_UNSUPPORTED", "tuple of Tensor, Tensor"),
        (Place("lost"), None, "MODULE_NOT_FOUND", "nearest are last"),
        (Place("last"), Place("last"), "MODULES_OUT_OF_ORDER", "identity"),
    ],
)
def test_an_activation_that_is_no_vector_is_named(
    output: Place, by: Place | None, reason: str, words: str
) -> None:
    problem = module_problem(
        Branched().double(), CrossEntropy(), data(4, 3), torch.tensor([0, 1, 1, 0])
    )
    with pytest.raises(CurvatureError, match=words) as refusal:
        section(problem, output, by, 4)
    assert refusal.value.reason == reason
