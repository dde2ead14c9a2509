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
from torch.utils.flop_counter import register_flop_formula

from hvp_core.autodiff.terms import RESHAPES, alike

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


@register_flop_formula(torch.ops.hvp.sum_of_products)
def _flops(left: list[torch.Size], right: list[torch.Size], **_: object) -> int:
    return sum(2 * a[0] * a[1] * b[1] for a, b in zip(left, right, strict=True))


sum_of_products = torch.ops.hvp.sum_of_products.default


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
        return (
            len(users) == 1
            and _is_sum(users[0])
            and users[0] not in untouched
            and together(node, users[0])
        )

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
        products: dict[torch.Size, dict[fx.Node, fx.Node]] = {}
        for each in parts:
            product = _product(each) if together(node, each) else None
            if product is not None:  # as a matrix, it may have another shape than as a summand
                products.setdefault(product.meta["val"].shape, {})[each] = product
        merged = [each for each in products.values() if len(each) > 1]
        if merged:
            rest = [each for each in parts if not any(each in some for some in merged)]
            _merge(node, [list(each.values()) for each in merged], rest)
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
    while node.target in RESHAPES and len(node.users) == 1:
        (node,) = node.all_input_nodes
    return node if node.target is aten.mm.default and len(node.users) == 1 else None


def _merge(node: fx.Node, sums: Sequence[Sequence[fx.Node]], others: Sequence[fx.Node]) -> None:
    """Replace a sum by one line for each of these sums of products, plus the other summands."""
    value, graph = node.meta["val"], node.graph
    with graph.inserting_before(node):
        summands = list(others)
        for products in sums:
            left, right = ([each.args[side] for each in products] for side in (0, 1))
            total = graph.call_function(sum_of_products, (left, right))
            total.meta["val"] = products[0].meta["val"]
            if total.meta["val"].shape != value.shape:
                total = graph.call_function(aten._unsafe_view.default, (total, list(value.shape)))
                total.meta["val"] = value
            summands.append(total)
        found = summands.pop()
        while summands:
            found = graph.call_function(aten.add.Tensor, (found, summands.pop()))
            found.meta["val"] = value
    node.replace_all_uses_with(found)
