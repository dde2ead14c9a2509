"""Is a block's trace the block? Compared with torch's own differentiation, once for each program.

On one row and a few positions of the batch, along random directions: the trace, cut at its
attention, against forward over reverse of the whole block with plain attention. The two share no
formula but torch's first derivatives. In float64; in float32 where a block has so many parameters
that copies of them count, as a large vocabulary's table has. What torch finds of the parameters'
derivatives is taken from what the trace adds: there is no room for two of those either.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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

_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
_LARGE = 1 << 25  # parameters of a block: 256 MiB in float64, four times over
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
        self._xs = [_in(torch.float64, chain.first_input(batch)) for batch in small]
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
        block, dtype = self._chain.blocks[index], _dtype(p)
        p = {name: each.to(dtype) for name, each in p.items()}
        right = isinstance(route, Traced)
        for context, x in zip(self._contexts, self._xs, strict=True):
            f = function_of(block.body(context, dense=True).cast(dtype))
            x = _in(dtype, x)
            if isinstance(route, Traced):
                key = (route.dual.text, self._mode)
                right = key in _verified or self._same(block, context, f, p, x, index == 0)
                if right:
                    _verified.add(key)
            if not right and self._mode == "hessian":
                _try(block, f, p, x, index == 0)
            with exact(), torch.no_grad():
                self._xs = [_in(torch.float64, f(p, x))]
        return right or not isinstance(route, Traced)

    def closes(self, p: Params) -> bool:
        """Whether the trace of the last block and the loss is right.

        Args:
            p: The block's parameters.

        Raises:
            CurvatureError: DOUBLE_BACKWARD_UNSUPPORTED.
        """
        block, is_data, dtype = self._chain.blocks[-1], len(self._chain.blocks) == 1, _dtype(p)
        p = {name: each.to(dtype) for name, each in p.items()}
        for context, x, target in zip(self._contexts, self._xs, self._targets, strict=True):
            body = block.body(context, dense=True).cast(dtype)
            x = _in(dtype, x)
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
            if not isinstance(traced, TracedClosing):  # nor is the operator's own
                if self._mode == "hessian":
                    _try(block, function_of(body), p, x, is_data)
                continue
            key = (traced.dual.text, self._mode)
            if key not in _verified:
                minus = EagerClosing(function_of(body), self._chain.loss, target, -1.0)
                if not self._cancel(block, traced, minus, p, x, is_data):
                    return False
                _verified.add(key)
        return True

    def _cancel(
        self, block: Block, one: Closing, minus: Closing, p: Params, x: Tensor, is_data: bool
    ) -> bool:
        """Whether a closing takes back what another gives."""
        weights, (sums, total) = self._directions(p), _sums(p)
        dots = [None if is_data else _noise(x, 1) for _ in weights.v]

        def run(closing: Closing) -> list[Tensor | None]:
            bars = closing.run(self._mode, weights, x, dots, [total], wants_primal=True)
            wanted = bars.dots if self._mode == "ggn" else [bars.primal, *bars.dots]
            return [] if is_data else wanted

        with _explained(block):
            expected = run(minus)
        sizes = {name: _size(each) for name, each in sums.items()}
        found = run(one)
        return _taken_back(sums, sizes) and all(
            _close(b, None if a is None else -a) for a, b in zip(expected, found, strict=True)
        )

    def _directions(self, p: Params) -> Weights:
        return Weights(p, [] if self._mode == "gradient" else [_direction(p)])

    def _same(
        self, block: Block, context: Any, f: Function, p: Params, x: Tensor, is_data: bool
    ) -> bool:
        with exact():
            traced = self._routes.of(
                block.name,
                block.parameters,
                lambda dense: block.body(context, dense).cast(_dtype(p)),
                p,
                x,
                is_data,
            )
        weights, (sums, total) = self._directions(p), _sums(p)
        dots = [None if is_data else _noise(x, 1) for _ in weights.v]
        y = traced.value(p, x)
        y_bar, y_bar_dot = _noise(y, 2), _noise(y, 3)

        def run(route: Route, sign: float) -> tuple[list[Tensor | None], list[Tensor | None]]:
            bars = Bars(sign * y_bar, [sign * y_bar_dot for _ in weights.v])
            y, y_dots, tape = route.forward(self._mode, "fast", weights, x, dots, None)
            found = route.backward(self._mode, "fast", weights, tape, bars, [total])
            # A gradient that only the other route needs says nothing.
            wanted = [found.primal] if self._mode == "gradient" else found.dots
            return [y, *y_dots], [] if is_data else wanted

        with _explained(block):
            values, cotangents = run(Eager(f), -1)
        sizes = {name: _size(each) for name, each in sums.items()}
        found_values, found_cotangents = run(traced, 1)
        expected = [*values, *(None if each is None else -each for each in cotangents)]
        return _taken_back(sums, sizes) and all(
            _close(a, b) for a, b in zip([*found_values, *found_cotangents], expected, strict=True)
        )


def _dtype(p: Params) -> torch.dtype:
    """In which a block is compared."""
    numel = sum(each.numel() for each in p.values())
    known = all(each.dtype != torch.float64 for each in p.values())
    return torch.float32 if known and numel > _LARGE else torch.float64


def _sums(p: Params) -> tuple[dict[str, Tensor], Sums]:
    found = {name: torch.zeros_like(each) for name, each in p.items()}
    return found, Sums(found, set())


def _taken_back(sums: Params, sizes: Mapping[str, float]) -> bool:
    """Whether nothing is left of sums that had these sizes when torch's own had been added."""
    return all(_negligible(_size(x), sizes[name], x.dtype) for name, x in sums.items())


def _close(found: Tensor | None, expected: Tensor | None) -> bool:
    if found is None or expected is None:
        return found is expected
    return _negligible(_size(found - expected), _size(expected), found.dtype)


def _size(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x))


def _negligible(distance: float, size: float, dtype: torch.dtype) -> bool:
    if not math.isfinite(size):
        return True  # the data's fault, not the trace's; the walk says which block
    return distance <= _TOLERANCE[dtype] * max(
        size, 1e-3
    )  # false where only the trace has no number


def _try(block: Block, f: Function, p: Params, x: Tensor, is_data: bool) -> None:
    """Take a block's second derivative once, to see that it has one."""
    x_dot = None if is_data else _noise(x, 1)
    with _explained(block):
        backward_dual(f, p, _direction(p), x, x_dot, lambda y, y_dot: (y, y_dot))


@contextmanager
def _explained(block: Block) -> Iterator[None]:
    """Gives torch's refusal to differentiate a block its reason."""
    try:
        yield
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


def _in(dtype: torch.dtype, x: Tensor) -> Tensor:
    return x.to(dtype) if x.is_floating_point() else x


def _direction(p: Params) -> dict[str, Tensor]:
    return {name: _noise(each, 10 + place) for place, (name, each) in enumerate(p.items())}


def _noise(like: Tensor, seed: int) -> Tensor:
    generator = torch.Generator(like.device).manual_seed(seed)
    return torch.empty_like(like, memory_format=torch.contiguous_format).normal_(
        generator=generator
    )
