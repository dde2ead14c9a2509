"""The walk over the blocks: loss, gradient and Hessian-vector products of a sharded model.

Layer-major: the weights of a block are gathered once per pass, every micro-batch of this rank is
pushed through, and the weights are dropped again. A rank keeps its shards, the inputs of the
blocks, and one block. Backwards, each block's part of the product is summed over the ranks and cut
into shards as soon as it is known.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, final

import torch
from torch import Tensor

from hvp_core.chain import Block, Chain, MicroBatch, rows, to_device
from hvp_core.dual import (
    Cotangents,
    Function,
    Params,
    Rule,
    backward_dual,
    choose_rule,
    forward_dual,
    pull_back,
)
from hvp_core.errors import CurvatureError
from hvp_core.precision import exact
from hvp_core.space import Space, partial_products

Pair = tuple[Tensor | None, Tensor | None]  # (x̄, x̄̇)


@final
class Curvature:
    """The mean loss of a chain on a batch, as a function of θ, and its derivatives at θ.

    Args:
        chain: The model.
        space: Of its parameters.
        parameters: θ, this rank's shard.
        batch: The whole batch, on every rank.
        micro_batch_size: Rows that go through a block at once. Rank r of N takes every N-th
            micro-batch. Results do not depend on it.

    Raises:
        CurvatureError: NO_TARGETS, MICRO_BATCH_INVALID.
    """

    def __init__(
        self,
        chain: Chain,
        space: Space,
        parameters: Tensor,
        batch: MicroBatch,
        micro_batch_size: int,
    ):
        if micro_batch_size < 1:
            raise CurvatureError(
                "MICRO_BATCH_INVALID", f"micro_batch_size is {micro_batch_size}; give 1 or more"
            )
        self.chain = chain
        #: How each kind of block is differentiated, as found at its first product.
        self.rules: dict[Hashable, Rule] = {}
        self.space = space
        self.parameters = parameters
        self.num_targets = chain.loss.weight(batch.targets)
        if self.num_targets == 0:
            raise CurvatureError("NO_TARGETS", "no target of the batch counts")
        count = len(batch.targets)
        starts = range(0, count, micro_batch_size)
        rank, world_size = space.collective.rank, space.collective.world_size
        self._batches = [
            to_device(rows(batch, start, min(start + micro_batch_size, count)), space.device)
            for start in list(starts)[rank::world_size]
        ]
        # Constants are the model's own, in the model's own arithmetic.
        with space.collective.same_fate(_unsupported("the model's constants")):
            self._contexts = [chain.context(each) for each in self._batches]

    # The three questions ------------------------------------------------------------------------

    def loss(self) -> float:
        """L(θ). Cost: 1 GEMM pass over the data.

        Raises:
            CurvatureError: NON_FINITE, naming the first block with an infinite or undefined value.
        """
        total = torch.zeros(1, dtype=torch.float64)
        last = len(self.chain.blocks) - 1
        with exact(), torch.no_grad():
            xs = self._inputs()[last]
            with self._gathered(last, self.parameters) as (p,):
                for batch, x in enumerate(xs):
                    for piece, target in self._pieces(x, self._batches[batch].targets):
                        y = self._call(last, batch)(p, piece)
                        total += self.chain.loss.value(y, target).cpu()
        value = float(self.space.collective.sum(total)) / self.num_targets
        if value - value != 0:  # NaN or infinite, on every rank alike
            raise self._first_non_finite_block()
        return value

    def gradient(self) -> Tensor:
        """∇L(θ), this rank's shard. Cost: 4 GEMM passes.

        Raises:
            CurvatureError: NON_FINITE.
        """
        result = self.space.zeros()
        blocks = self.chain.blocks
        with exact():
            inputs = self._inputs()
            x_bars: list[Tensor | None] = [None for _ in self._batches]
            for index in reversed(range(len(blocks))):
                last = index == len(blocks) - 1
                xs = inputs.pop()
                with (
                    self._gathered(index, self.parameters) as (p,),
                    self._scattered(index, [result]) as (collect,),
                ):
                    for batch, x in enumerate(xs):
                        f = self._call(index, batch)
                        if last:
                            x_bars[batch] = self._pull_back_loss(f, p, x, batch, collect)
                        else:
                            found = pull_back(f, p, x, _constant(x_bars[batch]))
                            collect(found.hvp)
                            x_bars[batch] = found.x_bar
        self._check_finite([result], "the gradient")
        return result

    def hvp(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """H v for each v, this rank's shards. Cost: 11 GEMM passes each; weights travel once.

        Args:
            vectors: Shards (shard_numel,).

        Raises:
            CurvatureError: NON_FINITE; DOUBLE_BACKWARD_UNSUPPORTED, naming the block.
        """
        results = [self.space.zeros() for _ in vectors]
        probes = range(len(vectors))
        last = len(self.chain.blocks) - 1
        with exact():
            if not self.rules:
                self._choose_rules()
            inputs = self._dual_inputs(vectors)
            # (x̄, x̄̇) of each probe, for each micro-batch
            bars: list[list[Pair]] = [[(None, None) for _ in probes] for _ in self._batches]
            for index in reversed(range(last + 1)):
                current = inputs.pop()
                with (
                    self._gathered(index, self.parameters, *vectors) as (p, *vs),
                    self._scattered(index, results) as collectors,
                ):
                    for batch, (x, x_dots) in enumerate(current):
                        for probe, (v, x_dot) in enumerate(zip(vs, x_dots, strict=True)):
                            step = partial(self._pull, index, batch, p, v, collectors[probe])
                            bars[batch][probe] = (
                                self._pull_pieces(step, batch, x, x_dot)
                                if index == last
                                else step(x, x_dot, _constant_pair(*bars[batch][probe]))
                            )
        self._check_finite(results, "the product")
        return results

    def _dual_inputs(
        self, vectors: Sequence[Tensor]
    ) -> list[list[tuple[Tensor, list[Tensor | None]]]]:
        """(x, [ẋ of each probe]) of every block for every micro-batch of this rank."""
        inputs: list[list[tuple[Tensor, list[Tensor | None]]]] = [
            [(self.chain.first_input(batch), [None for _ in vectors]) for batch in self._batches]
        ]
        for index in range(len(self.chain.blocks) - 1):
            with self._gathered(index, self.parameters, *vectors) as (p, *vs):
                outputs = []
                for batch, (x, x_dots) in enumerate(inputs[-1]):
                    f = self._call(index, batch)
                    pairs = [
                        forward_dual(f, p, v, x, x_dot) for v, x_dot in zip(vs, x_dots, strict=True)
                    ]
                    y_dots: list[Tensor | None] = [y_dot for _, y_dot in pairs]
                    outputs.append((pairs[0][0], y_dots))
                inputs.append(outputs)
        return inputs

    @torch.no_grad()
    def _inputs(self) -> list[list[Tensor]]:
        """The input of every block for every micro-batch of this rank."""
        inputs = [[self.chain.first_input(batch) for batch in self._batches]]
        for index in range(len(self.chain.blocks) - 1):
            with self._gathered(index, self.parameters) as (p,):
                inputs.append(
                    [self._call(index, batch)(p, x) for batch, x in enumerate(inputs[-1])]
                )
        return inputs

    # One block ----------------------------------------------------------------------------------

    def _call(self, index: int, batch: int) -> Function:
        block: Block = self.chain.blocks[index]
        return partial(_call_block, block, self._contexts[batch])

    def _pieces(self, x: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """What of the last block's input goes through it at once, with its targets."""
        pieces = self.chain.pieces(x)
        if not pieces:
            yield x, targets
        for piece in pieces:
            yield x[:, piece], targets[:, piece]

    def _pull_back_loss(
        self, f: Function, p: Params, x: Tensor, batch: int, collect: Collector
    ) -> Tensor | None:
        x_bars = []
        for piece, target in self._pieces(x, self._batches[batch].targets):

            def y_bar(y: Tensor, target: Tensor = target) -> Tensor:
                return self.chain.loss.gradient(y, target) / self.num_targets

            found = pull_back(f, p, piece, y_bar)
            collect(found.hvp)
            x_bars.append(found.x_bar)
        return _joined(x_bars)

    def _pull_pieces(
        self, step: Callable[..., Pair], batch: int, x: Tensor, x_dot: Tensor | None
    ) -> Pair:
        """The last block and the loss behind it, piece by piece."""
        loss, targets = self.chain.loss, self._batches[batch].targets
        pieces = list(self._pieces(x, targets))
        dots = (
            [None for _ in pieces]
            if x_dot is None
            else [dot for dot, _ in self._pieces(x_dot, targets)]
        )
        bars = []
        for (piece, target), dot in zip(pieces, dots, strict=True):

            def cotangents(
                y: Tensor, y_dot: Tensor, target: Tensor = target
            ) -> tuple[Tensor, Tensor]:
                return (
                    loss.gradient(y, target) / self.num_targets,
                    loss.curve(y, y_dot, target) / self.num_targets,
                )

            bars.append(step(piece, dot, cotangents))
        return _joined([x_bar for x_bar, _ in bars]), _joined([x_bar_dot for _, x_bar_dot in bars])

    def _pull(
        self,
        index: int,
        batch: int,
        p: Params,
        v: Params,
        collect: Collector,
        x: Tensor,
        x_dot: Tensor | None,
        cotangents: Cotangents,
    ) -> Pair:
        """The block's backward dual, by the rule that was found right for its kind."""
        block, f = self.chain.blocks[index], self._call(index, batch)
        found = backward_dual(self.rules[block.kind], f, p, v, x, x_dot, cotangents)
        collect(found.hvp)
        return found.x_bar, found.x_bar_dot

    def _choose_rules(self) -> None:
        """Find the rule of each kind of block, on a rank's first micro-batch; all ranks agree.

        Raises:
            CurvatureError: DOUBLE_BACKWARD_UNSUPPORTED, naming the block, on all ranks: also on
                those that have no micro-batch and would never have met it.
        """
        collective = self.space.collective
        xs = [self.chain.first_input(batch) for batch in self._batches[:1]]
        for index, block in enumerate(self.chain.blocks):
            with self._gathered(index, self.parameters) as (p,):
                with collective.same_fate(_unsupported(f"block {block.name}")):
                    found = [] if block.kind in self.rules else self._rule(index, p, xs)
                    with torch.no_grad():
                        if block is not self.chain.blocks[-1]:
                            xs = [self._call(index, 0)(p, x) for x in xs]
                for rules in collective.gather_objects(found):
                    self.rules.update((block.kind, rule) for rule in rules)

    def _rule(self, index: int, p: Params, xs: Sequence[Tensor]) -> list[Rule]:
        """The rule of a block; none where there is no input to try it on."""
        block = self.chain.blocks[index]
        if block is self.chain.blocks[-1]:
            xs = [next(self._pieces(x, self._batches[0].targets))[0] for x in xs]
        try:
            return [choose_rule(self._call(index, 0), p, x) for x in xs]
        except RuntimeError as error:
            words = str(error)
            if not isinstance(error, NotImplementedError) and "derivative" not in words:
                raise
            raise CurvatureError(
                "DOUBLE_BACKWARD_UNSUPPORTED",
                f"block {block.name} has an operation without a second derivative "
                f"({words.splitlines()[0]}); replace it by a composition of differentiable ones",
                {"block": block.name},
            ) from error

    # Shards -------------------------------------------------------------------------------------

    @contextmanager
    def _gathered(self, index: int, *shards: Tensor) -> Iterator[list[dict[str, Tensor]]]:
        """The block's parameters in each of these vectors, by name, for as long as needed."""
        layout = self.space.layout
        wanted = set(self.chain.blocks[index].parameters)
        found: list[dict[str, Tensor]] = [{} for _ in shards]
        for segment in (layout.segments[i] for i in layout.block_segments[index]):
            place = slice(segment.shard_offset, segment.shard_offset + segment.chunk)
            for shard, views in zip(shards, found, strict=True):
                flat = self.space.collective.gather(shard[place])
                views.update(
                    (name, view) for name, view in segment.views(flat).items() if name in wanted
                )
        yield found
        for views in found:
            views.clear()

    @contextmanager
    def _scattered(self, index: int, results: Sequence[Tensor]) -> Iterator[list[Collector]]:
        """Collect the block's part of each result; at the end add it up over the ranks."""
        layout = self.space.layout
        world_size = layout.world_size
        segments = [layout.segments[i] for i in layout.block_segments[index]]
        sums = [
            [result.new_zeros(world_size * segment.chunk) for segment in segments]
            for result in results
        ]
        yield [
            Collector(
                {
                    name: view
                    for segment, flat in zip(segments, flats, strict=True)
                    for name, view in segment.views(flat).items()
                }
            )
            for flats in sums
        ]
        for result, flats in zip(results, sums, strict=True):
            for segment, flat in zip(segments, flats, strict=True):
                place = slice(segment.shard_offset, segment.shard_offset + segment.chunk)
                self.space.collective.scatter_sum(flat, result[place])

    # Failure ------------------------------------------------------------------------------------

    def _first_non_finite_block(self) -> CurvatureError:
        """Walk again, looking at every block; all ranks come to the same answer."""
        names = [block.name for block in self.chain.blocks]
        first = len(names)
        xs = [self.chain.first_input(batch) for batch in self._batches]
        with exact(), torch.no_grad():
            for index in range(len(names)):
                with self._gathered(index, self.parameters) as (p,):
                    xs = [self._call(index, batch)(p, x) for batch, x in enumerate(xs)]
                if first == len(names) and not all(bool(x.isfinite().all()) for x in xs):
                    first = index
        first = min(self.space.collective.gather_objects(first))
        name = names[first] if first < len(names) else "loss"
        return CurvatureError(
            "NON_FINITE",
            f"the loss is not finite; the first block with such a value is {name}. Check its "
            "parameters, or use float64",
            {"block": name},
        )

    def _check_finite(self, shards: Sequence[Tensor], what: str) -> None:
        squares = torch.cat([partial_products(shard.unsqueeze(0), shard) for shard in shards])
        if bool(self.space.collective.sum(squares).isfinite().all()):
            return
        self.loss()  # says which block, if the loss itself is at fault
        raise CurvatureError(
            "NON_FINITE", f"{what} is not finite although the loss is; use float64"
        )


@final
class Collector:
    """Adds the parts of micro-batches to a block's segments."""

    def __init__(self, views: Mapping[str, Tensor]):
        self._views = views

    def __call__(self, parts: Mapping[str, Tensor]) -> None:
        """Add tensors by parameter name."""
        for name, part in parts.items():
            self._views[name] += part


def _unsupported(what: str) -> Callable[[Exception], CurvatureError]:
    def explain(error: Exception) -> CurvatureError:
        words = f"{what}: {type(error).__name__}: {str(error)[:300]}"
        if "allocate" in words or isinstance(error, MemoryError):
            return CurvatureError("OUT_OF_MEMORY", f"{words}; use a smaller micro-batch")
        return CurvatureError("MODEL_UNSUPPORTED", f"{words}; this model cannot be walked")

    return explain


def _call_block(block: Block, context: Any, p: Params, x: Tensor) -> Tensor:
    return block.forward(p, x, context)


def _constant(y_bar: Tensor | None) -> Callable[[Tensor], Tensor]:
    return lambda y: torch.zeros_like(y) if y_bar is None else y_bar


def _constant_pair(
    y_bar: Tensor | None, y_bar_dot: Tensor | None
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    def pair(y: Tensor, y_dot: Tensor) -> tuple[Tensor, Tensor]:
        return (
            torch.zeros_like(y) if y_bar is None else y_bar,
            torch.zeros_like(y) if y_bar_dot is None else y_bar_dot,
        )

    return pair


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    if any(part is None for part in parts):
        return None
    found = [part for part in parts if part is not None]
    return found[0] if len(found) == 1 else torch.cat(found, 1)
