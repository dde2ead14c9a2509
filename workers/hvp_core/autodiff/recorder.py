"""What a program does to tensors, written down line by line.

The program runs once on tensors without values, and every operation that reaches the dispatcher
below torch's transforms becomes a line of a graph. torch's own tracer gives the same lines, and
does much beside (proxies, symbols, code that is generated and compiled) in three to four times the
time.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, final

import torch
import torch.fx as fx
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functionalize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

aten, prim = torch.ops.aten, torch.ops.prim

Env = dict[str, Tensor]
Program = Callable[[Env], Env]


def record(program: Program, arguments: Env) -> tuple[fx.Graph, list[str]]:
    """The operations of a program on tensors like these.

    Args:
        program: The program, from tensors by name to tensors by name.
        arguments: Examples of its arguments; only shapes, strides, dtypes and devices matter.

    Returns:
        The graph: placeholders in the order of the arguments, one line for each operation, tensors
        that the program has of its own as attributes, whose values are not kept; of each tensor
        `meta["val"]` is one without values. And the names of its outputs.

    Raises:
        RuntimeError, torch errors: The program writes into a tensor where nothing else would do, or
            depends on values.
    """
    names: list[str] = []

    def positional(*values: Tensor) -> tuple[Tensor, ...]:
        found = program(dict(zip(arguments, values, strict=True)))
        names[:] = found
        return tuple(found.values())

    recorder = _Recorder()
    # Without grad mode torch picks fused backward kernels, some of which have no derivative.
    with FakeTensorMode(allow_fallback_kernels=True), torch.enable_grad(), _each_cast_itself():
        given = [recorder.argument(each) for each in arguments.values()]
        with recorder:
            found = functionalize(positional, remove="mutations")(*given)
    return recorder.graph_of(found), names


@contextmanager
def _each_cast_itself() -> Iterator[None]:
    """Have automatic casts made wherever they are met, and not remembered from earlier ones."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def _same_numel_in_storage(one: Tensor, other: Tensor) -> bool:
    in_one, in_other = (each.untyped_storage().nbytes() // each.itemsize for each in (one, other))
    return in_one == in_other


#: Questions that torch's transforms ask of tensors, more often than they compute.
_ASKED: Mapping[Any, Callable[..., Any]] = {
    prim.device.default: lambda tensor: tensor.device,
    aten.is_same_size.default: lambda one, other: one.shape == other.shape,
    aten._has_same_storage_numel.default: _same_numel_in_storage,
}


@cache
def _is_composite(func: Any) -> bool:
    """Whether an operation is written in others, which are what a derivative is taken of."""
    composite = torch._C.DispatchKey.CompositeImplicitAutograd
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), composite)


@final
class _Recorder(TorchDispatchMode):
    """Writes down the operations that are done while it is entered."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._graph = fx.Graph()
        self._nodes: dict[int, fx.Node] = {}
        self._held: list[Tensor] = []  # an id is a tensor's only while it lives

    def argument(self, like: Tensor) -> Tensor:
        """A new argument of the program, without values: one given twice would be one value."""
        given = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)
        self._enter(given, self._graph.placeholder(f"argument_{len(self._held)}"))
        return given

    def graph_of(self, outputs: tuple[Tensor, ...]) -> fx.Graph:
        """The graph, when the program has ended with these outputs."""
        self._graph.output(tuple(self._node(each) for each in outputs))
        return self._graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _ASKED:
            return _ASKED[func](*args, **kwargs)
        if _is_composite(func):
            with self:
                found = func.decompose(*args, **kwargs)
            if found is not NotImplemented:
                return found
        if func._schema.is_mutable:
            return self._written(func, args, kwargs)
        found = func(*args, **kwargs)
        node = self._line(func, args, kwargs)
        if isinstance(found, Tensor):
            self._enter(found, node)
        elif isinstance(found, list | tuple):
            node.meta["val"] = found
            for place, each in enumerate(found):
                if isinstance(each, Tensor):
                    self._enter(each, self._graph.call_function(operator.getitem, (node, place)))
        return found

    def _line(self, func: Any, args: Any, kwargs: Any) -> fx.Node:
        return self._graph.create_node(
            "call_function",
            func,
            tree_map_only(Tensor, self._node, tuple(args)),
            tree_map_only(Tensor, self._node, kwargs),
            name=func.overloadpacket.__name__,
        )

    def _written(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Write down an operation in place as the one that makes a new value.

        The program's own ones do not come here, as they are taken out before. Composite operations
        have some, on values that are theirs alone.

        Raises:
            RuntimeError: There is no such operation, or somebody else may see the value change.
        """
        written, name = args[0], func.overloadpacket.__name__
        packet = getattr(aten, name.removesuffix("_"), None)
        making = getattr(packet, func._overloadname, None)
        storage = written.untyped_storage()._cdata
        seen = [each for each in self._held if each.untyped_storage()._cdata == storage]
        if making is None or not name.endswith("_") or any(each is not written for each in seen):
            raise RuntimeError(f"{func} writes into a tensor")
        made = making(*args, **kwargs)
        if self._node(written).op != "call_function" or made.dtype != written.dtype:
            raise RuntimeError(f"{func} writes into a tensor")
        node = self._line(making, args, kwargs)
        func(*args, **kwargs)
        self._enter(written, node)
        return written

    def _enter(self, tensor: Tensor, node: fx.Node) -> None:
        node.meta["val"] = tensor.detach() if tensor.requires_grad else tensor
        self._nodes[id(tensor)] = node
        self._held.append(tensor)

    def _node(self, tensor: Tensor) -> fx.Node:
        """The line that a tensor comes from; an attribute for one that is the program's own."""
        if id(tensor) not in self._nodes:
            self._enter(tensor, self._graph.create_node("get_attr", f"tensor_{len(self._held)}"))
        return self._nodes[id(tensor)]
