"""The walk over the blocks: loss, gradient and curvature products of a sharded model.

Layer-major: the weights of a block are gathered once per pass, every micro-batch of this rank is
pushed through, and the weights are dropped again. Backwards, each block's part of the product is
summed over the ranks and cut into shards as soon as it is known.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Literal, final

import torch
from torch import Tensor

from hvp_core.blame import InStep, raise_first
from hvp_core.chain import Chain, MicroBatch, rows, to_device
from hvp_core.closing import joined
from hvp_core.errors import CurvatureError
from hvp_core.itinerary import Itinerary, merged, refuse_slower_ways
from hvp_core.loss import at_least_float32
from hvp_core.nonfinite import first_non_finite_block
from hvp_core.policy import Policy
from hvp_core.precision import compute_dtype, matmuls
from hvp_core.product_spec import GGN, GRADIENT, HESSIAN, LOSS, MATRICES, Passes, ProductSpec
from hvp_core.replay import Replay
from hvp_core.route import Bars, Tape, Weights
from hvp_core.routes import function_of
from hvp_core.schedule import Choice
from hvp_core.shards import Results, Sums, gathered
from hvp_core.space import Space

Kind = Literal["hessian", "ggn"]


@final
class Curvature:
    """The mean loss of a chain on a batch, as a function of θ, and its derivatives at θ.

    Args:
        chain: The model.
        space: Of its parameters.
        parameters: θ, this rank's shard. What is computed from it may be kept: put another tensor
            here to move.
        batch: The whole batch, on every rank.
        micro_batch_size: Rows that go through a block at once. Rank r of N takes every N-th
            micro-batch. Results do not depend on it.
        policy: How.

    Raises:
        CurvatureError: NO_TARGETS, MICRO_BATCH_INVALID, PRECISION_UNSUPPORTED.
    """

    def __init__(
        self,
        chain: Chain,
        space: Space,
        parameters: Tensor,
        batch: MicroBatch,
        micro_batch_size: int,
        policy: Policy | None = None,
    ):
        if micro_batch_size < 1:
            raise CurvatureError(
                "MICRO_BATCH_INVALID", f"micro_batch_size is {micro_batch_size}; give 1 or more"
            )
        self.chain = chain
        self.space = space
        self.policy = policy or Policy()
        self.num_targets = chain.loss.weight(batch.targets)
        if self.num_targets == 0:
            raise CurvatureError("NO_TARGETS", "no target of the batch counts")
        self._dtype = compute_dtype(space.dtype, self.policy.precision)
        self.parameters = parameters
        count = len(batch.targets)
        starts = range(0, count, micro_batch_size)
        rank, world_size = space.collective.rank, space.collective.world_size
        self._batches = [
            to_device(rows(batch, start, min(start + micro_batch_size, count)), space.device)
            for start in list(starts)[rank::world_size]
        ]
        pair = chain.pair(batch)
        self._itinerary = Itinerary(
            chain,
            space,
            self._batches,
            self._dtype,
            self.num_targets,
            self.policy,
            None if pair is None else to_device(pair, space.device),
        )
        self._kept_passes: Passes | None = None
        self._kept: dict[tuple[int, int], Tape] = {}
        self._closing_bars: list[Bars] = []
        self._probes: dict[int, list[Tensor]] = {}
        self._graphs: dict[Hashable, Replay | None] = {}
        self._walked: set[Hashable] = set()
        self._told: dict[int, Mapping[str, str]] = {}  # notes, by rank

    @property
    def parameters(self) -> Tensor:
        """θ, this rank's shard."""
        return self._parameters

    @parameters.setter
    def parameters(self, parameters: Tensor) -> None:
        self._parameters = parameters
        self._theta = parameters.to(self._dtype)
        self._drop()

    def _drop(self) -> None:
        """Forget what was kept for later products."""
        self._kept_passes, self._kept, self._closing_bars = None, {}, []
        self._graphs, self._walked = {}, set()

    def release(self) -> None:
        """Give back the memory of what was kept for later products."""
        self._drop()

    # The questions ------------------------------------------------------------------------------

    def loss(self) -> float:
        """L(θ). Cost: 1 GEMM pass over the data.

        Raises:
            CurvatureError: NON_FINITE, naming the first block with an infinite or undefined value.
        """
        total, last, step = 0.0, len(self.chain.blocks) - 1, InStep()
        block = self.chain.blocks[last]
        with matmuls(self.policy.precision):
            self._itinerary.prepare(LOSS, self._theta)
            xs = self._values(last, step)
            with gathered(self.space, last, block, [self._theta]) as (p,):
                for batch, x in enumerate(step.live(xs)):
                    with step.on(block.name, "the loss"):
                        for piece, target in self._itinerary.pieces(batch, x):
                            y = function_of(self._itinerary.body(last, batch, True))(p, piece)
                            total += float(self.chain.loss.value(at_least_float32(y), target))
            answers = self.space.collective.gather_objects((total, step.failure))
            raise_first(failure for _, failure in answers)
            value: float = sum(part for part, _ in answers) / self.num_targets
            if value - value != 0:  # NaN or infinite, on every rank alike
                raise first_non_finite_block(
                    self.chain, self.space, self._itinerary, self._batches, self._theta
                )
        return value

    def gradient(self) -> Tensor:
        """∇L(θ), this rank's shard. Cost: 3 GEMM passes.

        Raises:
            CurvatureError: NON_FINITE.
        """
        return self._product(GRADIENT, [])[0]

    def product(
        self, kind: Kind, vectors: Sequence[Tensor], *, borrow: bool = False
    ) -> list[Tensor]:
        """The curvature matrix times each vector.

        Args:
            kind: `hessian` or `ggn`.
            vectors: Shards (shard_numel,), of the space's type or of 16 bits. Those that `probes`
                gave are read where they are.
            borrow: The products may be overwritten by the next call, which saves copying them.

        Returns:
            Shards of the products, one for each vector, of the space's type; of 16 bits where the
            vector is: summed in float32, and rounded when a block is through.

        Raises:
            CurvatureError: NON_FINITE; DOUBLE_BACKWARD_UNSUPPORTED, naming the block.
        """
        return self._product(MATRICES[kind], vectors, borrow=borrow)

    def probes(self, count: int) -> list[Tensor]:
        """Vectors to fill and to multiply, time after time, that a CUDA graph reads where they are.

        Args:
            count: How many. Asked for again, the same ones are given.

        Returns:
            Shards (shard_numel,) of the type of the operands of matrix products; zero at first.
        """
        if count not in self._probes:
            self._probes[count] = [self.space.zeros(self._dtype) for _ in range(count)]
        return list(self._probes[count])

    def hvp(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """H v for each v. Cost in GEMM passes: 11, 8 or 6 each by schedule (see `Policy`)."""
        return self._product(HESSIAN, vectors)

    def ggn(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """G v for each v, G = Jᵀ H_out J. Cost in GEMM passes: 6, 5 or 4 each by schedule."""
        return self._product(GGN, vectors)

    def notes(self) -> dict[str, str]:
        """How products were computed, for whoever wants to reproduce or explain them.

        As of the last product, for all ranks; what only some did names them.
        """
        told = {**self._told, self.space.collective.rank: self._itinerary.notes()}
        return merged([told.get(rank, {}) for rank in range(self.space.collective.world_size)])

    # The walk -----------------------------------------------------------------------------------

    def _product(
        self, spec: ProductSpec, vectors: Sequence[Tensor], *, borrow: bool = False
    ) -> list[Tensor]:
        """The gradient (no vectors), or a product with each vector."""
        if spec.passes.forward == "tangent" and not vectors:
            return []
        if spec.passes.keeps and self._kept_passes not in (None, spec.passes):
            self._drop()
        step = InStep()
        with matmuls(self.policy.precision):
            self._itinerary.prepare(spec, self._theta)
            choices = self._itinerary.choose(spec, len(vectors))
            results = self._replayed(spec, choices, vectors, borrow)
            if results is None:
                tangents = [vector.to(self._dtype) for vector in vectors]
                results = self._walk(
                    spec, choices, tangents, Results(self.space, self._dtypes(vectors)), step
                )
        self._agree(results, f"the {spec.title}", step)
        return results

    def _replayed(
        self, spec: ProductSpec, choices: Sequence[Choice], vectors: Sequence[Tensor], borrow: bool
    ) -> list[Tensor] | None:
        """The product by a CUDA graph; None where there is none, or not yet."""
        alone = self.space.collective.world_size == 1
        if not (self.policy.graphs and alone and self.space.device.type == "cuda"):
            return None
        probes = self._probes.get(len(vectors), [])
        in_place = bool(probes) and all(a is b for a, b in zip(vectors, probes, strict=True))
        dtypes = self._dtypes(vectors)
        key = spec, tuple(dtypes), in_place
        if key not in self._walked:  # kernels are compiled, tapes are kept
            self._walked.add(key)
            return None
        if key not in self._graphs:
            self._graphs[key] = Replay.capture(
                lambda inputs, outputs: self._walk(
                    spec, choices, inputs, Results(self.space, dtypes, outputs), InStep(alone=True)
                ),
                probes if in_place else [self.space.zeros(self._dtype) for _ in vectors],
                [self.space.zeros(dtype) for dtype in dtypes],
            )
        replay = self._graphs[key]
        return None if replay is None else replay(vectors, borrow=borrow)

    def _dtypes(self, vectors: Sequence[Tensor]) -> list[torch.dtype]:
        """Of the products: the vectors' own where that is of 16 bits, or one for the gradient."""
        space = self.space.dtype
        found = [each.dtype if each.itemsize == 2 else space for each in vectors]
        return found or [space]

    def _walk(
        self,
        spec: ProductSpec,
        choices: Sequence[Choice],
        tangents: Sequence[Tensor],
        results: Results,
        step: InStep,
    ) -> list[Tensor]:
        """Forward, through the loss, and backward."""
        shards = [self._theta, *tangents]
        bars, tapes = self._forward(spec, choices, shards, results, step)
        for index in reversed(range(len(self.chain.blocks) - 1)):
            block, choice = self.chain.blocks[index], choices[index]
            with (
                gathered(self.space, index, block, shards) as (p, *vs),
                results.block(index) as sums,
                step.on(block.name, "the derivative backward"),
            ):
                weights = Weights(p, vs)
                for batch, bar in enumerate(step.live(bars)):
                    tape = tapes.pop((index, batch))
                    route = self._itinerary.route_of[index, batch]
                    bars[batch] = route.backward(spec.passes, choice.way, weights, tape, bar, sums)
                    if choice.cached:
                        tape.complete, tape.tangents = True, []
                        self._kept[index, batch] = tape
                        self._kept_passes = spec.passes
        return results.finish()

    def _forward(
        self,
        spec: ProductSpec,
        choices: Sequence[Choice],
        shards: Sequence[Tensor],
        results: Results,
        step: InStep,
    ) -> tuple[list[Bars], dict[tuple[int, int], Tape]]:
        """Up to the loss and back through the last block: cotangents of its input, and tapes."""
        last = len(self.chain.blocks) - 1
        xs = [self.chain.first_input(batch) for batch in self._batches]
        dots: list[list[Tensor | None]] = [[None for _ in shards[1:]] for _ in xs]
        tapes: dict[tuple[int, int], Tape] = {}
        kept = self._kept if spec.passes == self._kept_passes else {}
        for index in range(last):
            block, way = self.chain.blocks[index], choices[index].way
            with (
                gathered(self.space, index, block, shards) as (p, *vs),
                step.on(block.name, "the derivative forward"),
            ):
                weights = Weights(p, vs)
                for batch, x in enumerate(step.live(xs)):
                    route = self._itinerary.route(index, batch, p, x)
                    xs[batch], dots[batch], tapes[index, batch] = route.forward(
                        spec.passes, way, weights, x, dots[batch], kept.get((index, batch))
                    )
        pair = spec.passes.backward == "pair"
        known = pair and bool(self._closing_bars)
        bars: list[Bars] = []
        with (
            gathered(self.space, last, self.chain.blocks[last], shards) as (p, *vs),
            results.block(last) as sums,
            step.on(self.chain.blocks[last].name, "its derivatives and the loss's"),
        ):
            for batch, x in enumerate(step.live(xs)):
                found = self._close(spec, Weights(p, vs), batch, x, dots[batch], sums, not known)
                bars.append(Bars(self._closing_bars[batch].primal, found.dots) if known else found)
        if pair and any(each.cached for each in choices):
            self._closing_bars = [Bars(each.primal, []) for each in bars]
        return bars, tapes

    def _close(
        self,
        spec: ProductSpec,
        weights: Weights,
        batch: int,
        x: Tensor,
        x_dots: Sequence[Tensor | None],
        sums: Sequence[Sums],
        wants_primal: bool,
    ) -> Bars:
        """The last block and the loss, piece by piece."""
        pieces = list(self._itinerary.pieces(batch, x))
        tangents = [
            [None for _ in pieces]
            if dot is None
            else [each for each, _ in self._itinerary.pieces(batch, dot)]
            for dot in x_dots
        ]
        found = []
        for index, (piece, target) in enumerate(pieces):
            closing = self._itinerary.closing(spec, batch, index, weights.p, piece, target)
            dots = [each[index] for each in tangents]
            found.append(closing.run(weights, piece, dots, sums, wants_primal=wants_primal))
        return joined(found)

    def _values(self, stop: int, step: InStep) -> list[Tensor]:
        """The input of block `stop` for every micro-batch of this rank."""
        xs = [self.chain.first_input(batch) for batch in self._batches]
        for index, block in enumerate(self.chain.blocks[:stop]):
            with (
                gathered(self.space, index, block, [self._theta]) as (p,),
                step.on(block.name, "its value"),
            ):
                for batch, x in enumerate(step.live(xs)):
                    xs[batch] = self._itinerary.route(index, batch, p, x).value(p, x)
        return xs

    # Failure ------------------------------------------------------------------------------------

    def _agree(self, shards: Sequence[Tensor], what: str, step: InStep) -> None:
        """Exchange, once a product, what a rank alone knows of it: is it one, and how was it made.

        Raises:
            CurvatureError: NON_FINITE; what was raised on a rank; under a strict policy
                MODEL_UNSUPPORTED where a slower way was taken.
        """
        # One pass: what is not finite leaves no finite sum. The converse needs a closer look.
        fine = all(bool(shard.sum().isfinite()) or bool(shard.isfinite().all()) for shard in shards)
        own, rank = self._itinerary.notes(), self.space.collective.rank
        told = None if own == self._told.get(rank) else own
        answers = self.space.collective.gather_objects((fine, step.failure, told))
        self._told.update(
            {rank: told for rank, (*_, told) in enumerate(answers) if told is not None}
        )
        if any(failure is not None for _, failure, _ in answers):
            self._drop()
            raise_first(failure for _, failure, _ in answers)
        if self.policy.strict:
            refuse_slower_ways(self.notes())
        if all(fine for fine, *_ in answers):
            return
        self._drop()
        self.loss()  # says which block, if the loss itself is at fault
        raise CurvatureError(
            "NON_FINITE", f"{what} is not finite although the loss is; use float64"
        )
