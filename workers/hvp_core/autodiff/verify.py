"""Checks that a block's trace is the block: it is compared with torch's own derivatives.

Each program is compared once, on one row and a few positions of the batch, along random directions.
A trace gives derivatives by going backward, cut at its attention. Their inner product with a
direction u is a derivative along u, which torch takes of the whole block by going forward, twice
for the Hessian's product:

    u · Hv = ∂s ∂t ⟨ȳ + t ȳ̇, f(p + t v + s u, x + t ẋ + s u_x)⟩

This is one number for all parameters, each weighed by the size of the derivative that the trace has
found for it; no tensor of the parameters' size is made but v, u and the trace's own. Where the two
numbers differ, torch's derivatives by going backward decide: some layers have no forward derivative
of a forward one, or a wrong one. The comparison is in float64; it is in float32 where a block has
so many parameters that copies of them count, as a large vocabulary's table has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, Protocol, final

import torch
from torch import Tensor

from hvp_core.autodiff.directions import (
    are_close,
    inner_product,
    noise_like,
    norm,
    random_direction,
    tolerance_of,
    weighed_directions,
)
from hvp_core.autodiff.eager import EagerExecutor, EagerHead
from hvp_core.autodiff.executor import BlockExecutor, Cotangents, HeadExecutor, ParamsAndTangents
from hvp_core.autodiff.passes import Passes
from hvp_core.autodiff.product_spec import ProductSpec
from hvp_core.autodiff.reference import Function, Params, backward_dual, held, value_and_tangent
from hvp_core.autodiff.selected_parameters import Link, SelectedParameters
from hvp_core.autodiff.sums import Sums
from hvp_core.autodiff.verdicts import Verdicts
from hvp_core.blame import explained, whose
from hvp_core.losses.loss import Loss, at_least_float32
from hvp_core.losses.output_rules import AtOutput
from hvp_core.model.chain import Block, Body, Chain, MicroBatch, function_of

#: Directions to compare along. In float32 what is wrong by a hundredth hides from one direction in
#: eight: the number that it changes may be small, and what rounding does to it is allowed for.
_ROUNDS = {torch.float32: 4}
_LARGE = 1 << 25  # parameters of a block: 256 MiB in float64, four times over
_verified = Verdicts()  # of programs and what they were taken through

#: Takes a block there and back: (weights, ẋ, sums) -> ([y, ẏ] if there, cotangents of x).
_Run = Callable[
    [ParamsAndTangents, Tensor | None, Sums], tuple[Sequence[Tensor], Sequence[Tensor | None]]
]


def keep_verdicts(folder: Path, device: torch.device) -> None:
    """Remember in a folder which programs are right, and believe what it says.

    Args:
        folder: Folder of this server alone.
        device: Device of this process's rank.
    """
    _verified.keep_in(folder, device)


class Builder(Protocol):
    """Builds the executors that are compared (see `ExecutorBuilder`)."""

    def of(
        self,
        link: Link,
        bodies: Callable[[bool], Body],
        p: Params,
        x: Tensor,
    ) -> BlockExecutor:
        """The executor of a block, not the last."""

    def head(
        self,
        spec: ProductSpec,
        link: Link,
        body: Body,
        loss: Loss,
        p: Params,
        x: Tensor,
        target: Tensor,
        scale: float,
    ) -> HeadExecutor:
        """The executor of the last block and a product's rule."""


@final
class Verifier:
    """Walks a small piece of the batch along with the preparation of an operator.

    Args:
        chain: The model.
        batches: This rank's first micro-batch, or none.
        spec: The product that is going to be computed.
        executors: Builds the executors of the small piece, under default settings.
        selected: The parameters that the model is differentiated by.
    """

    def __init__(
        self,
        chain: Chain,
        batches: Sequence[MicroBatch],
        spec: ProductSpec,
        executors: Builder,
        selected: SelectedParameters,
    ):
        self._chain, self._selected = chain, selected
        self._spec, self._builder = spec, executors
        small = [chain.sample_for_checks(batch) for batch in batches]
        self._contexts = [chain.context(batch) for batch in small]
        self._xs = [_in(torch.float64, chain.first_input(batch)) for batch in small]
        self._targets = [batch.targets for batch in small]

    def agrees(
        self, index: int, p: Params, executor: BlockExecutor | None, *, keeps_shape: bool
    ) -> bool:
        """Whether a block, not the last, is what its executor takes it for.

        Args:
            index: Index of the block.
            p: Parameters of the block.
            executor: Executor of the block; None if this rank has nothing to take through it.
            keeps_shape: The output is shaped as the input. Where the block's program is known to be
                right, it is then not run: its input serves the next block as well.

        Raises:
            CurvatureError: DOUBLE_BACKWARD_UNSUPPORTED: torch has no second derivative of the
                block either; other errors of the block's code as `explained` says.
        """
        block, dtype, link = self._chain.blocks[index], _dtype(p), self._selected.links[index]
        passes = self._selected.passes(index, self._spec.passes)
        key = None
        if executor is not None and executor.key is not None:
            key = _key(executor.key, p, link, passes)
        if keeps_shape and key in _verified:
            return True
        p = {name: each.to(dtype) for name, each in p.items()}
        right = key is not None
        for context, x in zip(self._contexts, self._xs, strict=True):
            f = function_of(block.body(context, dense=True).cast(dtype))
            x = _in(dtype, x)
            if key is not None and key not in _verified:
                right = _remembered(key, self._block(link, passes, block, context, f, p, x))
            if not right and passes.backward == "pair":
                _try(link, f, p, x)
            with torch.no_grad():
                self._xs = [_in(torch.float64, f(p, x))]
        return right or key is None

    def head_agrees(self, p: Params) -> bool:
        """Whether the trace of the last block and the loss is right.

        Args:
            p: Parameters of the block.

        Raises:
            CurvatureError: As for `agrees`.
        """
        block, dtype, link = self._chain.blocks[-1], _dtype(p), self._selected.links[-1]
        p = {name: each.to(dtype) for name, each in p.items()}
        for context, x, target in zip(self._contexts, self._xs, self._targets, strict=True):
            body = block.body(context, dense=True).cast(dtype)
            x = _in(dtype, x)
            loss, f = self._chain.loss, function_of(body)
            traced = self._builder.head(self._spec, link, body, loss, p, x, target, 1.0)
            if traced.key is not None:
                key = _key(traced.key, p, link, self._spec.passes)
                known = key in _verified
                if known or _remembered(key, self._head(link, traced, f, p, x, target)):
                    continue
            if self._spec.passes.backward == "pair":
                _try(link, f, p, x)
            return False
        return True

    def _block(
        self,
        link: Link,
        passes: Passes,
        block: Block,
        context: Any,
        f: Function,
        p: Params,
        x: Tensor,
    ) -> bool | None:
        traced = self._builder.of(
            link, lambda dense: block.body(context, dense).cast(_dtype(p)), p, x
        )
        if traced.key is None:
            return False
        y = traced.like(p, x)
        y_bar, y_bar_dot = noise_like(y, 2), noise_like(y, 3)

        def by(executor: BlockExecutor) -> _Run:
            def run(
                weights: ParamsAndTangents, x_dot: Tensor | None, sums: Sums
            ) -> tuple[Sequence[Tensor], Sequence[Tensor | None]]:
                dots = [x_dot for _ in weights.v]
                y, y_dots, residuals = executor.forward(passes, "fast", weights, x, dots, None)
                if passes.backward == "none":
                    return [y, *_there(y_dots)], []
                cotangents = Cotangents(y_bar, [y_bar_dot])
                found = executor.backward(passes, "fast", weights, residuals, cotangents, [sums])
                return [y, *_there(y_dots)], _wanted(passes, found)

            return run

        other = by(EagerExecutor(f, link.selected))
        seeds = {"none": (), "cotangent": (y_bar_dot,), "pair": (y_bar, y_bar_dot)}
        back = seeds[passes.backward]
        return self._matches(link, passes, by(traced), other, f, p, x, lambda *ys: (ys, back))

    def _head(
        self,
        link: Link,
        traced: HeadExecutor,
        f: Function,
        p: Params,
        x: Tensor,
        target: Tensor,
    ) -> bool | None:
        loss, spec = self._chain.loss, self._spec
        given = None
        if spec.given is not None:
            with torch.no_grad():
                y = f(p, x)
            given = noise_like(
                y if spec.given == "outputs" else y.reshape(len(y), -1)[:, 0].double(), 4
            )

        def by(head: HeadExecutor) -> _Run:
            def run(
                weights: ParamsAndTangents, x_dot: Tensor | None, sums: Sums
            ) -> tuple[Sequence[Tensor], Sequence[Tensor | None]]:
                dots = [x_dot for _ in weights.v]
                measured = [] if spec.measure is None else head.measure(weights, x, dots)
                values = [each.to(_dtype(p)) for each in measured]
                if spec.cotangents is None:
                    return values, []
                shares = [] if given is None else [given]
                cotangents = head.run(weights, x, dots, [sums], wants_primal=True, given=shares)
                return values, _wanted(spec.passes, cotangents)

            return run

        def at_output(y: Tensor, y_dot: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
            at = AtOutput(loss, at_least_float32(y), at_least_float32(y_dot), target, given)
            return (
                [] if spec.measure is None else [spec.measure(at)],
                () if spec.cotangents is None else spec.cotangents(at),
            )

        other = by(EagerHead(f, link.selected, spec, loss, target, 1.0))
        return self._matches(link, spec.passes, by(traced), other, f, p, x, at_output)

    def _matches(
        self,
        link: Link,
        passes: Passes,
        run: _Run,
        other: _Run,
        f: Function,
        p: Params,
        x: Tensor,
        at_output: Callable[[Tensor, Tensor], tuple[Sequence[Tensor], Sequence[Tensor]]],
    ) -> bool | None:
        """Whether a trace finds the derivatives that torch finds.

        Args:
            link: The block in its place.
            passes: How the product goes through the block.
            run: Takes the block there and back by its trace.
            other: Takes the block there and back by torch, going backward.
            f: The block.
            p: Parameters of the block.
            x: Input of the block.
            at_output: Gives for (y, ẏ) the values that the trace has to find there, and the
                cotangents: ȳ, the pair (ȳ, ȳ̇), or none.

        Returns:
            None where nothing can be told: the derivatives are no numbers, or all of them are zero.
        """
        some, pair = passes.forward == "tangent", passes.backward == "pair"
        everything, is_data = _own(p), link.takes_data
        f, p = held(f, everything, link.selected)
        v = random_direction(p, 1000) if some else None
        x_dot = noise_like(x, 1) if some and not is_data else None
        weights = ParamsAndTangents(everything, [] if v is None else [v])

        def found_by(run: _Run) -> tuple[Sequence[Tensor], list[Tensor], bool]:
            sums = {name: torch.zeros_like(each) for name, each in p.items()}
            values, cotangents = run(weights, x_dot, Sums(sums, set()))
            there = [] if is_data else _there(cotangents)
            return values, [*sums.values(), *there], is_data or len(there) == len(cotangents)

        values, found, complete = found_by(run)
        if not complete:
            return False
        rounds = range(_ROUNDS.get(_dtype(p), 1))

        def forward(directions: Sequence[Tensor]) -> tuple[Sequence[Tensor], float]:
            u = dict(zip(p, directions, strict=False))
            u_x, *u_gradient = [*directions[len(p) :], None]
            y, y_s, y_t, y_ts = _along(f, p, x, (u, u_x), (v, x_dot), pair)
            expected, cotangents = at_output(y, y_t)
            if not cotangents:
                return expected, 0.0
            y_bar = cotangents[0]
            truth = cotangents[1] * y_s + y_bar * y_ts if pair else y_bar * y_s
            for each in _there(u_gradient):
                truth = truth + y_bar * value_and_tangent(lambda x: f(p, x), (x,), (each,))[1]
            return expected, float(truth.sum())

        def backward(directions: Sequence[Tensor]) -> tuple[Sequence[Tensor], float]:
            values, truth, _ = found_by(other)
            return values, inner_product(truth, directions)

        allowed = sum(tolerance_of(each) for each in found)

        def compare(directions: Sequence[Tensor]) -> bool | None:
            product, undecided = inner_product(found, directions), False
            for torchs_own in (forward, backward):
                try:
                    with torch.enable_grad():  # without it torch picks what has no derivative
                        expected, truth = torchs_own(directions)
                except Exception as error:
                    if whose(error) != "model":
                        raise
                    continue  # it has no such derivative
                # No number on either side is the data's fault.
                undecided = not math.isfinite(truth) and not math.isfinite(product)
                if all(map(are_close, values, expected)) and abs(product - truth) <= allowed:
                    seen = values if passes.backward == "none" else found
                    return True if any(map(norm, seen)) else None
            return None if undecided else False

        answers = (compare(weighed_directions(found, each)) for each in rounds)
        return next((answer for answer in answers if answer is not True), True)


def _wanted(passes: Passes, cotangents: Cotangents) -> list[Tensor | None]:
    """The cotangents that the block before this one is given."""
    return [*cotangents.dots, cotangents.primal] if passes.backward == "pair" else cotangents.dots


def _along(
    f: Function,
    p: Params,
    x: Tensor,
    s: tuple[Params, Tensor | None],
    t: tuple[Params | None, Tensor | None],
    both: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A block's y, ∂s y, ∂t y and, if `both`, ∂s ∂t y, in directions of its parameters and input.

    A derivative that is not asked for is zero.
    """
    v, x_dot = t
    at: tuple[Any, ...] = (dict(p),) if s[1] is None else (dict(p), x)

    def g(*at: Any) -> Any:
        return f(at[0], at[1] if len(at) > 1 else x)

    def inner(*at: Any) -> tuple[Any, Any]:
        return value_and_tangent(g, at, (s[0], s[1])[: len(at)])

    if not p and s[1] is None:  # of data alone
        y = f(p, x)
        return y, torch.zeros_like(y), torch.zeros_like(y), torch.zeros_like(y)
    if both:
        (y, y_s), (y_t, y_ts) = value_and_tangent(inner, at, (v, x_dot)[: len(at)])
        return y, y_s, y_t, y_ts
    y, y_s = inner(*at)
    zero = torch.zeros_like(y)
    y_t = zero if v is None else value_and_tangent(g, at, (v, x_dot)[: len(at)])[1]
    return y, y_s, y_t, zero


def _there(found: Sequence[Tensor | None]) -> list[Tensor]:
    return [each for each in found if each is not None]


def _try(link: Link, f: Function, p: Params, x: Tensor) -> None:
    """Take a block's second derivative once, to see that it has one.

    Raises:
        CurvatureError: What `explained` makes of the error that torch raises.
    """
    x_dot = None if link.takes_data else noise_like(x, 1)
    f, p = held(f, p, link.selected)
    try:
        backward_dual(f, p, random_direction(p, 1000), x, x_dot, lambda y, y_dot: (y, y_dot))
    except Exception as error:
        raise explained(error, link.name, "the second derivative") from error


def _dtype(p: Params) -> torch.dtype:
    """The dtype in which a block is compared."""
    numel = sum(each.numel() for each in p.values())
    narrow = all(each.dtype != torch.float64 for each in p.values())
    return torch.float32 if narrow and numel > _LARGE else torch.float64


def _own(p: Params) -> dict[str, Tensor]:
    """The parameters, none of them a view of a larger storage.

    Torch would give the direction of a view the whole storage.
    """
    return {
        name: each.clone() if each.untyped_storage().nbytes() > each.nbytes else each
        for name, each in p.items()
    }


def _remembered(key: Hashable, answer: bool | None) -> bool:
    """Whether nothing speaks against a trace; a trace that is right is not compared again."""
    if answer:
        _verified.add(key)
    return answer is not False


def _key(traced: Hashable, p: Params, link: Link, passes: Passes) -> Hashable:
    """The key under which a verified trace is remembered.

    A program says nothing of widths, nor of what is differentiated: the key adds both.
    """
    shapes = tuple(tuple(p[name].shape) for name in link.parameters)
    selected = tuple(name in link.selected for name in link.parameters)
    return traced, shapes, selected, link.takes_data, passes


def _in(dtype: torch.dtype, x: Tensor) -> Tensor:
    return x.to(dtype) if x.is_floating_point() else x
