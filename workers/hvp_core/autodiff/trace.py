"""A block's derivatives as one straight-line program of tensors.

The forward-over-reverse dual of a block is traced once for each shape. Every operation of the trace
then belongs to a *phase*, found from the values that it depends on. The phases of a block with one
attention:

    0  p, x                     0' v, ẋ               the block up to its attention
    1  o                        1' ȯ                  the block behind it
    2  ȳ                        2' ȳ̇                  back to the attention
    3  q̄, k̄, v̄                  3' their tangents     back to x and p

A block with C attentions has C + 1 phases on the way forward and as many on the way back, one
between each two attentions; a block without attention has one each way. A phase without prime does
not depend on any tangent, so in a Krylov run it is the same for every product. Every schedule is a
grouping of these phases (`subprograms.partition`): what one group has computed and a later one
needs is kept, except for pointwise work, which is cheaper to do again than to load.

Values have names, the same everywhere in this package: `x`, `y`; of the j-th attention `q/j`,
`k/j`, `v/j` and its output `o/j`; parameters `p/NAME`; constants `c/0`...; a tangent has `_dot`
appended to the part before the slash, a cotangent `_bar`, the tangent of a cotangent `_bar_dot`:
`p_bar_dot/NAME` is a block's part of Hv.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.fx as fx
from torch import Tensor

from hvp_core.autodiff.recorder import Env, Program, record
from hvp_core.autodiff.rewrites import alike, drop_zeros, merge_sums, sums_behind, terms_of

aten = torch.ops.aten


@final
@dataclass(frozen=True, order=True)
class Phase:
    """When an operation can run: after the inputs of `time`, and their tangents if `dotted`."""

    time: int
    dotted: bool


def phases(times: Iterable[int], *, dotted: bool) -> frozenset[Phase]:
    """The phases of these times, with a tangent or without."""
    return frozenset(Phase(time, dotted) for time in times)


def _phase_of_input(name: str, num_calls: int) -> Phase:
    """The phase in which an argument comes, in a block that is cut at `num_calls` attentions."""
    base, _, place = name.partition("/")
    plain = base.removesuffix("_dot")
    if plain == "o":
        time = int(place) + 1
    elif plain == "y_bar":
        time = num_calls + 1
    elif plain in ("q_bar", "k_bar", "v_bar"):
        time = 2 * num_calls + 1 - int(place)
    else:  # x, parameters, constants, what is given
        time = 0
    return Phase(time, base.endswith("_dot"))


@final
class Trace:
    """A program of named values, with the phase of every operation.

    Args:
        program: The program, from tensors by name to tensors by name.
        arguments: Examples of its arguments; only shapes, dtypes, strides and devices matter.

    Raises:
        RuntimeError, NotImplementedError, torch errors: An operation has no derivative that is
            asked for, or depends on the values of the arguments.
    """

    def __init__(self, program: Program, arguments: Env):
        self._graph, names = trace_graph(program, arguments)
        placeholders = [node for node in self._graph.nodes if node.op == "placeholder"]
        self._inputs = dict(zip(placeholders, arguments, strict=True))
        self.arguments = dict(zip(arguments, placeholders, strict=True))
        #: Number of attentions that the block is cut at.
        self.num_calls = sum(name.startswith("o/") for name in arguments)
        output = next(node for node in self._graph.nodes if node.op == "output")
        derivatives = [
            node for name, node in zip(names, output.args[0], strict=True) if is_parameters(name)
        ]
        found = self._find_phases()
        merge_sums(self._graph, sums_behind(derivatives), lambda a, b: found[a] == found[b])
        self.outputs: dict[str, fx.Node] = dict(zip(names, output.args[0], strict=True))
        #: For each derivative of a parameter, the terms whose sum it is.
        self.terms = {
            name: terms_of(node) for name, node in self.outputs.items() if is_parameters(name)
        }
        self._phases = self._find_phases()

    def _find_phases(self) -> dict[fx.Node, Phase]:
        found: dict[fx.Node, Phase] = {}
        for node in self._graph.nodes:
            if node in self._inputs:
                found[node] = _phase_of_input(self._inputs[node], self.num_calls)
                continue
            before = [found[each] for each in node.all_input_nodes]
            found[node] = Phase(
                max((phase.time for phase in before), default=0),
                any(phase.dotted for phase in before),
            )
        return found

    def time_of(self, name: str) -> int:
        """The time of the phase after which an output is known."""
        nodes = [self.outputs[name]]
        if name in self.terms:
            nodes = [node for _, operands in self.terms[name] for node in operands]
        return max(self._phases[node].time for node in nodes)

    def is_dotted(self, line: str) -> bool:
        """Whether an operation, by its name in the graph, depends on a tangent."""
        return next(phase.dotted for node, phase in self._phases.items() if node.name == line)

    @property
    def argument_bytes(self) -> dict[str, int]:
        """Bytes of each argument."""
        return {name: node.meta["val"].nbytes for name, node in self.arguments.items()}

    @property
    def nodes(self) -> Iterable[fx.Node]:
        """The operations and arguments, in order."""
        return self._graph.nodes

    def phase(self, node: fx.Node) -> Phase:
        """The phase of an operation or argument."""
        return self._phases[node]

    def input_name(self, node: fx.Node) -> str | None:
        """The name of an argument; None for an operation."""
        return self._inputs.get(node)


def suffixed(name: str, suffix: str) -> str:
    """A name with something appended to the part before the slash."""
    base, slash, rest = name.partition("/")
    return f"{base}{suffix}{slash}{rest}"


def dotted(name: str) -> str:
    """The name of a value's tangent."""
    return suffixed(name, "_dot")


def is_parameters(name: str) -> bool:
    """Whether an output is a derivative with respect to a parameter."""
    return name.startswith("p_bar")


# Tracing ------------------------------------------------------------------------------------------


def trace_graph(program: Program, arguments: Env) -> tuple[fx.Graph, list[str]]:
    """The operations of a program on tensors like these, without those that do nothing.

    Returns:
        The graph, its placeholders in the order of the arguments; and the names of its outputs.

    Raises:
        RuntimeError: The program computes with a tensor that is not among its arguments, or an
            operation is given operands of several types.
    """
    graph, names = record(program, arguments)
    _clean(graph)
    if any(node.op == "get_attr" for node in graph.nodes):
        raise RuntimeError("the block computes with a tensor that is not among its arguments")
    for node in graph.nodes:
        _refuse_mixed(node)
    return graph, names


def _refuse_mixed(node: fx.Node) -> None:
    """Refuse what fake tensors let pass and real ones would not: 16 bits times 32, for one.

    Raises:
        RuntimeError: An operation is given operands of several types.
    """
    values = [each.meta.get("val") for each in node.all_input_nodes]
    dtypes = {
        each.dtype for each in values if isinstance(each, Tensor) and each.is_floating_point()
    }
    mixed = len(dtypes) > 1 and min(each.itemsize for each in dtypes) < 4
    if node.op != "call_function" or not mixed or node.target is aten.cat.default:
        return
    if torch.Tag.pointwise not in getattr(node.target, "tags", ()):
        raise RuntimeError(f"{node.target} is given operands of several types")


_IDENTITIES = {aten.alias.default, aten.detach.default, aten.lift_fresh.default}


def _clean(graph: fx.Graph) -> None:
    """Drop operations on zeros, and those that change nothing, are repeated, or are not read."""
    drop_zeros(graph)
    seen: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or _is_drawn(node):
            continue
        if node.target is aten._efficientzerotensor.default:
            node.target = aten.zeros.default
        same = _same_as(node)
        if same is None:
            key = (node.target, frozen(node.args), frozen(node.kwargs))
            same = seen.setdefault(key, node)
        if same is not node:
            node.replace_all_uses_with(same)
            graph.erase_node(node)
    graph.eliminate_dead_code()
    graph.lint()


def _is_drawn(node: fx.Node) -> bool:
    """Whether an operation gives other values each time."""
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def frozen(value: Any, of: Callable[[Any], Any] = lambda leaf: leaf) -> Any:
    """Arguments of an operation as a key.

    Args:
        value: Arguments, in lists and dicts.
        of: Gives what stands for a value that is neither.
    """
    if isinstance(value, list | tuple):
        return tuple(frozen(each, of) for each in value)
    if isinstance(value, dict):
        return tuple((key, frozen(each, of)) for key, each in value.items())
    # 1, 1.0 and True are equal and not the same argument.
    return (type(value), of(value))


def _same_as(node: fx.Node) -> fx.Node | None:
    """The argument that an operation only passes on; None for any other operation."""
    first = node.args[0] if node.args else None
    if not isinstance(first, fx.Node):
        return None
    if node.target in _IDENTITIES:
        return first
    if node.target is aten.pow.Tensor_Scalar and node.args[1] == 1:
        return first
    if node.target is aten.mul.Scalar and node.args[1] == 1 and alike(node, first):
        return first
    if node.target in (aten.expand.default, aten._to_copy.default, aten.view.default):
        quiet = "memory_format" not in node.kwargs
        return first if quiet and alike(node, first) else None
    return None
