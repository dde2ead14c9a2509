"""A block's value, tangent and second derivative.

For a block y = f(p, x), with v the tangent of p, one Hessian-vector product needs

    forward    (y, ẏ) = (f(p, x), ∂f·(v, ẋ))
    backward   (x̄, x̄̇, Hv) from the cotangent pair (ȳ, ȳ̇)

The backward dual is the derivative of ȳ ↦ (∂f)ᵀȳ along (v, ẋ, ȳ̇). There are two ways to it.
*Reverse over forward* is the gradient of ȳ̇·y + ȳ·ẏ, taken through the recorded forward dual: its
part in x is x̄̇, in ẋ is x̄, in p is Hv. It costs 8 GEMM passes and forms no gradient of p on the
way. *Forward over reverse* is the jvp of the vjp, 9 passes; it also serves operations whose forward
rules torch cannot differentiate again (softmax and its kin).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from enum import Enum
from typing import NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.func import jvp, vjp

Params = Mapping[str, Tensor]
Function = Callable[[Params, Tensor], Tensor]


class Rule(Enum):
    """How a block's backward dual is taken."""

    REVERSE_OVER_FORWARD = "reverse over forward"
    FORWARD_OVER_REVERSE = "forward over reverse"


class Backward(NamedTuple):
    """What a backward dual gives."""

    x_bar: Tensor | None  # x̄, like x; None where x is not a float tensor (token ids)
    x_bar_dot: Tensor | None  # x̄̇, like x
    hvp: dict[str, Tensor]  # Hv, like p


def _or_zeros(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if gradient is None else gradient


def _dual_outputs(
    f: Function, p: Params, v: Params, x: Tensor, x_dot: Tensor | None
) -> tuple[Tensor, Tensor]:
    with forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(p[name], v[name]) for name in p}
        y = f(duals, x if x_dot is None else forward_ad.make_dual(x, x_dot))
        primal, tangent = forward_ad.unpack_dual(y)
        return primal, torch.zeros_like(primal) if tangent is None else tangent


@torch.no_grad()
def forward_dual(
    f: Function, p: Params, v: Params, x: Tensor, x_dot: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(y, ẏ), keeping nothing. Cost: 3 GEMM passes."""
    return _dual_outputs(f, p, v, x, x_dot)


def pull_back(f: Function, p: Params, x: Tensor, y_bar: Callable[[Tensor], Tensor]) -> Backward:
    """The gradient alone: x̄, and p̄ in the place of Hv.

    Args:
        f: The block.
        p: Its parameters.
        x: Its input.
        y_bar: Gives the cotangent of y once y is known. Cost: 3 passes.
    """
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in p.items()}
    differentiable = x.is_floating_point()
    x = x.detach().requires_grad_(differentiable)
    with torch.enable_grad():
        y = f(leaves, x)
    inputs = [*leaves.values(), *([x] if differentiable else [])]
    if not y.requires_grad or not inputs:
        gradients: tuple[Tensor | None, ...] = (None,) * len(inputs)
    else:
        gradients = torch.autograd.grad(y, inputs, y_bar(y.detach()), allow_unused=True)
    found = [_or_zeros(gradient, leaf) for gradient, leaf in zip(gradients, inputs, strict=True)]
    return Backward(
        found[-1] if differentiable else None, None, dict(zip(leaves, found, strict=False))
    )


Cotangents = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def backward_dual(
    rule: Rule,
    f: Function,
    p: Params,
    v: Params,
    x: Tensor,
    x_dot: Tensor | None,
    cotangents: Cotangents,
) -> Backward:
    """(x̄, x̄̇, Hv) of one block, recomputing its forward dual.

    Args:
        rule: Which derivation to use.
        f: The block.
        p: Parameters.
        v: Their tangent.
        x: Input; an integer tensor has no tangent and no cotangent.
        x_dot: Tangent of the input, or None.
        cotangents: Gives (ȳ, ȳ̇) once (y, ẏ) is known.

    Raises:
        RuntimeError: An operation has no derivative that this rule needs.
    """
    if rule is Rule.REVERSE_OVER_FORWARD:
        return _reverse_over_forward(f, p, v, x, x_dot, cotangents)
    return _forward_over_reverse(f, p, v, x, x_dot, cotangents)


def choose_rule(f: Function, p: Params, x: Tensor) -> Rule:
    """The faster rule if it is right for this block.

    Some of torch's forward rules raise when a gradient is taken through them (softmax), others give
    a wrong one without a word (the fused layer norm). So the two derivations, which share no
    formula, are compared tensor by tensor, once for each kind of block, at its own parameters and
    input and along random directions; forward over reverse is the one that is trusted. Cost: 17
    GEMM passes.

    Raises:
        RuntimeError: Forward over reverse fails: the block has no second derivative.
    """
    generator = torch.Generator(x.device).manual_seed(0)

    def random_like(tensor: Tensor) -> Tensor:
        noise = torch.empty_like(tensor).normal_(generator=generator)
        size = torch.linalg.vector_norm(tensor) / max(1, tensor.numel()) ** 0.5
        return noise.mul_(torch.where(size > 0, size, 1))

    # Copies: a tangent that is not laid out like the storage its parameter is a view of makes torch
    # allocate zeros for all of that storage.
    p = {name: tensor.clone() for name, tensor in p.items()}
    v = {name: random_like(tensor) for name, tensor in p.items()}
    x_dot = random_like(x) if x.is_floating_point() else None
    drawn: list[tuple[Tensor, Tensor]] = []

    def cotangents(y: Tensor, y_dot: Tensor) -> tuple[Tensor, Tensor]:
        if not drawn:
            drawn.append((random_like(torch.ones_like(y)), random_like(torch.ones_like(y))))
        return drawn[0]

    trusted = _forward_over_reverse(f, p, v, x, x_dot, cotangents)
    try:
        faster = _reverse_over_forward(f, p, v, x, x_dot, cotangents)
    except RuntimeError:
        return Rule.FORWARD_OVER_REVERSE
    return Rule.REVERSE_OVER_FORWARD if _agree(trusted, faster) else Rule.FORWARD_OVER_REVERSE


def _agree(left: Backward, right: Backward) -> bool:
    """Whether every tensor agrees to rounding: to 1 % in float32, to 3e-11 in float64."""
    pairs = [(left.hvp[name], right.hvp[name]) for name in left.hvp]
    for a, b in ((left.x_bar, right.x_bar), (left.x_bar_dot, right.x_bar_dot)):
        if a is not None and b is not None:
            pairs.append((a, b))
    sizes = [float(torch.linalg.vector_norm(a)) for a, _ in pairs]
    floor = 1e-5 * max(sizes, default=0.0)  # a tensor this small beside the others is rounding
    for (a, b), size in zip(pairs, sizes, strict=True):
        # A wrong rule is wrong in the first digit; a right one loses at most most of the others.
        relative = 1e5 * torch.finfo(a.dtype).eps
        if not _distance(a, b) <= relative * max(size, floor):
            return False
    return True


def _distance(a: Tensor, b: Tensor) -> float:
    """‖a − b‖ without a third tensor of that size."""
    pieces = zip(a.reshape(-1).split(1 << 20), b.reshape(-1).split(1 << 20), strict=True)
    return math.hypot(*(float(torch.linalg.vector_norm(left - right)) for left, right in pieces))


def _reverse_over_forward(
    f: Function, p: Params, v: Params, x: Tensor, x_dot: Tensor | None, cotangents: Cotangents
) -> Backward:
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in p.items()}
    inputs = list(leaves.values())
    if x_dot is not None:
        x, x_dot = x.detach().requires_grad_(), x_dot.detach().requires_grad_()
        inputs += [x, x_dot]
    with torch.enable_grad():
        y, y_dot = _dual_outputs(f, leaves, v, x, x_dot)
    y_bar, y_bar_dot = cotangents(y.detach(), y_dot.detach())
    pairs = [(y, y_bar_dot), (y_dot, y_bar)]
    pairs = [pair for pair in pairs if pair[0].requires_grad]
    gradients: tuple[Tensor | None, ...] = (None,) * len(inputs)
    if pairs and inputs:
        outputs, weights = zip(*pairs, strict=True)
        gradients = torch.autograd.grad(outputs, inputs, weights, allow_unused=True)
    found = [_or_zeros(gradient, leaf) for gradient, leaf in zip(gradients, inputs, strict=True)]
    hvp = dict(zip(leaves, found, strict=False))
    if x_dot is None:
        return Backward(None, None, hvp)
    return Backward(found[-1], found[-2], hvp)


def _forward_over_reverse(
    f: Function, p: Params, v: Params, x: Tensor, x_dot: Tensor | None, cotangents: Cotangents
) -> Backward:
    y_bar, y_bar_dot = cotangents(*forward_dual(f, p, v, x, x_dot))
    p, v = dict(p), dict(v)
    if x_dot is None:

        def pull_parameters(p: dict[str, Tensor], y_bar: Tensor) -> dict[str, Tensor]:
            gradient: dict[str, Tensor] = vjp(lambda q: f(q, x), p)[1](y_bar)[0]
            return gradient

        hvp: dict[str, Tensor] = jvp(pull_parameters, (p, y_bar), (v, y_bar_dot))[1]
        return Backward(None, None, hvp)

    def pull(p: dict[str, Tensor], x: Tensor, y_bar: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        p_bar, x_bar = vjp(f, p, x)[1](y_bar)
        return x_bar, p_bar

    primal, tangent = jvp(pull, (p, x, y_bar), (v, x_dot, y_bar_dot))[:2]
    return Backward(primal[0], tangent[0], tangent[1])
