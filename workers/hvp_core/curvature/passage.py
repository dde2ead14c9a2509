"""How this rank's micro-batches go through all blocks, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import final

import torch
from torch import Tensor

from hvp_core.autodiff.executor import (
    Cotangents,
    HeadExecutor,
    ParamsAndTangents,
    Residuals,
    joined,
)
from hvp_core.autodiff.passes import Passes
from hvp_core.autodiff.product_spec import ProductSpec
from hvp_core.autodiff.reference import Params
from hvp_core.autodiff.sums import Accumulator
from hvp_core.blame import InStep
from hvp_core.curvature.executors import Executors
from hvp_core.curvature.retention import BlockRetention
from hvp_core.curvature.shards import Collector
from hvp_core.curvature.sweep import ParameterFeed, sweep
from hvp_core.losses.loss import at_least_float32
from hvp_core.model.chain import Chain, MicroBatch, function_of

#: A piece that goes through the last block: its head, its input, the input's tangents.
_Piece = tuple[HeadExecutor, Tensor, list[Tensor | None]]
#: What reaches the last block: its input of each micro-batch, their tangents, and all residuals.
_Front = tuple[list[Tensor], list[list[Tensor | None]], dict[tuple[int, int], Residuals]]


@final
class Passage:
    """Takes the micro-batches through a product, and keeps what the next product can use.

    Args:
        chain: The model.
        batches: This rank's micro-batches.
        executors: Take each micro-batch through each block.
    """

    def __init__(self, chain: Chain, batches: Sequence[MicroBatch], executors: Executors):
        self._chain, self._batches, self._executors = chain, batches, executors
        self._kept_passes: Passes | None = None
        self._kept: dict[tuple[int, int], Residuals] = {}
        self._head_cotangents: list[Cotangents] = []
        self._still: list[Tensor] | None = None

    def drop(self) -> None:
        """Forget what is kept for later products."""
        self.drop_residuals()
        self._still = None

    def drop_residuals(self) -> None:
        """Forget what is kept for later products of the same passes alone."""
        self._kept_passes, self._kept, self._head_cotangents = None, {}, []

    def is_of_use_to(self, passes: Passes) -> bool:
        """Whether what is kept, if anything, may stay when a product of these passes comes."""
        return not passes.keeps or self._kept_passes in (None, passes)

    @property
    def _last(self) -> int:
        return len(self._chain.blocks) - 1

    @property
    def _moving(self) -> range:
        """Blocks that have a derivative, but for the last."""
        return range(self._executors.selected.first, self._last)

    def loss(self, feed: ParameterFeed, step: InStep) -> float:
        """The sum of the losses of this rank's targets, not yet divided by their number."""
        xs, total = self._up_to_what_moves(feed, step), 0.0

        def end(index: int, weights: ParamsAndTangents, _: Sequence[Accumulator]) -> None:
            nonlocal total
            for batch, x in enumerate(step.live(xs)):
                total += self._end(index, batch, weights.p, x)

        self._values(self._moving, xs, feed, step)
        sweep(feed, [self._last], end, lambda block: step.on(block.name, "the loss"))
        return total

    def losses_along(
        self,
        feed: ParameterFeed,
        directions: Sequence[Tensor],
        points: Sequence[Sequence[float]],
        step: InStep,
    ) -> list[float]:
        """The sums of the losses of this rank's targets at θ + Σ aᵢ dᵢ, one for each point.

        All points go through a block while its parameters are here.

        Args:
            feed: Brings the parameters of each block.
            directions: The directions dᵢ, this rank's shards.
            points: The coefficients aᵢ of each point.
            step: Keeps the ranks in step.
        """
        still = self._up_to_what_moves(feed, step)
        xs, totals = [list(still) for _ in points], [0.0 for _ in points]

        def visit(index: int, weights: ParamsAndTangents, _: Sequence[Accumulator]) -> None:
            for point, coefficients in enumerate(points):
                p = displaced(weights, coefficients)
                for batch, x in enumerate(step.live(xs[point])):
                    if index == self._last:
                        totals[point] += self._end(index, batch, p, x)
                    else:
                        executor = self._executors.executor(index, batch, p, x)
                        xs[point][batch] = executor.value(p, x)

        order = [*self._moving, self._last]
        sweep(feed, order, visit, lambda block: step.on(block.name, "the loss"), directions)
        return totals

    def draw(
        self, feed: ParameterFeed, uniform: Callable[[int], Tensor], step: InStep
    ) -> list[Tensor]:
        """For each micro-batch the targets that are drawn from the model, (rows, ..., S).

        Args:
            feed: Brings the parameters of each block.
            uniform: Gives the numbers that a micro-batch's labels are made of, by its index.
            step: Keeps this rank in step where it fails.
        """
        xs, drawn = self._up_to_what_moves(feed, step), list[Tensor]()

        def end(index: int, weights: ParamsAndTangents, _: Sequence[Accumulator]) -> None:
            for batch, x in enumerate(step.live(xs)):
                numbers = [each for _, each in self._executors.pieces(batch, x, uniform(batch))]
                found = [
                    self._chain.loss.draw(y, target, own)
                    for (y, target), own in zip(
                        self._outputs(index, batch, weights.p, x), numbers, strict=True
                    )
                ]
                drawn.append(found[0] if len(found) == 1 else torch.cat(found, 1))

        self._values(self._moving, xs, feed, step)
        sweep(feed, [self._last], end, lambda block: step.on(block.name, "its drawn labels"))
        return drawn

    def _end(self, index: int, batch: int, p: Params, x: Tensor) -> float:
        """The sum of the losses of a micro-batch's targets, from the last block's input."""
        outputs = self._outputs(index, batch, p, x)
        return sum(float(self._chain.loss.value(y, target)) for y, target in outputs)

    def _outputs(
        self, index: int, batch: int, p: Params, x: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The outputs of a micro-batch with their targets, piece by piece."""
        f = function_of(self._executors.body(index, batch, True))
        for piece, target in self._executors.pieces(batch, x):
            y = at_least_float32(f(p, piece))
            self._chain.loss.check(y, target)
            yield y, target

    def _values(
        self, blocks: Iterable[int], xs: list[Tensor], feed: ParameterFeed, step: InStep
    ) -> None:
        """Take each micro-batch's input through blocks, for its value alone; `xs` is updated."""

        def value(index: int, weights: ParamsAndTangents, _: Sequence[Accumulator]) -> None:
            for batch, x in enumerate(step.live(xs)):
                xs[batch] = self._executors.executor(index, batch, weights.p, x).value(weights.p, x)

        sweep(feed, blocks, value, lambda block: step.on(block.name, "its value"))

    def inputs_of(self, index: int, feed: ParameterFeed, step: InStep) -> list[Tensor]:
        """Each micro-batch's input of a block."""
        xs = [self._chain.first_input(batch) for batch in self._batches]
        self._values(range(index), xs, feed, step)
        return xs

    def _up_to_what_moves(self, feed: ParameterFeed, step: InStep) -> list[Tensor]:
        """Each micro-batch's input of the first block that has a derivative.

        These inputs do not change from product to product, and are kept from the first call on.
        Where a rank fails, all ranks drop them.
        """
        if self._still is None:
            self._still = [self._chain.first_input(batch) for batch in self._batches]
            self._values(range(self._moving.start), self._still, feed, step)
        return list(self._still)

    def there_and_back(
        self,
        spec: ProductSpec,
        choices: Sequence[BlockRetention],
        feed: ParameterFeed,
        tangents: Sequence[Tensor],
        results: Collector,
        step: InStep,
        given: Sequence[Tensor] = (),
        of_input: Sequence[Tensor] = (),
    ) -> list[Tensor]:
        """Compute the products: forward, through the last block, and backward.

        Args:
            spec: The product; one with a backward pass.
            choices: What every block keeps that has a derivative, but for the last block.
            feed: Brings the parameters of each block.
            tangents: One vector for each probe, this rank's shards.
            results: Adds up the products.
            step: Keeps this rank in step where it fails.
            given: For each probe a cotangent of the output, this rank's rows of it. Only a product
                that is given outputs has any.
            of_input: For each probe zeros, this rank's rows, for the cotangents of the chain's
                first input; where that moves.

        Returns:
            This rank's shards of the products.
        """
        xs, dots, residuals_of = self._forward(spec, choices, feed, tangents, step)
        cotangents = self._turn(spec, feed, tangents, results, step, xs, dots, given)
        del xs, dots  # nobody reads them on the way back
        pair = spec.passes.backward == "pair"
        if pair and any(each.cached for each in choices):
            self._head_cotangents = [Cotangents(each.primal, []) for each in cotangents]

        def visit(index: int, weights: ParamsAndTangents, sums: Sequence[Accumulator]) -> None:
            choice = choices[index - self._moving.start]
            for batch, cotangent in enumerate(step.live(cotangents)):
                residuals = residuals_of.pop((index, batch))
                executor = self._executors.executor_of[index, batch]
                cotangents[batch] = executor.backward(
                    spec.passes, choice.way, weights, residuals, cotangent, sums
                )
                if choice.cached:
                    residuals.complete, residuals.tangents = True, []
                    self._kept[index, batch] = residuals
                    self._kept_passes = spec.passes

        sweep(
            feed,
            reversed(self._moving),
            visit,
            lambda block: step.on(block.name, "the derivative backward"),
            tangents,
            results,
        )
        for batch, cotangent in enumerate(step.live(cotangents) if of_input else ()):
            for whole, x_bar in zip(of_input, cotangent.dots, strict=True):
                if x_bar is not None:
                    self._rows(whole, batch).copy_(x_bar)
        return results.finish()

    def there(
        self,
        spec: ProductSpec,
        choices: Sequence[BlockRetention],
        feed: ParameterFeed,
        tangents: Sequence[Tensor],
        into: Sequence[Tensor],
        step: InStep,
        x_dots: Sequence[Tensor] = (),
    ) -> None:
        """Go forward alone, and write down what the product measures.

        Args:
            spec: The product; one that measures.
            choices: What every block keeps that has a derivative, but for the last block.
            feed: Brings the parameters of each block.
            tangents: One vector for each probe, this rank's shards.
            into: For each probe zeros to fill, for this rank's rows: (rows,) float64, or a tensor
                like the output.
            step: Keeps this rank in step where it fails.
            x_dots: For each probe a tangent of the chain's first input, this rank's rows; where
                that moves.
        """
        xs, dots, _ = self._forward(spec, choices, feed, tangents, step, x_dots)

        def visit(index: int, weights: ParamsAndTangents, _: Sequence[Accumulator]) -> None:
            for batch, x in enumerate(step.live(xs)):
                pieces = self._pieces(spec, weights.p, batch, x, dots[batch])
                _measure(spec, weights, pieces, [self._rows(each, batch) for each in into])

        sweep(
            feed,
            [self._last],
            visit,
            lambda block: step.on(block.name, f"its part of the {spec.title}"),
            tangents,
        )

    def _forward(
        self,
        spec: ProductSpec,
        choices: Sequence[BlockRetention],
        feed: ParameterFeed,
        tangents: Sequence[Tensor],
        step: InStep,
        x_dots: Sequence[Tensor] = (),
    ) -> _Front:
        """Go up to the last block: its inputs, their tangents in each probe, and all residuals."""
        xs = self._up_to_what_moves(feed, step)
        dots: list[list[Tensor | None]] = [
            [self._rows(each, batch).to(x.dtype) for each in x_dots] or [None for _ in tangents]
            for batch, x in enumerate(xs)
        ]
        residuals_of: dict[tuple[int, int], Residuals] = {}
        kept = self._kept if spec.passes == self._kept_passes else {}

        def visit(index: int, weights: ParamsAndTangents, _: Sequence[Accumulator]) -> None:
            for batch, x in enumerate(step.live(xs)):
                executor = self._executors.executor(index, batch, weights.p, x)
                xs[batch], dots[batch], residuals = executor.forward(
                    spec.passes,
                    choices[index - self._moving.start].way,
                    weights,
                    x,
                    dots[batch],
                    kept.get((index, batch)),
                )
                if spec.passes.backward != "none":
                    residuals_of[index, batch] = residuals

        sweep(
            feed,
            self._moving,
            visit,
            lambda block: step.on(block.name, "the derivative forward"),
            tangents,
        )
        return xs, dots, residuals_of

    def _turn(
        self,
        spec: ProductSpec,
        feed: ParameterFeed,
        tangents: Sequence[Tensor],
        results: Collector,
        step: InStep,
        xs: Sequence[Tensor],
        dots: Sequence[Sequence[Tensor | None]],
        given: Sequence[Tensor],
    ) -> list[Cotangents]:
        """Go through the last block and back through it; the cotangents of its input."""
        known = spec.passes.backward == "pair" and bool(self._head_cotangents)
        cotangents: list[Cotangents] = []

        def visit(index: int, weights: ParamsAndTangents, sums: Sequence[Accumulator]) -> None:
            for batch, x in enumerate(step.live(xs)):
                own = [self._rows(each, batch) for each in given]
                found = self._close(spec, weights, batch, x, dots[batch], sums, own, not known)
                cotangents.append(
                    Cotangents(self._head_cotangents[batch].primal, found.dots) if known else found
                )

        sweep(
            feed,
            [self._last],
            visit,
            lambda block: step.on(block.name, "its derivatives and the loss's"),
            tangents,
            results,
        )
        return cotangents

    def _close(
        self,
        spec: ProductSpec,
        weights: ParamsAndTangents,
        batch: int,
        x: Tensor,
        x_dots: Sequence[Tensor | None],
        sums: Sequence[Accumulator],
        given: Sequence[Tensor],
        wants_primal: bool,
    ) -> Cotangents:
        """Take one micro-batch through the last block and back, piece by piece."""
        pieces = self._pieces(spec, weights.p, batch, x, x_dots)
        if spec.given == "rows":
            # A piece's cotangents need the number of the whole row: all are seen before any.
            given = [x.new_zeros(len(x), dtype=torch.float64) for _ in x_dots]
            _measure(spec, weights, pieces, given)
        shares = [list(given) for _ in pieces]
        if spec.given == "outputs":
            cut = [[part for part, _ in self._executors.pieces(batch, each)] for each in given]
            shares = [list(each) for each in zip(*cut, strict=True)]
        return joined(
            [
                head.run(weights, piece, dots, sums, wants_primal=wants_primal, given=share)
                for (head, piece, dots), share in zip(pieces, shares, strict=True)
            ]
        )

    def _pieces(
        self,
        spec: ProductSpec,
        p: Params,
        batch: int,
        x: Tensor,
        x_dots: Sequence[Tensor | None],
    ) -> list[_Piece]:
        """The pieces that go through the last block, with their tangents and their heads."""
        pieces = list(self._executors.pieces(batch, x, self._executors.targets(spec, batch)))
        tangents = [
            [None for _ in pieces]
            if dot is None
            else [each for each, _ in self._executors.pieces(batch, dot)]
            for dot in x_dots
        ]
        return [
            (
                self._executors.head(spec, batch, index, p, piece, target),
                piece,
                [each[index] for each in tangents],
            )
            for index, (piece, target) in enumerate(pieces)
        ]

    def _rows(self, whole: Tensor, batch: int) -> Tensor:
        """One micro-batch's rows of a tensor that has all of this rank's rows."""
        start = sum(len(each.targets) for each in self._batches[:batch])
        return whole[start : start + len(self._batches[batch].targets)]


def displaced(weights: ParamsAndTangents, coefficients: Sequence[float]) -> dict[str, Tensor]:
    """A block's parameters p + Σ aᵢ vᵢ, added in float32 at least and rounded once."""
    found = dict(weights.p)
    for name in weights.v[0] if weights.v else ():
        p = found[name]
        total = p.to(torch.promote_types(p.dtype, torch.float32), copy=True)
        for a, v in zip(coefficients, weights.v, strict=True):
            total.add_(v[name].to(total.dtype), alpha=a)
        found[name] = total.to(p.dtype)
    return found


def _measure(
    spec: ProductSpec, weights: ParamsAndTangents, pieces: Sequence[_Piece], into: Sequence[Tensor]
) -> None:
    """Measure a micro-batch, piece by piece.

    Numbers of rows are added to `into`; tensors like the output are written side by side.
    """
    start = 0
    for head, piece, dots in pieces:
        for found, total in zip(head.measure(weights, piece, dots), into, strict=True):
            if spec.measured == "rows":
                total += found
            elif len(pieces) > 1:
                total[:, start : start + found.shape[1]] = found
            else:
                total.copy_(found)
        start += piece.shape[1] if len(pieces) > 1 else 0
