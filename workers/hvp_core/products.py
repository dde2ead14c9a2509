"""Sums of matrix products as one line: each product is added where the one before was written.

Dual rules are full of such sums: ẏ = ẋWᵀ + xẆᵀ, and the cotangent of an input is one over all that
read it. As separate lines they cost a tensor each, and a compiler that fuses the addition into the
second product first copies the result of the first.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
import torch.fx as fx
from torch import Tensor

from hvp_core.terms import alike

aten = torch.ops.aten


def _add_up(left: list[Tensor], right: list[Tensor]) -> Tensor:
    total = torch.mm(left[0], right[0])
    for a, b in zip(left[1:], right[1:], strict=True):
        total.addmm_(a, b)
    return total


def _like(left: list[Tensor], right: list[Tensor]) -> Tensor:
    return left[0].new_empty(left[0].shape[0], right[0].shape[1])


_library = torch.library.Library("hvp", "DEF")
_library.define("sum_of_products(Tensor[] left, Tensor[] right) -> Tensor")
_library.impl("sum_of_products", _add_up, "CompositeExplicitAutograd")
torch.library.register_fake("hvp::sum_of_products", _like)

sum_of_products = torch.ops.hvp.sum_of_products.default

_RESHAPES = {aten._unsafe_view.default, aten.view.default}


def merge_sums(
    graph: fx.Graph, untouched: Collection[fx.Node], together: Callable[[fx.Node, fx.Node], bool]
) -> None:
    """Turn sums of products of matrices into single lines.

    Args:
        graph: To change.
        untouched: Additions to leave alone.
        together: Whether two lines run at the same time. A product that is known before the rest
            stays a line of its own.
    """

    def is_inner(node: fx.Node) -> bool:
        """Whether a sum is nothing but a summand of a larger one."""
        users = list(node.users)
        return len(users) == 1 and _is_sum(users[0]) and users[0] not in untouched

    def summands(node: fx.Node) -> list[fx.Node]:
        found = []
        for each in node.all_input_nodes:
            inner = _is_sum(each) and is_inner(each) and each not in untouched
            found += summands(each) if inner else [each]
        return found

    for node in reversed(list(graph.nodes)):
        if not _is_sum(node) or node in untouched or is_inner(node):
            continue
        parts = summands(node)
        products = [(each, _product(each)) for each in parts if together(node, each)]
        merged = {each: product for each, product in products if product is not None}
        if len(merged) > 1:
            _merge(node, list(merged.values()), [each for each in parts if each not in merged])
    graph.eliminate_dead_code()


def _is_sum(node: fx.Node) -> bool:
    return (
        node.target is aten.add.Tensor
        and not node.kwargs
        and len(node.all_input_nodes) == 2
        and all(alike(node, each) for each in node.all_input_nodes)
    )


def _product(node: fx.Node) -> fx.Node | None:
    """The product of two matrices that a line is, reshaped or not; nobody else reads it."""
    while node.target in _RESHAPES and len(node.users) == 1:
        (node,) = node.all_input_nodes
    return node if node.target is aten.mm.default and len(node.users) == 1 else None


def _merge(node: fx.Node, products: Sequence[fx.Node], others: Sequence[fx.Node]) -> None:
    """Replace a sum by one line for these products, plus the other summands."""
    left, right = ([each.args[side] for each in products] for side in (0, 1))
    value, graph = node.meta["val"], node.graph
    with graph.inserting_before(node):
        total = graph.call_function(sum_of_products, (left, right))
        total.meta["val"] = products[0].meta["val"]
        if total.meta["val"].shape != value.shape:
            total = graph.call_function(aten._unsafe_view.default, (total, list(value.shape)))
            total.meta["val"] = value
        for each in others:
            total = graph.call_function(aten.add.Tensor, (total, each))
            total.meta["val"] = value
    node.replace_all_uses_with(total)
