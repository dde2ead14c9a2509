"""A block's value, tangent and second derivative, by torch's own transformations.

For a block y = f(p, x), with v the tangent of p, one Hessian-vector product needs

    forward    (y, ẏ) = (f(p, x), ∂f·(v, ẋ))
    backward   (x̄, x̄̇, Hv) from the cotangent pair (ȳ, ȳ̇)

The backward dual is the derivative of ȳ ↦ (∂f)ᵀȳ along (v, ẋ, ȳ̇): the jvp of the vjp, in which
torch differentiates forward only what it differentiates backward already. (The other order, a
gradient through a recorded forward dual, meets forward rules that raise under a gradient, as
softmax's does, or are silently wrong, as that of the fused layer norm is in torch 2.11 to 2.13.)

Nothing is kept between forward and backward, and matrix products that only a gradient would need
are formed on the way. `trace` writes the same derivation out as a program and does neither; this
is the truth that traces are compared with, and what serves blocks that cannot be traced.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import jvp, vjp

Params = Mapping[str, Tensor]
Function = Callable[[Params, Tensor], Tensor]
PairOfCotangents = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Backward(NamedTuple):
    """The derivatives that a backward dual gives."""

    x_bar: Tensor | None  # x̄, like x; None where x has no tangent (data, token ids)
    x_bar_dot: Tensor | None  # x̄̇, like x
    p_bar: dict[str, Tensor]  # Hv, or the gradient, like p


def held(f: Function, p: Params, selected: Collection[str]) -> tuple[Function, Params]:
    """A block as a function of its selected parameters; the others are constants.

    Args:
        f: The block.
        p: All of its parameters, by name.
        selected: Names of the selected parameters.

    Returns:
        The function, and the selected parameters.
    """
    constants = {name: value for name, value in p.items() if name not in selected}
    if not constants:
        return f, p
    moving = {name: value for name, value in p.items() if name in selected}
    return lambda moving, x: f({**constants, **moving}, x), moving


def forward_dual(
    f: Function, p: Params, v: Params, x: Tensor, x_dot: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(y, ẏ) of one block; nothing is kept. Cost: 3 GEMM passes."""
    if x_dot is None:
        if not p:  # of data alone
            y = f(p, x)
            return y, torch.zeros_like(y)
        return value_and_tangent(lambda p: f(p, x), (dict(p),), (dict(v),))
    return value_and_tangent(f, (dict(p), x), (dict(v), x_dot))


def value_and_tangent(
    f: Callable[..., Any], at: tuple[Any, ...], along: tuple[Any, ...]
) -> tuple[Any, Any]:
    """(f, ḟ): a function's value at a point, and its derivative along a direction there."""
    found: Any = jvp(f, at, along)
    return found[0], found[1]


def pull_back(f: Function, p: Params, x: Tensor, y_bar: Callable[[Tensor], Tensor]) -> Backward:
    """The gradient of one block alone: (x̄, p̄). Cost: 3 GEMM passes.

    Args:
        f: The block.
        p: Parameters of the block.
        x: Input of the block.
        y_bar: Gives the cotangent of y once y is known.
    """
    with torch.enable_grad():
        if not x.is_floating_point():
            if not p:  # of data alone
                return Backward(None, None, {})
            y, pull = vjp(lambda p: f(p, x), dict(p))[:2]
            return Backward(None, None, pull(y_bar(y))[0])
        y, pull = vjp(f, dict(p), x)[:2]
        p_bar, x_bar = pull(y_bar(y))
    return Backward(x_bar, None, p_bar)


def backward_dual(
    f: Function,
    p: Params,
    v: Params,
    x: Tensor,
    x_dot: Tensor | None,
    cotangents: PairOfCotangents,
) -> Backward:
    """(x̄, x̄̇, Hv) of one block, recomputing its forward dual. Cost: 3 + 9 GEMM passes.

    Args:
        f: The block.
        p: Parameters of the block.
        v: Tangent of the parameters.
        x: Input of the block.
        x_dot: Tangent of the input; None for data, which has none and gets no cotangent.
        cotangents: Gives (ȳ, ȳ̇) once (y, ẏ) is known.

    Raises:
        RuntimeError: An operation has no second derivative.
    """
    y_bar, y_bar_dot = cotangents(*forward_dual(f, p, v, x, x_dot))
    p, v = dict(p), dict(v)
    if x_dot is None and not p:
        return Backward(None, None, {})
    # Without grad mode torch picks fused backward kernels, some of which have no derivative.
    with torch.enable_grad():
        if x_dot is None:

            def pull_parameters(p: dict[str, Tensor], y_bar: Tensor) -> dict[str, Tensor]:
                gradient: dict[str, Tensor] = vjp(lambda q: f(q, x), p)[1](y_bar)[0]
                return gradient

            return Backward(
                None, None, value_and_tangent(pull_parameters, (p, y_bar), (v, y_bar_dot))[1]
            )

        def pull(
            p: dict[str, Tensor], x: Tensor, y_bar: Tensor
        ) -> tuple[Tensor, dict[str, Tensor]]:
            p_bar, x_bar = vjp(f, p, x)[1](y_bar)
            return x_bar, p_bar

        primal, (x_bar_dot, hvp) = value_and_tangent(pull, (p, x, y_bar), (v, x_dot, y_bar_dot))
    x_bar = primal[0]
    return Backward(x_bar, x_bar_dot, hvp)
