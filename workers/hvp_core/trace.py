"""A block's derivatives as one straight-line program of tensors.

The forward-over-reverse dual of a block is traced once for each shape. Every line of the trace then
belongs to a *stage*, found from what it depends on:

    0  p, x                     0' v, ẋ               the block up to its attention
    1  o                        1' ȯ                  the block behind it
    2  ȳ                        2' ȳ̇                  back to the attention
    3  q̄, k̄, v̄                  3' their tangents     back to x and p

A stage without prime does not depend on any tangent, so in a Krylov run it is the same for every
product. Every schedule is a grouping of these stages (`parts.split`): what one group has computed and a
later one needs is kept, except for pointwise work, which is cheaper to do again than to load.
Stage 1 and 3 are empty in a block without attention.

Values have names, the same everywhere in this package: `x`, `o`, `q`, `k`, `v`, `y`; parameters
`p/NAME`; constants `c/0`...; a tangent has `_dot` appended to the part before the slash, a
cotangent `_bar`, the tangent of a cotangent `_bar_dot`: `p_bar_dot/NAME` is this block's part of Hv.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.fx as fx
from torch import Tensor
from torch.func import functionalize, jvp, vjp
from torch.fx.experimental.proxy_tensor import make_fx

aten = torch.ops.aten

Env = dict[str, Tensor]
#: (parameters, differentiable inputs, constants) -> outputs, by name.
Traceable = Callable[[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]], dict[str, Tensor]]


@final
@dataclass(frozen=True, order=True)
class Stage:
    """When a line can run: after the inputs of `time`, and of their tangents if `dotted`."""

    time: int
    dotted: bool


_TIMES = {"x": 0, "p": 0, "c": 0, "o": 1, "y_bar": 2, "q_bar": 3, "k_bar": 3, "v_bar": 3}

PRIMAL = tuple(Stage(time, False) for time in range(4))
TANGENT = tuple(Stage(time, True) for time in range(4))


def _stage_of_input(name: str) -> Stage:
    base = name.split("/")[0]
    return Stage(_TIMES[base.removesuffix("_dot")], base.endswith("_dot"))


@final
class Trace:
    """The joint program of a block and its derivatives.

    Args:
        f: The block on named tensors. Its outputs are `y`, and `q`, `k`, `v` if it takes `o`.
        p: Parameters by name; only shapes, dtypes, strides and devices of any argument matter.
        inputs: `x` and, in a block cut at its attention, `o`; none in a block of token ids.
        constants: `c/0` and so on.

    Raises:
        RuntimeError, NotImplementedError, torch errors: f has a line without a second derivative,
            or depends on the values of its arguments.
    """

    def __init__(self, f: Traceable, p: Mapping[str, Tensor], inputs: Env, constants: Env) -> None:
        graph, names, outputs = _joint(f, dict(p), dict(inputs), dict(constants))
        self._graph = graph
        self._inputs = names  # placeholder -> name
        self.outputs = outputs  # name -> node
        self.parameters = tuple(p)
        #: For each derivative of a parameter, the terms whose sum it is.
        self.terms = {
            name: _summands(node) for name, node in outputs.items() if name.startswith("p_bar")
        }
        self._stages: dict[fx.Node, Stage] = {}
        for node in graph.nodes:
            if node in names:
                self._stages[node] = _stage_of_input(names[node])
                continue
            before = [self._stages[each] for each in node.all_input_nodes]
            self._stages[node] = Stage(
                max((stage.time for stage in before), default=0),
                any(stage.dotted for stage in before),
            )

    def text(self) -> str:
        """The program: blocks of one text are one block."""
        return str(self._graph)

    @property
    def nodes(self) -> Iterable[fx.Node]:
        """Its lines, in order."""
        return self._graph.nodes

    def stage(self, node: fx.Node) -> Stage:
        """The stage of a line."""
        return self._stages[node]

    def input_name(self, node: fx.Node) -> str | None:
        """The name of an argument, None for a computed line."""
        return self._inputs.get(node)


# The joint program -------------------------------------------------------------------------------


def _joint(
    f: Traceable, p: Env, inputs: Env, constants: Env
) -> tuple[fx.Graph, dict[fx.Node, str], dict[str, fx.Node]]:
    """Trace f, its jvp, its vjp and the jvp of its vjp."""
    with torch.no_grad():
        likes = f(p, inputs, constants)
    y = {name: torch.empty_like(each) for name, each in likes.items()}
    arguments = _flat("p", p) | inputs | constants
    arguments |= {_dotted(name): each for name, each in arguments.items() if name in inputs}
    arguments |= {f"p_dot/{name}": each for name, each in p.items()}
    bars = {f"{name}_bar": each for name, each in y.items()}
    arguments |= bars | {_dotted(name): each for name, each in bars.items()}
    names = tuple(arguments)
    results: list[str] = []

    def joint(*flat: Tensor) -> tuple[Tensor, ...]:
        env = dict(zip(names, flat, strict=True))
        held = {name: env[name] for name in constants}
        at = ({name: env[f"p/{name}"] for name in p}, {name: env[name] for name in inputs})
        along = (
            {name: env[f"p_dot/{name}"] for name in p},
            {name: env[_dotted(name)] for name in inputs},
        )
        y_bar = {name: env[f"{name}_bar"] for name in y}
        y_bar_dot = {name: env[_dotted(f"{name}_bar")] for name in y}

        def pull(p: Env, inputs: Env, y_bar: Env) -> tuple[Env, tuple[Env, Env]]:
            value, pullback = vjp(lambda p, inputs: f(p, inputs, held), p, inputs)
            return value, pullback(y_bar)

        (value, (p_bar, x_bar)), (value_dot, (p_bar_dot, x_bar_dot)) = jvp(
            pull, (*at, y_bar), (*along, y_bar_dot)
        )
        found = (
            value
            | {f"{name}_dot": each for name, each in value_dot.items()}
            | {f"{name}_bar": each for name, each in x_bar.items()}
            | {f"{name}_bar_dot": each for name, each in x_bar_dot.items()}
            | _flat("p_bar", p_bar)
            | _flat("p_bar_dot", p_bar_dot)
        )
        results.extend(found)
        return tuple(found.values())

    graph = trace_graph(joint, list(arguments.values()))
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    outputs = next(node for node in graph.nodes if node.op == "output").args[0]
    named = dict(zip(placeholders, names, strict=True))
    return graph, named, dict(zip(results, outputs, strict=True))


def trace_graph(f: Callable[..., Any], arguments: Sequence[Tensor]) -> fx.Graph:
    """The lines of f on tensors like these, cleaned of what does nothing."""
    module = make_fx(
        functionalize(f, remove="mutations"), tracing_mode="fake", _allow_non_fake_inputs=False
    )(*[torch.empty_like(each) for each in arguments])  # one tensor given twice is one value
    graph: fx.Graph = module.graph
    if any(node.op == "get_attr" for node in graph.nodes):
        raise RuntimeError("the block computes with a tensor that is not among its arguments")
    _clean(graph)
    return graph


_IDENTITIES = {aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default}


def _clean(graph: fx.Graph) -> None:
    """Drop lines that change nothing, lines twice there, and lines that nobody reads."""
    seen: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is aten._efficientzerotensor.default:
            node.target = aten.zeros.default
        same = _same_as(node)
        if same is None:
            key = (node.target, _frozen(node.args), _frozen(node.kwargs))
            same = seen.setdefault(key, node)
        if same is not node:
            node.replace_all_uses_with(same)
            graph.erase_node(node)
    graph.eliminate_dead_code()
    graph.lint()


def _frozen(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(_frozen(each) for each in value)
    if isinstance(value, dict):
        return tuple((key, _frozen(each)) for key, each in value.items())
    # 1, 1.0 and True are equal and not the same argument.
    return (type(value), value)


def _same_as(node: fx.Node) -> fx.Node | None:
    """The argument that a line only passes on."""
    first = node.args[0] if node.args else None
    if not isinstance(first, fx.Node):
        return None
    if node.target in _IDENTITIES:
        return first
    if node.target is aten.pow.Tensor_Scalar and node.args[1] == 1:
        return first
    if node.target is aten.mul.Scalar and node.args[1] == 1 and _alike(node, first):
        return first
    if node.target in (aten.expand.default, aten._to_copy.default, aten.view.default):
        quiet = "memory_format" not in node.kwargs
        return first if quiet and _alike(node, first) else None
    return None


def _alike(node: fx.Node, other: fx.Node) -> bool:
    a, b = node.meta.get("val"), other.meta.get("val")
    return (
        isinstance(a, Tensor)
        and isinstance(b, Tensor)
        and (a.shape, a.dtype, a.stride(), a.device) == (b.shape, b.dtype, b.stride(), b.device)
    )


def _flat(prefix: str, values: Mapping[str, Tensor]) -> Env:
    return {f"{prefix}/{name}": each for name, each in values.items()}


def _dotted(name: str) -> str:
    return f"{name}_dot"


# Parameters' derivatives as sums of products ------------------------------------------------------


def _summands(node: fx.Node) -> list[tuple[str, tuple[fx.Node, ...]]]:
    """The derivative of a parameter as terms that can be added to it where it is.

    A matrix's derivative is a sum of products over the tokens. Handed out as operands, they are
    accumulated by the GEMM itself, in the accumulator's precision, and no tensor of the
    parameter's size is made.
    """
    transposed = False
    while node.target is aten.t.default:
        node, transposed = node.args[0], not transposed
    if node.target is aten.add.Tensor and not node.kwargs:
        left, right = node.args
        if _alike(left, right):
            found = _summands(left) + _summands(right)
            if transposed:
                found = [_transposed(each) for each in found]
            if all(kind != "dense" for kind, _ in found):
                return found
    if node.target is aten.mm.default:
        term = ("mm", tuple(node.args))
        return [_transposed(term) if transposed else term]
    if node.target is aten.embedding_dense_backward.default and not transposed:
        grad, ids, _, padding, scaled = node.args
        if padding < 0 and not scaled:
            return [("rows", (ids, grad))]
    return [("dense", (_turn(node) if transposed else node,))]


def _transposed(
    term: tuple[str, tuple[fx.Node, ...]],
) -> tuple[str, tuple[fx.Node, ...]]:
    kind, operands = term
    if kind == "mm":
        left, right = operands
        return kind, (_turn(right), _turn(left))
    return "dense", (_turn(operands[0]),) if kind == "dense" else operands


def _turn(node: fx.Node) -> fx.Node:
    """The transpose of a line, as a line."""
    if node.target is aten.t.default:
        first: fx.Node = node.args[0]
        return first
    with node.graph.inserting_after(node):
        turned = node.graph.call_function(aten.t.default, (node,))
    turned.meta["val"] = node.meta["val"].t()
    return turned
