"""The programs that are traced: blocks with their duals, the last block with a product's rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp, vjp

from hvp_core.autodiff.product_spec import ProductSpec
from hvp_core.autodiff.recorder import Env
from hvp_core.autodiff.trace import Trace, dotted, suffixed
from hvp_core.losses.loss import Loss, at_least_float32
from hvp_core.losses.output_rules import AtOutput

Block = Callable[[Env, Env, Env], Env]  # (parameters, differentiable inputs, constants) -> outputs


def trace_block(f: Block, p: Env, inputs: Env, constants: Env) -> Trace:
    """The trace of a block with its jvp, its vjp and the jvp of its vjp.

    Args:
        f: The block. Its outputs are `y`, and `q/j`, `k/j`, `v/j` for each attention's output
            `o/j` that it takes.
        p: Parameters, by name, that the block is differentiated by.
        inputs: Differentiable inputs: `x` and, in a block cut at its attentions, `o/0` and so on.
        constants: Other values: `w/0`, `c/0` and so on; `x` where that is data, and `o/j` where it
            has no tangent.
    """
    with torch.no_grad():
        y = f(p, inputs, constants)
    cotangents = {suffixed(name, "_bar"): _as_given(name, each) for name, each in y.items()}
    at = _flat("p", p) | inputs
    arguments = at | {dotted(name): each for name, each in at.items()} | constants
    arguments |= cotangents | {dotted(name): each for name, each in cotangents.items()}

    def program(env: Env) -> Env:
        y_bar = {name: env[suffixed(name, "_bar")] for name in y}
        y_bar_dot = {name: env[suffixed(name, "_bar_dot")] for name in y}
        (value, primal), (value_dot, tangent) = _dual_and_back(
            f, p, inputs, constants, env, y_bar, y_bar_dot
        )
        found = value | {dotted(name): each for name, each in value_dot.items()}
        return found | _named("bar", primal) | _named("bar_dot", tangent)

    return Trace(program, arguments)


def trace_value(f: Block, constants: Env) -> Trace:
    """The trace of a block in which nothing has a derivative: its outputs alone.

    Args:
        f: The block.
        constants: All values that the block computes with: `x` too and, in a block cut at its
            attentions, `o/0` and so on.
    """
    return Trace(lambda env: f({}, {}, env), constants)


def trace_head(
    f: Block, loss: Loss, spec: ProductSpec, p: Env, inputs: Env, constants: Env
) -> Trace:
    """The trace of the last block with a product's rules at its output; all is of time 0.

    The outputs are named as those of any block: `x_bar` and `p_bar` are what the product's
    cotangent pulls back to, or the primal half of a pair, whose tangents are `x_bar_dot` and
    `p_bar_dot`. `measure` is what the product measures.

    Args:
        f: The block.
        loss: A sum over targets.
        spec: The product. What it is given has the name `given_dot`: like a tangent, it differs
            from probe to probe.
        p: Parameters, by name, that the block is differentiated by.
        inputs: `x`; nothing where that is data, as where the whole model is one block.
        constants: The block's constants, `c/target`, and `c/scale`, which the cotangents are
            multiplied by.
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
    """A tensor laid out as the value's cotangent will be: q, k, v as (b, s, h, d), y contiguous."""
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
    """(y, (p̄, x̄)) of a block, and the tangents of these."""
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
    found = {suffixed(name, f"_{suffix}"): each for name, each in x_bar.items()}
    return found | _flat(f"p_{suffix}", p_bar)


def _flat(prefix: str, values: Mapping[str, Tensor]) -> Env:
    return {f"{prefix}/{name}": each for name, each in values.items()}
