"""Tangents that are zero whatever the arguments are, and what need not be computed of them.

Where one operand of an operation has a tangent and another has none, torch goes by the rule for
both and puts a zero in the place of the one that is not there: the product of a constant matrix
with it is a product of matrices all the same.
"""

from __future__ import annotations

import torch
import torch.fx as fx

from hvp_core.autodiff.gemm_sums import alike

aten = torch.ops.aten

_PRODUCTS = {aten.mm.default, aten.bmm.default, aten.mul.Tensor}
_COSTLY = {aten.mm.default, aten.bmm.default}
_SUMS = {aten.add.Tensor, aten.sub.Tensor}
#: Linear in their first argument.
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
    """Pass by sums with torch's zero tangents, and products with them.

    What a line reads that is left is still there; lines that nobody reads any more are not removed.

    Args:
        graph: Of a program with its derivatives; changed.
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
    """What a sum with zero is the same as."""
    if node.target not in _SUMS or node.kwargs or not _of_tensors(node):
        return None
    left, right = node.args
    found = None
    if right in zeros:
        found = left
    elif left in zeros and node.target is aten.add.Tensor:
        found = right
    return found if isinstance(found, fx.Node) and alike(node, found) else None
