"""A trace cut into subprograms, and what is kept between them."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import final

import torch
import torch.fx as fx
from torch import Tensor

from hvp_core.autodiff.flow_network import FlowNetwork
from hvp_core.autodiff.recorder import Env
from hvp_core.autodiff.sums import GradientTerm
from hvp_core.autodiff.trace import Phase, Trace, is_parameters

aten = torch.ops.aten

Kernels = Callable[..., Sequence[Tensor]]


@final
@dataclass(frozen=True)
class Group:
    """Phases that run together, and the names of the results that are wanted of them."""

    phases: frozenset[Phase]
    outputs: tuple[str, ...] = ()


def group(phases: Iterable[Phase], outputs: Iterable[str] = ()) -> Group:
    """A group from any iterables."""
    return Group(frozenset(phases), tuple(outputs))


@final
@dataclass
class Subprogram:
    """A piece of a trace: values by name in, values by name out.

    Attributes:
        graph: The operations.
        inputs: Names of the arguments, in the order of their positions.
        outputs: Names of the results, in their order.
        terms: For each wanted `p_bar/NAME` or `p_bar_dot/NAME`, the terms whose sum it is; their
            operands are among the results.
        examples: Fake tensors like the arguments.
        bytes_of: Bytes of each result, by name.
    """

    graph: fx.Graph
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    terms: dict[str, list[GradientTerm]]
    examples: tuple[Tensor, ...]
    bytes_of: dict[str, int]
    run: Kernels = field(init=False)

    def __post_init__(self) -> None:
        """Run operation by operation until the subprogram is compiled."""
        self.run = self._by_operation

    @cached_property
    def module(self) -> fx.GraphModule:
        """The operations as a function of positional tensors.

        Many subprograms are made to see what they would keep, and never run.
        """
        return fx.GraphModule({}, self.graph)

    def _by_operation(self, *values: Tensor) -> Sequence[Tensor]:
        found: Sequence[Tensor] = self.module(*values)
        return found

    def __call__(self, env: Mapping[str, Tensor]) -> Env:
        """The results by name."""
        found = self.run(*[env[name] for name in self.inputs])
        return dict(zip(self.outputs, found, strict=True))


def partition(trace: Trace, groups: Sequence[Group]) -> list[Subprogram]:
    """Cut a trace into subprograms that run one after the other.

    Of what one subprogram computes and a later one needs, residuals are kept under names `r/...`:
    the fewest bytes from which the rest follows by pointwise work.

    Args:
        trace: The program.
        groups: The phases and wanted outputs of each subprogram, in the order in which they run. A
            phase is in one group at most; phases in no group must not be needed.
    """
    home = {phase: index for index, each in enumerate(groups) for phase in each.phases}
    wanted = [_wanted(trace, each.outputs) for each in groups]
    kept: dict[fx.Node, int] = {}  # operation -> subprogram that computes it
    for index in range(1, len(groups)):
        later = [node for _, nodes, _ in wanted[index:] for node in nodes]
        for node in _cut(trace, index, home, later, kept):
            kept[node] = home[trace.phase(node)]
    subprograms = []
    for index, (names, nodes, terms) in enumerate(wanted):
        owed = [node for node, owner in kept.items() if owner == index]
        given = {node for node, owner in kept.items() if owner < index}
        names += [_residual_name(node) for node in owed]
        subprograms.append(_build(trace, names, [*nodes, *owed], terms, given))
    return subprograms


def _residual_name(node: fx.Node) -> str:
    return f"r/{node.name}"


def _bytes(node: fx.Node) -> int:
    value = node.meta["val"]
    return int(value.numel() * value.element_size())


def _wanted(
    trace: Trace, outputs: Sequence[str]
) -> tuple[list[str], list[fx.Node], dict[str, list[GradientTerm]]]:
    """Names and nodes of a subprogram's results, and the terms of parameters' derivatives.

    A derivative of a parameter is no result itself: the operands of its terms are.
    """
    names: list[str] = []
    nodes: list[fx.Node] = []
    terms: dict[str, list[GradientTerm]] = {}
    for name in outputs:
        if not is_parameters(name):
            names.append(name)
            nodes.append(trace.outputs[name])
            continue
        terms[name] = []
        for kind, operands in trace.terms[name]:
            places = [f"{name}.{len(names) + place}" for place in range(len(operands))]
            names += places
            nodes += operands
            terms[name].append(GradientTerm(kind, tuple(places)))
    return names, nodes, terms


# What to keep -------------------------------------------------------------------------------------

#: Operations that move values and compute nothing.
_MOVES = {
    aten._unsafe_view.default,
    aten.cat.default,
    aten.clone.default,
    aten.expand.default,
    aten.permute.default,
    aten.select.int,
    aten.select_backward.default,
    aten.slice.Tensor,
    aten.slice_backward.default,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.stack.default,
    aten.t.default,
    aten.transpose.int,
    aten.unbind.int,
    aten.unsqueeze.default,
    aten.view.default,
    operator.getitem,
}
_CHEAP = _MOVES | {
    aten._to_copy.default,
    aten.arange.default,
    aten.arange.start,
    aten.empty_like.default,
    aten.fill.Scalar,
    aten.full.default,
    aten.full_like.default,
    aten.ones.default,
    aten.ones_like.default,
    aten.scalar_tensor.default,
    aten.zeros.default,
    aten.zeros_like.default,
}


def is_cheap(node: fx.Node) -> bool:
    """Whether an operation costs no more than reading its operands, so that it may run twice."""
    target = node.target
    if target in _CHEAP:
        return True
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags


def _cut(
    trace: Trace,
    index: int,
    home: Mapping[Phase, int],
    wanted: Sequence[fx.Node],
    already: Mapping[fx.Node, int],
) -> set[fx.Node]:
    """Operations whose results are kept for this and later subprograms.

    They are a minimum cut, weighted by bytes. On its near side lie the expensive operations of
    earlier subprograms, on its far side what later subprograms read. Results that are kept already
    cost nothing.
    """

    def early(node: fx.Node) -> bool:
        return trace.input_name(node) is None and home[trace.phase(node)] < index

    flow = FlowNetwork("source", "sink")
    seen: set[fx.Node] = set()
    stack = [(node, True) for node in wanted]  # (operation, is read by a later subprogram)
    while stack:
        node, direct = stack.pop()
        if early(node):
            if direct:
                flow.connect((node, "out"), "sink")
            if node not in seen:
                there = isinstance(node.meta.get("val"), Tensor)  # and not several of them
                size = 0 if node in already else _bytes(node) if there else math.inf
                flow.connect((node, "in"), (node, "out"), size)
                if not is_cheap(node):
                    flow.connect("source", (node, "in"))
                else:
                    for each in node.all_input_nodes:
                        if early(each):
                            flow.connect((each, "out"), (node, "in"))
                            stack.append((each, False))
        elif node not in seen:
            stack += [(each, True) for each in node.all_input_nodes]
        seen.add(node)
    near = flow.near_side()
    return {
        node for node in seen if early(node) and (node, "in") in near and (node, "out") not in near
    }


def _build(
    trace: Trace,
    names: Sequence[str],
    nodes: Sequence[fx.Node],
    terms: dict[str, list[GradientTerm]],
    saved: set[fx.Node],
) -> Subprogram:
    """The subprogram that leads from arguments and saved results to the wanted results."""
    found: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack += [] if node in saved else node.all_input_nodes
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    arguments: dict[str, fx.Node] = {}
    order = [node for node in trace.nodes if node in found]
    for node in order:
        name = _residual_name(node) if node in saved else trace.input_name(node)
        if name is not None:
            copies[node] = graph.placeholder(f"a{len(arguments)}")
            copies[node].meta = dict(node.meta)
            arguments[name] = node
    for node in order:
        if node not in copies:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in nodes))
    return Subprogram(
        graph,
        tuple(arguments),
        tuple(names),
        terms,
        tuple(node.meta["val"] for node in arguments.values()),
        {name: _bytes(node) for name, node in zip(names, nodes, strict=True)},
    )
