"""A block taken through a product by torch's own differentiation of it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import final

import torch
from torch import Tensor

from hvp_core.autodiff.executor import (
    BlockExecutor,
    Bytes,
    Cotangents,
    HeadExecutor,
    ParamsAndTangents,
    Residuals,
)
from hvp_core.autodiff.passes import Passes, Retention
from hvp_core.autodiff.product_spec import ProductSpec
from hvp_core.autodiff.reference import (
    Backward,
    Function,
    Params,
    backward_dual,
    forward_dual,
    held,
    pull_back,
)
from hvp_core.autodiff.sums import Accumulator
from hvp_core.losses.loss import Loss, at_least_float32
from hvp_core.losses.output_rules import AtOutput


@final
class EagerExecutor(BlockExecutor):
    """Takes a block through a product by torch's own differentiation of it: always lean.

    Args:
        f: The block.
        selected: Names of the parameters that the block is differentiated by.
    """

    def __init__(self, f: Function, selected: Collection[str]):
        self._f, self._selected = f, selected

    def kept_bytes(self, passes: Passes, num_probes: int) -> Bytes:
        """Zero bytes: the executor keeps nothing that a schedule decides about."""
        return Bytes(0, 0, 0, 0)

    @torch.no_grad()
    def value(self, p: Params, x: Tensor) -> Tensor:
        """The block's output, by its own code."""
        return self._f(p, x)

    def like(self, p: Params, x: Tensor) -> Tensor:
        """The block's output itself. Cost: 1 GEMM pass."""
        return self.value(p, x)

    def forward(
        self,
        passes: Passes,
        way: Retention,
        weights: ParamsAndTangents,
        x: Tensor,
        x_dots: Sequence[Tensor | None],
        kept: Residuals | None,
    ) -> tuple[Tensor, list[Tensor | None], Residuals]:
        """See BlockExecutor: a forward dual for each probe."""
        residuals = Residuals({"x": x})
        if passes.forward == "value":
            return self.value(weights.p, x), [], residuals
        y_dots: list[Tensor | None] = []
        f, p = held(self._f, weights.p, self._selected)
        for v, x_dot in zip(weights.v, x_dots, strict=True):
            y, y_dot = forward_dual(f, p, v, x, x_dot)
            y_dots.append(y_dot)
            residuals.tangents.append({} if x_dot is None else {"x_dot": x_dot})
        return y, y_dots, residuals

    def backward(
        self,
        passes: Passes,
        way: Retention,
        weights: ParamsAndTangents,
        residuals: Residuals,
        cotangents: Cotangents,
        sums: Sequence[Accumulator],
    ) -> Cotangents:
        """See BlockExecutor: a backward dual for each probe, or a plain backward pass."""
        x = residuals.primal["x"]
        f, p = held(self._f, weights.p, self._selected)
        if passes.backward == "pair":
            dots = []
            for v, tangent, y_bar_dot, sum_ in zip(
                weights.v, residuals.tangents, cotangents.dots, sums, strict=True
            ):
                pair = _constant_pair(cotangents.primal, y_bar_dot)
                x_dot = tangent.get("x_dot")
                found = backward_dual(f, p, v, x, x_dot, pair)
                sum_.add_dense(found.p_bar)
                dots.append(found.x_bar_dot)
            return Cotangents(found.x_bar, dots)
        pulled = []
        for y_bar, sum_ in zip(cotangents.dots, sums, strict=True):
            found = pull_back(f, p, x, _constant(y_bar))
            sum_.add_dense(found.p_bar)
            pulled.append(found.x_bar)
        return Cotangents(None, pulled)


def _constant(y_bar: Tensor | None) -> Callable[[Tensor], Tensor]:
    assert y_bar is not None
    return lambda _: y_bar


def _constant_pair(
    y_bar: Tensor | None, y_bar_dot: Tensor | None
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    assert y_bar is not None
    assert y_bar_dot is not None
    return lambda *_: (y_bar, y_bar_dot)


@final
class EagerHead(HeadExecutor):
    """Takes a piece through the last block by torch's own differentiation of the block.

    Args:
        f: The block.
        selected: Names of the parameters that the block is differentiated by.
        spec: The product.
        loss: The loss of the block's output.
        target: Targets of the piece.
        scale: Factor of the cotangents.
    """

    def __init__(
        self,
        f: Function,
        selected: Collection[str],
        spec: ProductSpec,
        loss: Loss,
        target: Tensor,
        scale: float,
    ):
        self._f, self._selected = f, selected
        self._spec, self._loss, self._target = spec, loss, target
        self._scale = scale

    def measure(
        self, weights: ParamsAndTangents, x: Tensor, x_dots: Sequence[Tensor | None]
    ) -> list[Tensor]:
        """See HeadExecutor: a forward dual for each probe."""
        assert self._spec.measure is not None
        f, p = held(self._f, weights.p, self._selected)
        return [
            self._spec.measure(self._at(*forward_dual(f, p, v, x, x_dot)))
            for v, x_dot in zip(weights.v, x_dots, strict=True)
        ]

    def run(
        self,
        weights: ParamsAndTangents,
        x: Tensor,
        x_dots: Sequence[Tensor | None],
        sums: Sequence[Accumulator],
        *,
        wants_primal: bool,
        given: Sequence[Tensor] = (),
    ) -> Cotangents:
        """See HeadExecutor: a backward dual for each probe, or a plain backward pass."""
        more: list[Tensor | None] = [*given] or [None for _ in sums]
        pair = self._spec.passes.backward == "pair"
        x_bar, dots = None, []
        f, p = held(self._f, weights.p, self._selected)
        for probe, (sum_, known) in enumerate(zip(sums, more, strict=True)):
            if pair:
                at = p, weights.v[probe], x, x_dots[probe]
                found = backward_dual(f, *at, self._pair)
                x_bar = found.x_bar
            elif self._spec.passes.forward == "tangent":
                at = p, weights.v[probe], x, x_dots[probe]
                found = self._pull_back(f, forward_dual(f, *at)[1], p, x, known)
            else:
                found = self._pull_back(f, None, p, x, known)
            sum_.add_dense(found.p_bar)
            dots.append(found.x_bar_dot if pair else found.x_bar)
        return Cotangents(x_bar, dots)

    def _pull_back(
        self, f: Function, y_dot: Tensor | None, p: Params, x: Tensor, given: Tensor | None
    ) -> Backward:
        def y_bar(y: Tensor) -> Tensor:
            return self._cotangents(y, torch.zeros_like(y) if y_dot is None else y_dot, given)[0]

        return pull_back(f, p, x, y_bar)

    def _at(self, y: Tensor, y_dot: Tensor, given: Tensor | None = None) -> AtOutput:
        y, y_dot = at_least_float32(y), at_least_float32(y_dot)
        return AtOutput(self._loss, y, y_dot, self._target, given)

    def _cotangents(self, y: Tensor, y_dot: Tensor, given: Tensor | None = None) -> list[Tensor]:
        assert self._spec.cotangents is not None
        found = self._spec.cotangents(self._at(y, y_dot, given))
        return [(each * self._scale).to(y.dtype) for each in found]

    def _pair(self, y: Tensor, y_dot: Tensor) -> tuple[Tensor, Tensor]:
        y_bar, y_bar_dot = self._cotangents(y, y_dot)
        return y_bar, y_bar_dot
