"""Is a block's trace the block? Compared with torch's own differentiation, once for each program.

On one row and a few positions of the batch, in float64, along random directions: the trace, cut at
its attention, against forward over reverse of the whole block with plain attention. The two share
no formula but torch's first derivatives.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor

from hvp_core.block_dual import Mode
from hvp_core.chain import Block, Chain, MicroBatch
from hvp_core.closing import Closing, EagerClosing, TracedClosing
from hvp_core.dual import Function, Params, backward_dual
from hvp_core.errors import CurvatureError
from hvp_core.policy import Policy
from hvp_core.precision import exact
from hvp_core.route import Bars, Eager, Route, Traced, Weights
from hvp_core.routes import Routes, function_of
from hvp_core.shards import Sums

_TOLERANCE = 1e-8
_verified: set[tuple[str, str]] = set()  # programs and modes, in this process


@final
class Verifier:
    """Walks a small piece of the batch along with the preparation of an operator.

    Args:
        chain: The model.
        batches: This rank's first micro-batch, or none.
        mode: What is going to be computed.
    """

    def __init__(self, chain: Chain, batches: Sequence[MicroBatch], mode: Mode):
        self._chain = chain
        self._mode = mode
        self._routes = Routes(Policy())
        small = [chain.few(batch) for batch in batches]
        self._contexts = [chain.context(batch) for batch in small]
        self._xs = [_wide(chain.first_input(batch)) for batch in small]
        self._targets = [batch.targets for batch in small]

    def agrees(self, index: int, p: Params, route: Route | None) -> bool:
        """Whether a block, not the last, is what its route takes it for.

        Args:
            index: Of the block.
            p: Its parameters.
            route: What it has; None if this rank has nothing to take through it.

        Raises:
            CurvatureError: DOUBLE_BACKWARD_UNSUPPORTED.
        """
        block = self._chain.blocks[index]
        p = {name: _wide(each) for name, each in p.items()}
        right = True
        for context, x in zip(self._contexts, self._xs, strict=True):
            body = block.body(context, dense=True).cast(torch.float64)
            f = function_of(body)
            if isinstance(route, Traced):
                key = (route.dual.text, self._mode)
                if key in _verified or self._same(block, context, f, p, x, index == 0):
                    _verified.add(key)
                else:
                    right = False
            if not (isinstance(route, Traced) and right) and self._mode == "hessian":
                _try(block, f, p, x, index == 0)
            with exact(), torch.no_grad():
                self._xs = [f(p, x)]
        return right

    def closes(self, p: Params) -> bool:
        """Whether the trace of the last block and the loss is right.

        Args:
            p: The block's parameters.

        Raises:
            CurvatureError: DOUBLE_BACKWARD_UNSUPPORTED.
        """
        block, is_data = self._chain.blocks[-1], len(self._chain.blocks) == 1
        p = {name: _wide(each) for name, each in p.items()}
        for context, x, target in zip(self._contexts, self._xs, self._targets, strict=True):
            body = block.body(context, dense=True).cast(torch.float64)
            if self._mode == "hessian":
                _try(block, function_of(body), p, x, is_data)
            with exact():
                traced = self._routes.closing(
                    block.name,
                    block.parameters,
                    body,
                    self._chain.loss,
                    p,
                    x,
                    is_data,
                    target,
                    1.0,
                )
            if not isinstance(traced, TracedClosing):
                continue  # so is the operator's own
            key = (traced.dual.text, self._mode)
            if key not in _verified:
                minus = EagerClosing(function_of(body), self._chain.loss, target, -1.0)
                if not self._cancel(traced, minus, p, x, is_data):
                    return False
                _verified.add(key)
        return True

    def _cancel(self, one: Closing, minus: Closing, p: Params, x: Tensor, is_data: bool) -> bool:
        """Whether a closing takes back what another gives; a large head has no room for two."""
        some = self._mode != "gradient"
        weights = Weights(p, [{name: _noise(each) for name, each in p.items()}] if some else [])
        dots = [None if is_data else _noise(x) for _ in weights.v]
        sums = {name: torch.zeros_like(each) for name, each in p.items()}
        found: list[list[Tensor | None]] = []
        sizes: dict[str, float] = {}
        for closing in (minus, one):  # what is not a number in torch's own is the data's fault
            total = Sums(sums, set())
            bars = closing.run(self._mode, weights, x, dots, [total], wants_primal=True)
            wanted = bars.dots if self._mode == "ggn" else [bars.primal, *bars.dots]
            found.append([] if is_data else wanted)
            sizes = sizes or {name: _size(each) for name, each in sums.items()}
        left = all(_negligible(_size(each), sizes[name]) for name, each in sums.items())
        pairs = zip(*found, strict=True)
        return left and all(_close(b, None if a is None else -a) for a, b in pairs)

    def _same(
        self, block: Block, context: Any, f: Function, p: Params, x: Tensor, is_data: bool
    ) -> bool:
        with exact():
            traced = self._routes.of(
                block.name,
                block.parameters,
                lambda dense: block.body(context, dense).cast(torch.float64),
                p,
                x,
                is_data,
            )
        weights = Weights(p, [{name: _noise(each) for name, each in p.items()}])
        x_dot = None if is_data else _noise(x)
        y = traced.value(p, x)
        bars = Bars(_noise(y), [_noise(y)])
        if self._mode == "gradient":
            weights, bars = Weights(p, []), Bars(bars.primal, [])
        results = []
        for route in (traced, Eager(f)):
            sums = {name: torch.zeros_like(each) for name, each in p.items()}
            total = Sums(sums, set())
            dots = [x_dot] * len(weights.v)
            y, y_dots, tape = route.forward(self._mode, "fast", weights, x, dots, None)
            found = route.backward(self._mode, "fast", weights, tape, bars, [total])
            # A gradient that only the other route needs says nothing.
            primal = found.primal if self._mode == "gradient" and not is_data else None
            results.append([y, *y_dots, *([] if is_data else found.dots), primal, *sums.values()])
        return all(_close(a, b) for a, b in zip(*results, strict=True))


def _close(found: Tensor | None, expected: Tensor | None) -> bool:
    if found is None or expected is None:
        return found is expected
    return _negligible(_size(found - expected), _size(expected))


def _size(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x))


def _negligible(distance: float, size: float) -> bool:
    if not math.isfinite(size):
        return True  # the data's fault, not the trace's; the walk says which block
    return distance <= _TOLERANCE * max(size, 1e-3)  # false where only the trace has no number


def _try(block: Block, f: Function, p: Params, x: Tensor, is_data: bool) -> None:
    """Take a block's second derivative once, to see that it has one."""
    v = {name: _noise(each) for name, each in p.items()}
    try:
        backward_dual(f, p, v, x, None if is_data else _noise(x), lambda y, y_dot: (y, y_dot))
    except RuntimeError as error:
        words = str(error)
        known = ("derivative", "autograd.Function")  # what torch says of such operations
        if not isinstance(error, NotImplementedError) and not any(each in words for each in known):
            raise
        raise CurvatureError(
            "DOUBLE_BACKWARD_UNSUPPORTED",
            f"block {block.name} has an operation without a second derivative "
            f"({words.splitlines()[0]}); replace it by a composition of differentiable ones",
            {"block": block.name},
        ) from error


def _wide(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def _noise(like: Tensor) -> Tensor:
    generator = torch.Generator(like.device).manual_seed(like.numel())
    return torch.empty_like(like, memory_format=torch.contiguous_format).normal_(
        generator=generator
    )
