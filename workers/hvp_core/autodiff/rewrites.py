"""How the operations of a trace are rewritten: sums of matrix products, and zeros.

Dual rules are full of sums: ẏ = ẋWᵀ + xẆᵀ, and the cotangent of an input is a sum over all
operations that read it. As separate operations the products cost a tensor each, and a compiler that
fuses the addition into the second product first copies the result of the first. As one operation
each product is added where the one before was written. A parameter's derivative leaves as its
terms: the operands of its products.

Some tangents are zero whatever the arguments are. Where one operand of an operation has a tangent
and another has none, torch goes by the rule for both and puts a zero in place of the missing
tangent: the product of a constant matrix with that zero is a matrix product all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence

import torch
import torch.fx as fx
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

aten = torch.ops.aten

Summand = tuple[str, tuple[fx.Node, ...]]

_RESHAPES = {aten._unsafe_view.default, aten.view.default}


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
    """Turn sums of matrix products into single operations.

    Args:
        graph: The graph of a program; changed.
        untouched: Additions to leave alone.
        together: Whether two operations run at the same time. A product that is known before the
            rest stays an operation of its own.
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
    """The matrix product that an operation is, reshaped or not; None if others read it too."""
    while node.target in _RESHAPES and len(node.users) == 1:
        (node,) = node.all_input_nodes
    return node if node.target is aten.mm.default and len(node.users) == 1 else None


def _merge(node: fx.Node, sums: Sequence[Sequence[fx.Node]], others: Sequence[fx.Node]) -> None:
    """Replace a sum by one operation for each of these sums of products, plus other summands."""
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


# Terms of a parameter's derivative ----------------------------------------------------------------


def terms_of(node: fx.Node) -> list[Summand]:
    """The terms of a parameter's derivative, which are added to their sum in place.

    A matrix's derivative is a sum of products over the tokens. The products are handed out as their
    operands: the GEMM itself accumulates them, in the accumulator's precision, and no tensor of the
    parameter's size is made. Several products become one, of operands laid end to end: the sum is
    written once.
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
    """Matrices laid end to end, their rows contiguous wherever they were.

    They are laid so as early as can be, and before they are reshaped to matrices: their values can
    then be computed where they belong, instead of being copied there.
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
    """These tensors as one, joined as early as can be; once for all operations that read it."""
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
    """The tensors that these rows were reshaped from, if all have one shape; else the rows."""
    sources = [_first(each) if each.target in _RESHAPES else each for each in parts]
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
    """The operation that transposes an operation's result."""
    if node.target is aten.t.default:
        return _first(node)
    with node.graph.inserting_after(node):
        turned = node.graph.call_function(aten.t.default, (node,))
    turned.meta["val"] = node.meta["val"].t()
    return turned


def alike(node: fx.Node, other: fx.Node) -> bool:
    """Whether two operations give tensors of one shape, dtype, device and layout."""
    a, b = node.meta.get("val"), other.meta.get("val")
    return (
        isinstance(a, Tensor)
        and isinstance(b, Tensor)
        and (a.shape, a.dtype, a.stride(), a.device) == (b.shape, b.dtype, b.stride(), b.device)
    )


# Zeros ------------------------------------------------------------------------------------------

_PRODUCTS = {aten.mm.default, aten.bmm.default, aten.mul.Tensor}
_COSTLY = {aten.mm.default, aten.bmm.default}
_SUMS = {aten.add.Tensor, aten.sub.Tensor}
#: Operations that are linear in their first argument.
_LINEAR = {
    aten._softmax_backward_data.default,
    aten._to_copy.default,
    aten._unsafe_view.default,
    aten.alias.default,
    aten.clone.default,
    aten.detach.default,
    aten.div.Tensor,
    aten.expand.default,
    aten.gelu_backward.default,
    aten.mul.Scalar,
    aten.neg.default,
    aten.permute.default,
    aten.select.int,
    aten.sigmoid_backward.default,
    aten.silu_backward.default,
    aten.slice.Tensor,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.sum.dim_IntList,
    aten.t.default,
    aten.tanh_backward.default,
    aten.transpose.int,
    aten.unsqueeze.default,
    aten.view.default,
}


def drop_zeros(graph: fx.Graph) -> None:
    """Pass by sums with torch's zero tangents, and matrix products with them.

    Operations that nobody reads any more are not removed.

    Args:
        graph: The graph of a program with its derivatives; changed.
    """
    zeros: set[fx.Node] = set()
    for node in graph.nodes:
        if _is_zero(node, zeros):
            zeros.add(node)
        elif (other := _other_summand(node, zeros)) is not None:
            node.replace_all_uses_with(other)
    for node in zeros:
        if node.target in _COSTLY and node.users:
            value = node.meta["val"]
            with graph.inserting_before(node):
                zero = graph.call_function(
                    aten.zeros.default,
                    (list(value.shape),),
                    {"dtype": value.dtype, "layout": torch.strided, "device": value.device},
                )
            zero.meta = dict(node.meta)
            node.replace_all_uses_with(zero)


def _is_zero(node: fx.Node, zeros: set[fx.Node]) -> bool:
    if node.target is aten._efficientzerotensor.default:
        return True
    if node.target is aten.zeros.default:
        return node.args[0] == []  # a number, to be spread: no model writes that
    reads = node.all_input_nodes
    if node.target in _PRODUCTS:
        return any(each in zeros for each in reads)
    if node.target in _SUMS:
        return len(reads) > 0 and all(each in zeros for each in reads) and _of_tensors(node)
    return node.target in _LINEAR and node.args[0] in zeros


def _of_tensors(node: fx.Node) -> bool:
    return all(isinstance(each, fx.Node) for each in node.args)


def _other_summand(node: fx.Node, zeros: set[fx.Node]) -> fx.Node | None:
    """The summand that a sum with zero equals; None where the sum has no zero."""
    if node.target not in _SUMS or node.kwargs or not _of_tensors(node):
        return None
    left, right = node.args
    found = None
    if right in zeros:
        found = left
    elif left in zeros and node.target is aten.add.Tensor:
        found = right
    return found if isinstance(found, fx.Node) and alike(node, found) else None
