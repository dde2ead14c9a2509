"""A parameter's derivative as a sum of products, to be added up where it belongs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.fx as fx
from torch import Tensor

aten = torch.ops.aten

Summand = tuple[str, tuple[fx.Node, ...]]

RESHAPES = {aten._unsafe_view.default, aten.view.default}


def terms_of(node: fx.Node) -> list[Summand]:
    """The derivative of a parameter as terms that can be added to it where it is.

    A matrix's derivative is a sum of products over the tokens. Handed out as operands, they are
    accumulated by the GEMM itself, in the accumulator's precision, and no tensor of the
    parameter's size is made. Products of one shape become one of operands laid end to end: the
    parameter is written once.
    """
    found = _summands(node)
    products = [operands for kind, operands in found if kind == "mm"]
    dtypes = {tuple(each.meta["val"].dtype for each in operands) for operands in products}
    if len(products) < 2 or len(products) < len(found) or len(dtypes) > 1:
        return found
    left = _laid(node.graph, [operands[0] for operands in products], 1)
    right = _laid(node.graph, [operands[1] for operands in products], 0)
    return [("mm", (left, right))]


def sums_behind(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The additions that become terms of parameters' derivatives."""
    found: set[fx.Node] = set()
    stack = [node for node in nodes if len(_summands(node)) > 1]
    while stack:
        node = stack.pop()
        if node.target is aten.add.Tensor:
            found.add(node)
        if node.target in (aten.add.Tensor, aten.t.default):
            stack += node.all_input_nodes
    return found


def _laid(graph: fx.Graph, parts: Sequence[fx.Node], dim: int) -> fx.Node:
    """Matrices end to end, their rows contiguous wherever they were.

    As early as can be, and before they are reshaped to matrices: what is computed line by line can
    then be written where it belongs, instead of being copied there.
    """
    turned = all(each.target is aten.t.default for each in parts)
    if turned:
        parts, dim = [_turn(each) for each in parts], 1 - dim
    shape = list(torch.cat([each.meta["val"] for each in parts], dim).shape)
    if dim == 0:
        parts = _unshaped(parts)
    found = _end_to_end(graph, list(parts), dim)
    if list(found.meta["val"].shape) != shape:
        cat = found
        with graph.inserting_after(cat):
            found = graph.call_function(aten.view.default, (cat, shape))
        found.meta["val"] = cat.meta["val"].view(shape)
    return _turn(found) if turned else found


def _end_to_end(graph: fx.Graph, parts: list[fx.Node], dim: int) -> fx.Node:
    """These tensors as one, as early as can be; once for all who read it."""
    for node in graph.nodes:
        if node.target is aten.cat.default and node.args == (parts, dim):
            same: fx.Node = node
            return same
    last = max(parts, key=list(graph.nodes).index)
    with graph.inserting_after(_last_argument(graph) if last.op == "placeholder" else last):
        found = graph.call_function(aten.cat.default, (parts, dim))
    found.meta["val"] = torch.cat([each.meta["val"] for each in parts], dim)
    return found


def _last_argument(graph: fx.Graph) -> fx.Node:
    arguments: list[fx.Node] = [node for node in graph.nodes if node.op == "placeholder"]
    return arguments[-1]


def _unshaped(parts: Sequence[fx.Node]) -> Sequence[fx.Node]:
    """What rows were reshaped from, if all were from tensors of one shape whose rows they are."""
    sources = [_first(each) if each.target in RESHAPES else each for each in parts]
    values = [each.meta["val"] for each in sources]
    rows = all(
        value.is_contiguous() and value.shape[-1] == part.meta["val"].shape[-1]
        for value, part in zip(values, parts, strict=True)
    )
    return sources if rows and len({value.shape for value in values}) == 1 else parts


def _summands(node: fx.Node) -> list[Summand]:
    transposed = False
    while node.target is aten.t.default:
        node, transposed = _first(node), not transposed
    arguments = [each for each in node.args if isinstance(each, fx.Node)]
    if node.target is aten.add.Tensor and not node.kwargs and len(arguments) == 2:
        left, right = arguments
        if alike(left, right):
            found = _summands(left) + _summands(right)
            if all(kind == "mm" for kind, _ in found):
                return [_transposed(each) for each in found] if transposed else found
    if node.target is aten.mm.default:
        term = ("mm", tuple(arguments))
        return [_transposed(term) if transposed else term]
    if node.target is aten.embedding_dense_backward.default and not transposed:
        _, _, _, padding, scaled = node.args
        if padding == -1 and not scaled:
            return [("rows", (arguments[1], arguments[0]))]
    return [("dense", (_turn(node) if transposed else node,))]


def _first(node: fx.Node) -> fx.Node:
    first = node.args[0]
    assert isinstance(first, fx.Node)
    return first


def _transposed(term: Summand) -> Summand:
    kind, (left, right) = term
    return kind, (_turn(right), _turn(left))


def _turn(node: fx.Node) -> fx.Node:
    """The transpose of a line, as a line."""
    if node.target is aten.t.default:
        return _first(node)
    with node.graph.inserting_after(node):
        turned = node.graph.call_function(aten.t.default, (node,))
    turned.meta["val"] = node.meta["val"].t()
    return turned


def alike(node: fx.Node, other: fx.Node) -> bool:
    """Whether two lines give tensors of one shape, dtype, device and layout."""
    a, b = node.meta.get("val"), other.meta.get("val")
    return (
        isinstance(a, Tensor)
        and isinstance(b, Tensor)
        and (a.shape, a.dtype, a.stride(), a.device) == (b.shape, b.dtype, b.stride(), b.device)
    )
