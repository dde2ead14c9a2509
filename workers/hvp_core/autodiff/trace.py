"""A block's derivatives as one straight-line program of tensors.

The forward-over-reverse dual of a block is traced once for each shape. Every line of the trace then
belongs to a *stage*, found from what it depends on:

    0  p, x                     0' v, ẋ               the block up to its attention
    1  o                        1' ȯ                  the block behind it
    2  ȳ                        2' ȳ̇                  back to the attention
    3  q̄, k̄, v̄                  3' their tangents     back to x and p

A stage without prime does not depend on any tangent, so in a Krylov run it is the same for every
product. Every schedule is a grouping of these stages (`parts.split`): what one group has
computed and a later one needs is kept, except for pointwise work, which is cheaper to do again than
to load. Stages 1 and 3 are empty in a block without attention.

Values have names, the same everywhere in this package: `x`, `o`, `q`, `k`, `v`, `y`; parameters
`p/NAME`; those that are constants `w/NAME`, other constants `c/0`...; a tangent has `_dot` appended
to the part before the slash, a cotangent `_bar`, the tangent of a cotangent `_bar_dot`:
`p_bar_dot/NAME` is a block's part of Hv.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.fx as fx
from torch import Tensor
from torch.func import functionalize, jvp, vjp
from torch.fx.experimental.proxy_tensor import make_fx

from hvp_core.autodiff.product_spec import ProductSpec
from hvp_core.autodiff.products import merge_sums
from hvp_core.autodiff.terms import alike, sums_behind, terms_of
from hvp_core.autodiff.zeros import drop_zeros
from hvp_core.losses.loss import Loss, at_least_float32
from hvp_core.losses.output_rules import AtOutput

aten = torch.ops.aten

Env = dict[str, Tensor]
Program = Callable[[Env], Env]
Block = Callable[[Env, Env, Env], Env]  # (parameters, differentiable inputs, constants) -> outputs


@final
@dataclass(frozen=True, order=True)
class Stage:
    """When a line can run: after the inputs of `time`, and of their tangents if `dotted`."""

    time: int
    dotted: bool


_TIMES = {
    "x": 0,
    "p": 0,
    "w": 0,
    "c": 0,
    "given": 0,
    "o": 1,
    "y_bar": 2,
    "q_bar": 3,
    "k_bar": 3,
    "v_bar": 3,
}

PRIMAL = tuple(Stage(time, False) for time in range(4))
TANGENT = tuple(Stage(time, True) for time in range(4))


def _stage_of_input(name: str) -> Stage:
    base = name.partition("/")[0]
    return Stage(_TIMES[base.removesuffix("_dot")], base.endswith("_dot"))


@final
class Trace:
    """A program of named values, with the stage of every line.

    Args:
        program: Tensors by name -> tensors by name.
        arguments: Only shapes, dtypes, strides and devices matter.

    Raises:
        RuntimeError, NotImplementedError, torch errors: a line has no derivative that is asked for,
            or depends on the values of the arguments.
    """

    def __init__(self, program: Program, arguments: Env):
        self._graph, names = trace_graph(program, arguments)
        placeholders = [node for node in self._graph.nodes if node.op == "placeholder"]
        self._inputs = dict(zip(placeholders, arguments, strict=True))
        self.arguments = dict(zip(arguments, placeholders, strict=True))
        output = next(node for node in self._graph.nodes if node.op == "output")
        derivatives = [
            node for name, node in zip(names, output.args[0], strict=True) if is_parameters(name)
        ]
        stages = self._find_stages()
        merge_sums(self._graph, sums_behind(derivatives), lambda a, b: stages[a] == stages[b])
        self.outputs: dict[str, fx.Node] = dict(zip(names, output.args[0], strict=True))
        #: For each derivative of a parameter, the terms whose sum it is.
        self.terms = {
            name: terms_of(node) for name, node in self.outputs.items() if is_parameters(name)
        }
        self._stages = self._find_stages()

    def _find_stages(self) -> dict[fx.Node, Stage]:
        found: dict[fx.Node, Stage] = {}
        for node in self._graph.nodes:
            if node in self._inputs:
                found[node] = _stage_of_input(self._inputs[node])
                continue
            before = [found[each] for each in node.all_input_nodes]
            found[node] = Stage(
                max((stage.time for stage in before), default=0),
                any(stage.dotted for stage in before),
            )
        return found

    def time_of(self, name: str) -> int:
        """When an output is known."""
        nodes = [self.outputs[name]]
        if name in self.terms:
            nodes = [node for _, operands in self.terms[name] for node in operands]
        return max(self._stages[node].time for node in nodes)

    def is_dotted(self, line: str) -> bool:
        """Whether a line, by its own name, depends on a tangent."""
        return next(stage.dotted for node, stage in self._stages.items() if node.name == line)

    @property
    def argument_bytes(self) -> dict[str, int]:
        """Size of each argument."""
        return {name: node.meta["val"].nbytes for name, node in self.arguments.items()}

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


# What is traced -----------------------------------------------------------------------------------


def trace_block(f: Block, p: Env, inputs: Env, constants: Env) -> Trace:
    """The trace of a block with its jvp, its vjp and the jvp of its vjp.

    Args:
        f: The block. Its outputs are `y`, and `q`, `k`, `v` if it takes `o`.
        p: Parameters by name, those that it is differentiated by.
        inputs: `x` and, in a block cut at its attention, `o`.
        constants: `w/0`, `c/0` and so on; `x` where that is data, and `o` where it has no tangent.
    """
    with torch.no_grad():
        y = f(p, inputs, constants)
    bars = {f"{name}_bar": _as_given(name, each) for name, each in y.items()}
    at = _flat("p", p) | inputs
    arguments = at | {dotted(name): each for name, each in at.items()} | constants
    arguments |= bars | {dotted(name): each for name, each in bars.items()}

    def program(env: Env) -> Env:
        y_bar = {name: env[f"{name}_bar"] for name in y}
        y_bar_dot = {name: env[f"{name}_bar_dot"] for name in y}
        (value, primal), (value_dot, tangent) = _dual_and_back(
            f, p, inputs, constants, env, y_bar, y_bar_dot
        )
        found = value | {f"{name}_dot": each for name, each in value_dot.items()}
        return found | _named("bar", primal) | _named("bar_dot", tangent)

    return Trace(program, arguments)


def trace_value(f: Block, constants: Env) -> Trace:
    """The trace of a block in which nothing has a derivative: its outputs alone.

    Args:
        f: The block.
        constants: All that it computes with: `x` too and, in a block cut at its attention, `o`.
    """
    return Trace(lambda env: f({}, {}, env), constants)


def trace_closing(
    f: Block, loss: Loss, spec: ProductSpec, p: Env, inputs: Env, constants: Env
) -> Trace:
    """The trace of the last block with what a product does at its output; all is of stage 0.

    Its outputs are named as those of any block: `x_bar` and `p_bar` are what the product's
    cotangent pulls back to, or the primal half of a pair, whose tangents are `x_bar_dot` and
    `p_bar_dot`. `measure` is what the product measures.

    Args:
        f: The block.
        loss: A sum over targets.
        spec: The product. What it is given is `given_dot`: like a tangent, it is another one for
            each probe.
        p: Parameters by name.
        inputs: `x`, or nothing where the whole model is one block.
        constants: The block's, `c/target`, and `c/scale`: what the sum is multiplied by.
    """
    at = _flat("p", p) | inputs
    arguments = at | {dotted(name): each for name, each in at.items()} | constants
    if spec.given == "rows":
        target = constants["c/target"]
        arguments["given_dot"] = target.new_empty(len(target), dtype=torch.float64)
    if spec.given == "outputs":
        with torch.no_grad():
            arguments["given_dot"] = f(p, inputs, constants)["y"].contiguous()

    def program(env: Env) -> Env:
        value, value_dot = _dual(f, p, inputs, constants, env)
        y, y_dot = at_least_float32(value["y"]), at_least_float32(value_dot["y"])
        at_output = AtOutput(loss, y, y_dot, env["c/target"], env.get("given_dot"))
        measured = {} if spec.measure is None else {"measure": spec.measure(at_output)}
        return measured | ({} if spec.cotangents is None else back(env, value["y"], at_output))

    def back(env: Env, y: Tensor, at_output: AtOutput) -> Env:
        assert spec.cotangents is not None
        y_bar, *y_bar_dot = (
            {"y": (each * env["c/scale"]).to(y.dtype)} for each in spec.cotangents(at_output)
        )
        if spec.passes.backward == "cotangent":
            _, pullback = _vjp(f, p, inputs, constants, env)
            return _named("bar", pullback(y_bar))
        (_, primal), (_, tangent) = _dual_and_back(
            f, p, inputs, constants, env, y_bar, y_bar_dot[0]
        )
        return _named("bar", primal) | _named("bar_dot", tangent)

    return Trace(program, arguments)


def _as_given(name: str, value: Tensor) -> Tensor:
    """Laid out as whoever computes its cotangent does: q, k, v as (b, s, h, d), y plainly."""
    if name == "y":
        return torch.empty_like(value, memory_format=torch.contiguous_format)
    return torch.empty_like(value.transpose(1, 2), memory_format=torch.contiguous_format).transpose(
        1, 2
    )


def _at(env: Env, p: Env, inputs: Env) -> tuple[Env, Env]:
    return {name: env[f"p/{name}"] for name in p}, {name: env[name] for name in inputs}


def _along(env: Env, p: Env, inputs: Env) -> tuple[Env, Env]:
    return {name: env[f"p_dot/{name}"] for name in p}, {name: env[dotted(name)] for name in inputs}


def _dual(f: Block, p: Env, inputs: Env, constants: Env, env: Env) -> tuple[Env, Env]:
    held = {name: env[name] for name in constants}
    y, y_dot = jvp(
        lambda p, inputs: f(p, inputs, held), _at(env, p, inputs), _along(env, p, inputs)
    )[:2]
    return y, y_dot


def _vjp(f: Block, p: Env, inputs: Env, constants: Env, env: Env) -> Any:
    held = {name: env[name] for name in constants}
    return vjp(lambda p, inputs: f(p, inputs, held), *_at(env, p, inputs))


def _dual_and_back(
    f: Block, p: Env, inputs: Env, constants: Env, env: Env, y_bar: Env, y_bar_dot: Env
) -> tuple[tuple[Env, tuple[Env, Env]], tuple[Env, tuple[Env, Env]]]:
    """(y, (p̄, x̄)), and their tangents."""
    held = {name: env[name] for name in constants}

    def there_and_back(p: Env, inputs: Env, y_bar: Env) -> Any:
        y, pullback = vjp(lambda p, inputs: f(p, inputs, held), p, inputs)[:2]
        return y, pullback(y_bar)

    primal, tangent = jvp(
        there_and_back, (*_at(env, p, inputs), y_bar), (*_along(env, p, inputs), y_bar_dot)
    )[:2]
    return primal, tangent


def _named(suffix: str, cotangents: tuple[Env, Env]) -> Env:
    p_bar, x_bar = cotangents
    return {f"{name}_{suffix}": each for name, each in x_bar.items()} | _flat(f"p_{suffix}", p_bar)


def _flat(prefix: str, values: Mapping[str, Tensor]) -> Env:
    return {f"{prefix}/{name}": each for name, each in values.items()}


def dotted(name: str) -> str:
    """The name of a tangent."""
    base, slash, rest = name.partition("/")
    return f"{base}_dot{slash}{rest}"


def is_parameters(name: str) -> bool:
    """Whether an output is a derivative with respect to a parameter."""
    return name.startswith("p_bar")


# Tracing ------------------------------------------------------------------------------------------


def trace_graph(program: Program, arguments: Env) -> tuple[fx.Graph, list[str]]:
    """The lines of a program on tensors like these, cleaned of what does nothing.

    Returns:
        The graph, its placeholders in the order of the arguments, and the names of its outputs.
    """
    names: list[str] = []

    def positional(*values: Tensor) -> tuple[Tensor, ...]:
        found = program(dict(zip(arguments, values, strict=True)))
        names[:] = found
        return tuple(found.values())

    # Without grad mode torch picks fused backward kernels, some of which have no derivative.
    with torch.enable_grad():
        module = make_fx(functionalize(positional, remove="mutations"), tracing_mode="fake")(
            # New tensors: one given twice would be one value.
            *[torch.empty_like(each) for each in arguments.values()]
        )
    graph: fx.Graph = module.graph
    _clean(graph)
    if any(node.op == "get_attr" for node in graph.nodes):
        raise RuntimeError("the block computes with a tensor that is not among its arguments")
    for node in graph.nodes:
        _refuse_mixed(node)
    return graph, names


def _refuse_mixed(node: fx.Node) -> None:
    """Tensors without values let pass what real ones would not: 16 bits times 32, for one."""
    values = [each.meta.get("val") for each in node.all_input_nodes]
    dtypes = {
        each.dtype for each in values if isinstance(each, Tensor) and each.is_floating_point()
    }
    mixed = len(dtypes) > 1 and min(each.itemsize for each in dtypes) < 4
    if node.op != "call_function" or not mixed or node.target is aten.cat.default:
        return
    if torch.Tag.pointwise not in getattr(node.target, "tags", ()):
        raise RuntimeError(f"{node.target} is given operands of several types")


_IDENTITIES = {aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default}


def _clean(graph: fx.Graph) -> None:
    """Drop lines of zeros, that change nothing, that are twice there, or that nobody reads."""
    drop_zeros(graph)
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
    if node.target is aten.mul.Scalar and node.args[1] == 1 and alike(node, first):
        return first
    if node.target in (aten.expand.default, aten._to_copy.default, aten.view.default):
        quiet = "memory_format" not in node.kwargs
        return first if quiet and alike(node, first) else None
    return None
