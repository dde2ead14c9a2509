"""Traces: what is one line, and what is kept between parts."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from hvp_core.autodiff.recorder import Env, Program, record
from hvp_core.autodiff.rewrites import merge_sums, sum_of_products
from hvp_core.autodiff.trace import frozen, trace_graph
from torch import Tensor
from torch.func import functionalize, jvp, vjp
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

aten = torch.ops.aten


def matrices(seed: int, *names: str) -> Env:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(4, 4, generator=generator, dtype=torch.float64) for name in names}


def lines(graph: Graph, target: object) -> list[Node]:
    return [node for node in graph.nodes if node.target is target]


def value(graph: Graph, arguments: Env) -> Tensor:
    found: Tensor = GraphModule({}, graph)(*arguments.values())[0]
    return found


def test_a_sum_of_products_is_one_line_whatever_else_is_added() -> None:
    env = matrices(0, "a", "b", "c", "x")

    def program(env: Env) -> Env:
        a, b, c, x = env.values()
        products = (a @ b).view(2, 2, 4) + ((b @ c).view(2, 2, 4) + x.view(2, 2, 4))
        return {"y": products + (c @ a).view(2, 2, 4)}

    graph, _ = trace_graph(program, env)
    expected = value(graph, env)
    merge_sums(graph, set(), lambda a, b: True)
    assert len(lines(graph, sum_of_products)) == 1
    assert not lines(graph, aten.mm.default)
    assert len(lines(graph, aten.add.Tensor)) == 1
    assert float((value(graph, env) - expected).norm() / expected.norm()) < 1e-15


def test_a_product_that_somebody_else_reads_or_that_is_known_earlier_stays_a_line() -> None:
    env = matrices(1, "a", "b", "c")

    def program(env: Env) -> Env:
        a, b, c = env.values()
        early = a @ b
        return {"y": early + b @ c + c @ a, "z": early}

    graph, _ = trace_graph(program, env)
    merge_sums(graph, set(), lambda a, b: True)
    assert len(lines(graph, aten.mm.default)) == 1
    assert len(lines(graph, sum_of_products)) == 1
    graph, _ = trace_graph(program, env)
    merge_sums(graph, set(), lambda a, b: False)
    assert len(lines(graph, aten.mm.default)) == 3
    graph, _ = trace_graph(program, env)
    merge_sums(graph, set(lines(graph, aten.add.Tensor)), lambda a, b: True)
    assert len(lines(graph, aten.mm.default)) == 3


def in_words(graph: Graph) -> list[Any]:
    """A graph with its lines numbered, each with its shape, strides and dtype."""
    numbers = {node: number for number, node in enumerate(graph.nodes)}
    found = []
    for node in graph.nodes:
        arguments = frozen((node.args, node.kwargs), lambda leaf: numbers.get(leaf, leaf))
        values = [each for each in [node.meta.get("val")] if isinstance(each, Tensor)]
        of_values = [(each.shape, each.stride(), each.dtype) for each in values]
        operation = node.target if node.op == "call_function" else None
        found.append((node.op, operation, arguments, of_values))
    return found


def by_torch(program: Program, arguments: Env) -> Graph:
    def positional(*values: Tensor) -> tuple[Tensor, ...]:
        return tuple(program(dict(zip(arguments, values, strict=True))).values())

    module = make_fx(functionalize(positional, remove="mutations"), tracing_mode="fake")
    graph: Graph = module(*arguments.values()).graph
    return graph


def layer(x: Tensor, w: Tensor) -> Tensor:
    """Products, views, a softmax, a norm, an indexed assignment and writing in place."""
    with torch.autocast("cpu", enabled=False):
        y = torch.nn.functional.linear(x, w.T.reshape(4, 4))
    y = torch.nn.functional.layer_norm(y, (4,)) + torch.arange(4, device=y.device)
    first, second = y.softmax(-1).split(2, -1)
    y = torch.cat([second.exp(), first.to(torch.float32).to(y.dtype)], -1)
    y[:, 0] = y[:, 1] * 2
    return y.add_(x).where(x > 0, -x)


def dual_of_layer(env: Env) -> Env:
    x, w, along = env["x"], env["w"], env["along"]

    def there_and_back(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        y, pullback = vjp(layer, x, w)[:2]
        return y, *pullback(torch.ones_like(y))

    primal, tangent = jvp(there_and_back, (x, w), (along, w))[:2]
    return dict(zip("abcdef", (*primal, *tangent), strict=True))


@pytest.mark.parametrize(
    "program", [lambda env: {"y": layer(env["x"], env["w"])}, dual_of_layer], ids=["value", "dual"]
)
def test_a_program_has_the_lines_that_torchs_own_tracer_gives_it(program: Program) -> None:
    env = matrices(2, "x", "w", "along")
    found, names = record(program, env)
    assert names == list(program(env))
    assert in_words(cleaned(found)) == in_words(cleaned(by_torch(program, env)))
    for one, other in zip(value_of_all(found, env), program(env).values(), strict=True):
        assert torch.equal(one, other)


def test_what_a_composite_operation_does_in_place_makes_a_new_value() -> None:
    env = matrices(4, "x", "w")

    def program(env: Env) -> Env:
        return {"y": torch.rms_norm(env["x"], (4,), env["w"][0], 1e-5)}

    graph, _ = record(program, env)
    assert not [node for node in graph.nodes if node.op == "call_function" and writes(node)]
    assert torch.equal(value(graph, env), program(env)["y"])


def writes(node: Node) -> bool:
    return node.target is not operator.getitem and bool(node.target._schema.is_mutable)  # type: ignore[union-attr]


def test_two_draws_are_two_lines() -> None:
    env = matrices(5, "x")

    def program(env: Env) -> Env:
        x = env["x"]
        return {"y": torch.rand_like(x) - torch.rand_like(x), "z": x.exp() - x.exp()}

    graph, _ = trace_graph(program, env)
    assert len(lines(graph, aten.rand_like.default)) == 2
    assert len(lines(graph, aten.exp.default)) == 1


def cleaned(graph: Graph) -> Graph:
    """Without what torch's tracer has beside: what nobody reads."""
    graph.eliminate_dead_code()
    for node in list(graph.nodes):
        if node.target in (aten.detach.default, aten.lift_fresh_copy.default):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    return graph


def value_of_all(graph: Graph, arguments: Env) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = GraphModule({}, graph)(*arguments.values())
    return found


def test_what_a_program_takes_from_nowhere_or_makes_of_values_has_no_trace() -> None:
    env = matrices(3, "x")

    def with_its_own(env: Env) -> Env:
        return {"y": env["x"] * torch.tensor(2.0)}

    def unread(env: Env) -> Env:
        return {"y": env["x"] * float(torch.tensor(2.0))}

    def by_value(env: Env) -> Env:
        return {"y": env["x"] * 2 if env["x"].sum() > 0 else env["x"]}

    def of_some(env: Env) -> Env:
        return {"y": env["x"][env["x"] > 0]}

    with pytest.raises(RuntimeError, match="not among its arguments"):
        trace_graph(with_its_own, env)
    graph, _ = trace_graph(unread, env)
    assert torch.equal(value(graph, env), 2 * env["x"])
    for program in (by_value, of_some):
        with pytest.raises(Exception, match=r"_local_scalar_dense|nonzero"):
            trace_graph(program, env)
