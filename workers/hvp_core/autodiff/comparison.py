"""The comparison of a trace with torch's own derivatives, along random directions.

A trace gives derivatives by going backward, cut at its attention. Their inner product with a
direction u is a derivative along u, which torch takes of the whole block by going forward, twice
for the Hessian's product:

    u · Hv = ∂s ∂t ⟨ȳ + t ȳ̇, f(p + t v + s u, x + t ẋ + s u_x)⟩

This is one number for all parameters, each weighed by the size of the derivative that the trace has
found for it; no tensor of the parameters' size is made but v, u and the trace's own. Where the two
numbers differ, torch's derivatives by going backward are asked too: some layers have no forward
derivative of a forward one, or a wrong one. They are composed as the trace is, though, and repeat
what an operation's own second rule has wrong. So they are believed only where differences of first
derivatives, which know no second rule, are not against them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol, final

import torch
from torch import Tensor

from hvp_core.autodiff.directions import (
    are_close,
    comparison_dtype,
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
from hvp_core.autodiff.reference import Function, Params, held, pull_back, value_and_tangent
from hvp_core.autodiff.selected_parameters import Link
from hvp_core.autodiff.sums import Accumulator, Sums
from hvp_core.blame import whose
from hvp_core.losses.loss import Loss, at_least_float32
from hvp_core.losses.output_rules import AtOutput
from hvp_core.model.chain import Body

#: Directions to compare along. In float32 what is wrong by a hundredth hides from one direction in
#: eight: the number that it changes may be small, and what rounding does to it is allowed for.
_ROUNDS = {torch.float32: 4}

_STEP = 1e-3  # of central differences, extrapolated: exact to the fourth order
_ROUGHLY = 1e-2  # by which differences may be off, in a number of size one
#: Takes a block there and back: (weights, ẋ, sums) -> ([y, ẏ] if there, cotangents of x).
_Run = Callable[
    [ParamsAndTangents, Tensor | None, Accumulator],
    tuple[Sequence[Tensor], Sequence[Tensor | None]],
]


class BuildExecutor(Protocol):
    """Builds the executor of a block, not the last (`ExecutorBuilder.of`)."""

    def __call__(
        self, link: Link, bodies: Callable[[bool], Body], p: Params, x: Tensor
    ) -> BlockExecutor:
        """The executor."""


@final
class Comparer:
    """Compares traces with torch.

    Args:
        loss: The loss at the end of the chain.
        spec: The product that is going to be computed.
        build: Builds the executors that are compared, under default settings.
    """

    def __init__(self, loss: Loss, spec: ProductSpec, build: BuildExecutor):
        self._loss, self._spec, self._build = loss, spec, build

    def block(
        self,
        link: Link,
        passes: Passes,
        bodies: Callable[[bool], Body],
        f: Function,
        x: Tensor,
        p: Params,
    ) -> bool | None:
        """Whether the trace of a block, not the last, is the block.

        Args:
            link: The block in its place.
            passes: How the product goes through the block.
            bodies: Gives the block's body, in the dtype of p; with masks as tensors if called with
                True.
            f: The block.
            x: Input of the block.
            p: Parameters of the block.

        Returns:
            None where nothing can be told: the derivatives are no numbers, or all of them are zero.
        """
        traced = self._build(link, bodies, p, x)
        return False if traced.key is None else self._block(link, passes, traced, f, x, p)

    def untraced(
        self, link: Link, passes: Passes, f: Function, x: Tensor, p: Params
    ) -> bool | None:
        """Whether torch's own derivatives of a block, not the last, are those of the block.

        An operation that brings its own rules may have a second one that contradicts the first.

        Args:
            link: The block in its place.
            passes: How the product goes through the block.
            f: The block.
            x: Input of the block.
            p: Parameters of the block.

        Returns:
            None as for `block`.
        """
        return self._block(link, passes, EagerExecutor(f, link.selected), f, x, p)

    def _block(
        self, link: Link, passes: Passes, own: BlockExecutor, f: Function, x: Tensor, p: Params
    ) -> bool | None:
        y = own.like(p, x)
        y_bar, y_bar_dot = noise_like(y, 2), noise_like(y, 3)

        def by(executor: BlockExecutor) -> _Run:
            def run(
                weights: ParamsAndTangents, x_dot: Tensor | None, sums: Accumulator
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
        return self._matches(link, passes, by(own), other, f, p, x, lambda *ys: (ys, back))

    def head(
        self,
        link: Link,
        traced: HeadExecutor,
        f: Function,
        x: Tensor,
        target: Tensor,
        p: Params,
    ) -> bool | None:
        """Whether the trace of the last block and the loss is right; None as for `block`.

        Args:
            link: The block in its place.
            traced: Takes the block through the product by its trace.
            f: The block.
            x: Input of the block.
            target: Targets of the loss.
            p: Parameters of the block.
        """
        loss, spec = self._loss, self._spec
        given = None
        if spec.given is not None:
            with torch.no_grad():
                y = f(p, x)
            given = noise_like(
                y if spec.given == "outputs" else y.reshape(len(y), -1)[:, 0].double(), 4
            )

        def by(head: HeadExecutor) -> _Run:
            def run(
                weights: ParamsAndTangents, x_dot: Tensor | None, sums: Accumulator
            ) -> tuple[Sequence[Tensor], Sequence[Tensor | None]]:
                dots = [x_dot for _ in weights.v]
                measured = [] if spec.measure is None else head.measure(weights, x, dots)
                values = [each.to(comparison_dtype(p)) for each in measured]
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

    def untraced_head(
        self, link: Link, f: Function, x: Tensor, target: Tensor, p: Params
    ) -> bool | None:
        """Whether torch's own derivatives of the last block are those of the block, as `untraced`.

        Args:
            link: The block in its place.
            f: The block.
            x: Input of the block.
            target: Targets of the loss.
            p: Parameters of the block.
        """
        own = EagerHead(f, link.selected, self._spec, self._loss, target, 1.0)
        return self.head(link, own, f, x, target, p)

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
        rounds = range(_ROUNDS.get(comparison_dtype(p), 1))

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
            product = inner_product(truth, directions)
            if pair:
                rough, doubt = by_differences(directions)
                if abs(product - rough) > _ROUGHLY * len(found) + 3 * doubt:
                    return values, math.nan  # an operation's second rule contradicts its first
            return values, product

        def by_differences(directions: Sequence[Tensor]) -> tuple[float, float]:
            """Give u · Hv by differences of first derivatives, and how unsettled these are."""
            u = dict(zip(p, directions, strict=False))
            u_x, *u_gradient = [*directions[len(p) :], None]

            def first(t: float) -> float:
                """U · ∂⟨ȳ, f⟩ at θ + tv, by going backward once."""
                q = {name: each + t * v[name] for name, each in p.items()} if v else p
                x_t = x if x_dot is None else x + t * x_dot
                back = pull_back(f, q, x_t, lambda y: cotangent(y, t))
                total = inner_product([back.p_bar[name] for name in q], [u[name] for name in q])
                if u_x is not None and back.x_bar is not None:
                    total += inner_product([back.x_bar], [u_x])
                return total

            def cotangent(y: Tensor, t: float) -> Tensor:
                y_bar, y_bar_dot = at_output(y, torch.zeros_like(y))[1]
                return y_bar + t * y_bar_dot  # ȳ̇ is zero where ȳ is a function of y

            slopes = [(first(h) - first(-h)) / (2 * h) for h in (_STEP, _STEP / 2)]
            total = (4 * slopes[1] - slopes[0]) / 3
            for each in _there(u_gradient):  # beside Hv the gradient of the input, along its own
                x_bar = pull_back(f, p, x, lambda y: cotangent(y, 0.0)).x_bar
                total += inner_product(_there([x_bar]), [each])
            # A block that rounds inside has differences of roundings.
            return total, abs(slopes[1] - slopes[0])

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


def _own(p: Params) -> dict[str, Tensor]:
    """The parameters, none of them a view of a larger storage.

    Torch would give the direction of a view the whole storage.
    """
    return {
        name: each.clone() if each.untyped_storage().nbytes() > each.nbytes else each
        for name, each in p.items()
    }
