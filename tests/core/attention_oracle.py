"""Attention and its derivatives by automatic differentiation of the definition: O(S²) memory.

Nothing here shares code or algebra with the package: masks are built key by key, softmax is
torch's, first derivatives are its reverse mode, and their tangents its forward mode over that.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from hvp_core.attention.rule import Pattern, Qkv, Span
from torch import Tensor


class Derivatives(NamedTuple):
    """What every method of an attention rule returns, for one input."""

    o: Tensor
    lse: Tensor
    o_dot: Tensor
    lse_dot: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor
    dq_dot: Tensor
    dk_dot: Tensor
    dv_dot: Tensor


def visible(shape: tuple[int, int, int], pattern: Pattern, span: Span | None) -> Tensor:
    """Boolean (b, s, t): where a query may look; shape is (b, s, t)."""
    rows, queries, keys = shape
    i = torch.arange(queries).view(1, -1, 1) + (keys - queries)
    j = torch.arange(keys).view(1, 1, -1)
    mask = torch.ones(rows, queries, keys, dtype=torch.bool)
    if pattern.causal:
        mask &= j <= i
    if pattern.window is not None:
        mask &= j > i - pattern.window
    if span is not None:
        mask &= (j >= span.start.cpu().view(-1, 1, 1)) & (j < span.stop.cpu().view(-1, 1, 1))
    return mask


def dense(x: Qkv, pattern: Pattern, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(O, L) in the inputs' dtype; differentiable any number of times."""
    group = x.q.shape[1] // x.k.shape[1]
    k, v = (part.repeat_interleave(group, dim=1) for part in (x.k, x.v))
    scores = torch.einsum("bhid,bhjd->bhij", x.q, k) * pattern.scale
    if pattern.softcap is not None:
        scores = pattern.softcap * torch.tanh(scores / pattern.softcap)
    mask = mask.unsqueeze(1)
    empty = ~mask.any(-1, keepdim=True)
    # An empty row looks everywhere first, so that no derivative is a difference of infinities.
    scores = scores.masked_fill(~(mask | empty), -torch.inf)
    weights = torch.softmax(scores, -1).masked_fill(empty, 0)
    lse = torch.logsumexp(scores, -1).masked_fill(empty.squeeze(-1), -torch.inf)
    return torch.einsum("bhij,bhje->bhie", weights, v), lse


def oracle(
    x: Qkv, x_dot: Qkv, o_bar: Tensor, o_bar_dot: Tensor, pattern: Pattern, span: Span | None
) -> Derivatives:
    """Every output of every method, in float64 on the CPU, whatever the inputs are."""
    x, x_dot = (Qkv(*(part.detach().cpu().double() for part in point)) for point in (x, x_dot))
    o_bar, o_bar_dot = o_bar.detach().cpu().double(), o_bar_dot.detach().cpu().double()
    mask = visible((x.q.shape[0], x.q.shape[2], x.k.shape[2]), pattern, span)

    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return dense(Qkv(q, k, v), pattern, mask)

    def backward(q: Tensor, k: Tensor, v: Tensor, bar: Tensor) -> tuple[Tensor, ...]:
        pull_back = torch.func.vjp(lambda *point: forward(*point)[0], q, k, v)[1]
        return pull_back(bar)

    (o, lse), (o_dot, lse_dot) = torch.func.jvp(forward, tuple(x), tuple(x_dot))[:2]
    first, second = torch.func.jvp(backward, (*x, o_bar), (*x_dot, o_bar_dot))[:2]
    return Derivatives(o, lse, o_dot, lse_dot, *first, *second)
