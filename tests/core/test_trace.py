"""Traces: what is one line, and what is kept between parts."""

from __future__ import annotations

import torch
from hvp_core.autodiff.rewrites import merge_sums, sum_of_products
from hvp_core.autodiff.trace import Env, trace_graph
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

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
