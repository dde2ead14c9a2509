"""The interface and the formulas of an attention with its own dual rule.

Per head, with scale τ, S = τQKᵀ (capped, masked), P = softmax(S), L = logsumexp(S):

    O = PV          Ṗ = P∘(Ṡ − L̇)        L̇ = Σ_j P∘Ṡ        Ȯ = ṖV + PV̇
    dP = dO Vᵀ      D = Σ dO∘O            dS = P∘(dP − D)
    dQ = τ dS K     dK = τ dSᵀ Q          dV = Pᵀ dO
    ḋP = ḋO Vᵀ + dO V̇ᵀ                   Ḋ = Σ (ḋO∘O + dO∘Ȯ)
    ḋS = Ṗ∘(dP − D) + P∘(ḋP − Ḋ)
    ḋQ = τ(ḋS K + dS K̇)     ḋK = τ(ḋSᵀ Q + dSᵀ Q̇)     ḋV = Ṗᵀ dO + Pᵀ ḋO

Nothing of size S×S is kept: each tile of S is computed again from Q, K and L where it is needed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, final

from torch import Tensor


@final
@dataclass(frozen=True, kw_only=True)
class Pattern:
    """The part of a mask, and of the scores, that is the same for every row of a batch.

    Attributes:
        scale: τ.
        causal: Query i looks at keys j ≤ i + (t − s): both sequences end together.
        window: Query i looks only at keys j > i + (t − s) − window; None for all.
        softcap: c of c·tanh(τQKᵀ/c); None for none.
    """

    scale: float
    causal: bool
    window: int | None = None
    softcap: float | None = None


class Span(NamedTuple):
    """Keys start ≤ j < stop of each row of a batch exist; the others are padding."""

    start: Tensor  # (b,) int32
    stop: Tensor  # (b,) int32


class Qkv(NamedTuple):
    """Query (b, h, s, d), key (b, h/g, t, d) and value (b, h/g, t, e), or a tangent of the three.

    Any strides, as long as the last dimension is contiguous.
    """

    q: Tensor
    k: Tensor
    v: Tensor


class Output(NamedTuple):
    """O (b, h, s, e) and L (b, h, s), or their tangents.

    L is a natural logarithm, in float32 (float64 for float64 inputs). A query that may look nowhere
    has O = 0, L = −∞ and no derivative.
    """

    o: Tensor
    lse: Tensor


class Point(NamedTuple):
    """The point at which a backward pass is taken, or the tangent of that point in a direction.

    Attributes:
        x: Query, key and value.
        y: Output that `forward` gave for them.
        o_bar: Cotangent of O, shaped as O.
    """

    x: Qkv
    y: Output
    o_bar: Tensor


class Attention(ABC):
    """First derivatives and their tangents of one attention, on plain tensors without autograd.

    Laws: `dual` equals (`forward`, `tangents`); `backward_dual` equals (`backward`,
    `backward_tangents`); tangents of several directions equal those of each; all equal forward over
    reverse through the formula above.

    Memory: outputs, and O(s) or a bounded number of tiles besides.

    Attributes:
        together: Number of directions whose tangents share work; more at once save nothing.
    """

    together: int

    @abstractmethod
    def supports(self, x: Qkv, pattern: Pattern, span: Span | None) -> str | None:
        """None if this attention is supported, else why not, in words after "attention …"."""

    @abstractmethod
    def forward(self, x: Qkv, pattern: Pattern, span: Span | None) -> Output:
        """(O, L). Cost: 2 tile products."""

    @abstractmethod
    def tangents(
        self, x: Qkv, x_dots: Sequence[Qkv], y: Output, pattern: Pattern, span: Span | None
    ) -> list[Output]:
        """(Ȯ, L̇) along each direction, given (O, L). Cost: 1 tile product, and 4 for each."""

    @abstractmethod
    def dual(
        self, x: Qkv, x_dot: Qkv, pattern: Pattern, span: Span | None
    ) -> tuple[Output, Output]:
        """((O, L), (Ȯ, L̇)). Cost: 6 tile products."""

    @abstractmethod
    def backward(self, at: Point, pattern: Pattern, span: Span | None) -> Qkv:
        """(dQ, dK, dV). Cost: 5 tile products, 7 in two kernels."""

    @abstractmethod
    def backward_tangents(
        self, at: Point, dots: Sequence[Point], pattern: Pattern, span: Span | None
    ) -> list[Qkv]:
        """(ḋQ, ḋK, ḋV) alone, along each direction.

        Cost: 2 tile products, and 10 for each; 4 and 14 in two kernels.
        """

    @abstractmethod
    def backward_dual(
        self, at: Point, dot: Point, pattern: Pattern, span: Span | None
    ) -> tuple[Qkv, Qkv]:
        """((dQ, dK, dV), (ḋQ, ḋK, ḋV)). Cost: 15 tile products, 21 in two kernels."""
