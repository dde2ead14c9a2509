"""The walk over the blocks: loss, gradient and curvature products of a sharded model.

Layer-major: the weights of a block are gathered once per pass, every micro-batch of this rank is
pushed through, and the weights are dropped again. Backwards, each block's part of the product is
summed over the ranks and cut into shards as soon as it is known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, final

import torch
from torch import Tensor

from hvp_core.block_dual import Mode, Way
from hvp_core.chain import Body, Chain, MicroBatch, rows, to_device
from hvp_core.closing import Closing, joined
from hvp_core.compiler import COMPILER
from hvp_core.dual import Params
from hvp_core.errors import CurvatureError
from hvp_core.policy import Policy
from hvp_core.precision import compute_dtype, exact, matmuls
from hvp_core.replay import Replay
from hvp_core.route import Bars, Eager, Route, Tape, Traced, Weights
from hvp_core.routes import Routes, function_of
from hvp_core.schedule import Bytes, Choice, choose
from hvp_core.shards import Results, Sums, gathered
from hvp_core.space import Space
from hvp_core.verify import Verifier

Kind = Literal["hessian", "ggn"]

_USABLE = 0.7  # of the memory that is free, for what blocks keep; the rest is for the work itself


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
        # Constants are the model's own, in the model's own arithmetic.
        with space.collective.same_fate(_unsupported("the model's constants")):
            self._contexts = [chain.context(each) for each in self._batches]
        self._routes = Routes(self.policy)
        self._compile_seconds_before = COMPILER.seconds
        self._route_of: dict[tuple[int, int], Route] = {}
        self._closing_of: dict[tuple[int, int], Closing] = {}
        self._prepared: set[Mode] = set()
        self._kept_mode: Mode | None = None
        self._kept: dict[tuple[int, int], Tape] = {}
        self._closing_bars: list[Bars] = []
        self._graphs: dict[tuple[Mode, int], Replay | None] = {}
        self._walked: dict[tuple[Mode, int], int] = {}
        self._choices: dict[tuple[Mode, bool], list[Choice]] = {}

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
        self._kept_mode, self._kept, self._closing_bars = None, {}, []
        self._graphs, self._walked = {}, {}

    # The questions ------------------------------------------------------------------------------

    def loss(self) -> float:
        """L(θ). Cost: 1 GEMM pass over the data.

        Raises:
            CurvatureError: NON_FINITE, naming the first block with an infinite or undefined value.
        """
        total = torch.zeros(1, dtype=torch.float64)
        last = len(self.chain.blocks) - 1
        with matmuls(self.policy.precision):
            self._prepare("loss")
            xs = self._values(last)
            with gathered(self.space, last, self.chain.blocks[last], [self._theta]) as (p,):
                for batch, x in enumerate(xs):
                    for piece, target in self._pieces(batch, x):
                        y = function_of(self._body(last, batch, True))(p, piece)
                        total += self.chain.loss.value(y, target).cpu()
        value = float(self.space.collective.sum(total)) / self.num_targets
        if value - value != 0:  # NaN or infinite, on every rank alike
            raise self._first_non_finite_block()
        return value

    def gradient(self) -> Tensor:
        """∇L(θ), this rank's shard. Cost: 3 GEMM passes.

        Raises:
            CurvatureError: NON_FINITE.
        """
        return self._product("gradient", [])[0]

    def product(
        self, kind: Kind, vectors: Sequence[Tensor], *, borrow: bool = False
    ) -> list[Tensor]:
        """The curvature matrix times each vector.

        Args:
            kind: `hessian` or `ggn`.
            vectors: Shards (shard_numel,).
            borrow: The products may be overwritten by the next call, which saves copying them.

        Returns:
            Shards of the products.

        Raises:
            CurvatureError: NON_FINITE; DOUBLE_BACKWARD_UNSUPPORTED, naming the block.
        """
        return self._product(kind, vectors, borrow=borrow)

    def hvp(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """H v for each v. Cost in GEMM passes: 11, 8 or 6 each by schedule (see `Policy`)."""
        return self._product("hessian", vectors)

    def ggn(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """G v for each v, G = Jᵀ H_out J. Cost in GEMM passes: 6, 5 or 4 each by schedule."""
        return self._product("ggn", vectors)

    def notes(self) -> dict[str, str]:
        """How the last product was computed, for whoever wants to reproduce or explain it."""
        found = {"precision": self.policy.precision}
        if self.policy.compile:
            found["compiled_parts"] = str(COMPILER.compiled)
            found["compile_seconds"] = f"{COMPILER.seconds - self._compile_seconds_before:.1f}"
            if COMPILER.refused:
                found["not_compiled"] = f"{len(COMPILER.refused)}: {COMPILER.refused[-1]}"
        for (mode, several), choices in self._choices.items():
            names = ["cached" if each.cached else each.way for each in choices]
            counts = {name: names.count(name) for name in dict.fromkeys(names)}
            key = f"schedule_{mode}{'_several' if several else ''}"
            found[key] = ", ".join(f"{count} {name}" for name, count in counts.items())
        for name, why in self._routes.fallbacks.items():
            found[f"fallback_{name}"] = why
        return found

    # The walk -----------------------------------------------------------------------------------

    def _product(
        self, mode: Mode, vectors: Sequence[Tensor], *, borrow: bool = False
    ) -> list[Tensor]:
        """The gradient (no vectors), or a product with each vector."""
        if self._kept_mode not in (None, mode) and mode != "gradient":
            self._drop()
        with matmuls(self.policy.precision):
            self._prepare(mode)
            choices = self._choose(mode, len(vectors))
            results = self._replayed(mode, choices, vectors, borrow)
            if results is None:
                tangents = [vector.to(self._dtype) for vector in vectors]
                results = self._walk(mode, choices, tangents, None)
        self._check_finite(results, "the gradient" if mode == "gradient" else "the product")
        return results

    def _replayed(
        self, mode: Mode, choices: Sequence[Choice], vectors: Sequence[Tensor], borrow: bool
    ) -> list[Tensor] | None:
        """The product by a CUDA graph; None where there is none, or not yet."""
        alone = self.space.collective.world_size == 1
        if not (self.policy.graphs and alone and self.space.device.type == "cuda"):
            return None
        key = mode, len(vectors)
        if self._walked.get(key, 0) < 1:  # kernels are compiled, tapes are kept
            self._walked[key] = 1
            return None
        if key not in self._graphs:
            self._graphs[key] = Replay.capture(
                lambda inputs, outputs: self._walk(mode, choices, inputs, outputs),
                [torch.empty_like(vector, dtype=self._dtype) for vector in vectors],
                [torch.empty_like(self._parameters) for _ in vectors or [None]],
            )
        replay = self._graphs[key]
        return None if replay is None else replay(vectors, borrow=borrow)

    def _walk(
        self,
        mode: Mode,
        choices: Sequence[Choice],
        tangents: Sequence[Tensor],
        into: Sequence[Tensor] | None,
    ) -> list[Tensor]:
        """Forward, through the loss, and backward."""
        results = Results(self.space, max(1, len(tangents)), into)
        shards = [self._theta, *tangents]
        bars, tapes = self._forward(mode, choices, shards, results)
        for index in reversed(range(len(self.chain.blocks) - 1)):
            block, choice = self.chain.blocks[index], choices[index]
            with (
                gathered(self.space, index, block, shards) as (p, *vs),
                results.block(index) as sums,
            ):
                weights = Weights(p, vs)
                for batch, bar in enumerate(bars):
                    tape = tapes.pop((index, batch))
                    route = self._route_of[index, batch]
                    bars[batch] = route.backward(mode, choice.way, weights, tape, bar, sums)
                    if choice.cached:
                        tape.complete, tape.tangents = True, []
                        self._kept[index, batch] = tape
                        self._kept_mode = mode
        return results.finish()

    def _forward(
        self,
        mode: Mode,
        choices: Sequence[Choice],
        shards: Sequence[Tensor],
        results: Results,
    ) -> tuple[list[Bars], dict[tuple[int, int], Tape]]:
        """Up to the loss and back through the last block: cotangents of its input, and tapes."""
        last = len(self.chain.blocks) - 1
        xs = [self.chain.first_input(batch) for batch in self._batches]
        dots: list[list[Tensor | None]] = [[None for _ in shards[1:]] for _ in xs]
        tapes: dict[tuple[int, int], Tape] = {}
        for index in range(last):
            block, way = self.chain.blocks[index], choices[index].way
            with gathered(self.space, index, block, shards) as (p, *vs):
                weights = Weights(p, vs)
                for batch, x in enumerate(xs):
                    route = self._route(index, batch, p, x)
                    xs[batch], dots[batch], tapes[index, batch] = route.forward(
                        mode, way, weights, x, dots[batch], self._kept.get((index, batch))
                    )
        known = bool(self._closing_bars) and mode == "hessian"
        bars = []
        with (
            gathered(self.space, last, self.chain.blocks[last], shards) as (p, *vs),
            results.block(last) as sums,
        ):
            for batch, x in enumerate(xs):
                found = self._close(mode, Weights(p, vs), batch, x, dots[batch], sums, not known)
                bars.append(Bars(self._closing_bars[batch].primal, found.dots) if known else found)
        if mode == "hessian" and any(each.cached for each in choices):
            self._closing_bars = [Bars(each.primal, []) for each in bars]
        return bars, tapes

    def _close(
        self,
        mode: Mode,
        weights: Weights,
        batch: int,
        x: Tensor,
        x_dots: Sequence[Tensor | None],
        sums: Sequence[Sums],
        wants_primal: bool,
    ) -> Bars:
        """The last block and the loss, piece by piece."""
        pieces = list(self._pieces(batch, x))
        tangents = [
            [None for _ in pieces]
            if dot is None
            else [each for each, _ in self._pieces(batch, dot)]
            for dot in x_dots
        ]
        found = []
        for index, (piece, target) in enumerate(pieces):
            closing = self._closing(batch, index, weights.p, piece, target)
            dots = [each[index] for each in tangents]
            found.append(closing.run(mode, weights, piece, dots, sums, wants_primal=wants_primal))
        return joined(found)

    def _pieces(self, batch: int, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """What of the last block's input goes through it at once, with its targets."""
        targets = self._batches[batch].targets
        pieces = self.chain.pieces(x)
        if not pieces:
            yield x, targets
        for piece in pieces:
            yield x[:, piece].contiguous(), targets[:, piece].contiguous()

    def _values(self, stop: int) -> list[Tensor]:
        """The input of block `stop` for every micro-batch of this rank."""
        xs = [self.chain.first_input(batch) for batch in self._batches]
        for index in range(stop):
            with gathered(self.space, index, self.chain.blocks[index], [self._theta]) as (p,):
                xs = [self._route(index, batch, p, x).value(p, x) for batch, x in enumerate(xs)]
        return xs

    # Routes -------------------------------------------------------------------------------------

    def _prepare(self, mode: Mode) -> None:
        """Find the route of every block, and see that it is right, before the first walk.

        Only shapes are walked: no block is computed at full size.

        Raises:
            CurvatureError: DOUBLE_BACKWARD_UNSUPPORTED, naming the block, on all ranks: also on
                those that have no micro-batch and would never have met it.
        """
        if mode in self._prepared:
            return
        verifier = None if mode == "loss" else Verifier(self.chain, self._batches[:1], mode)
        last = len(self.chain.blocks) - 1
        xs = [self.chain.first_input(batch) for batch in self._batches]
        for index, block in enumerate(self.chain.blocks):
            with gathered(self.space, index, block, [self._theta]) as (p,):
                with self.space.collective.same_fate(_unsupported(f"block {block.name}")):
                    if index < last:
                        for batch, x in enumerate(xs):
                            route = self._route(index, batch, p, x)
                            xs[batch] = route.like(p, x)
                    if verifier is not None:
                        self._verify(verifier, index, p)
        self._prepared.add(mode)

    def _verify(self, verifier: Verifier, index: int, p: Params) -> None:
        route = self._route_of.get((index, 0))
        found = verifier.check(index, p, route)
        if route is None or found is route:
            return
        for batch in range(len(self._batches)):
            body = self._body(index, batch, True)
            self._route_of[index, batch] = Eager(function_of(body))

    def _body(self, index: int, batch: int, dense: bool) -> Body:
        """A block's body, its constants in the precision of the products."""
        return self.chain.blocks[index].body(self._contexts[batch], dense).cast(self._dtype)

    def _route(self, index: int, batch: int, p: Params, x: Tensor) -> Route:
        if (index, batch) not in self._route_of:
            block = self.chain.blocks[index]
            with exact():
                self._route_of[index, batch] = self._routes.of(
                    block.name,
                    block.parameters,
                    lambda dense: self._body(index, batch, dense),
                    p,
                    x,
                    index == 0,
                )
        return self._route_of[index, batch]

    def _closing(self, batch: int, piece: int, p: Params, x: Tensor, target: Tensor) -> Closing:
        if (batch, piece) not in self._closing_of:
            last = len(self.chain.blocks) - 1
            block = self.chain.blocks[last]
            with exact():
                self._closing_of[batch, piece] = self._routes.closing(
                    block.name,
                    block.parameters,
                    self._body(last, batch, True),
                    self.chain.loss,
                    p,
                    x,
                    last == 0,
                    target,
                    1 / self.num_targets,
                )
        return self._closing_of[batch, piece]

    def _choose(self, mode: Mode, num_probes: int) -> list[Choice]:
        """The way of every block but the last."""
        blocks = range(len(self.chain.blocks) - 1)
        if mode == "gradient":
            way: Way = "lean" if self.policy.schedule == "lean" else "fast"
            return [Choice(way, False) for _ in blocks]
        key = mode, num_probes > 1
        if key not in self._choices:
            sizes = []
            for index in blocks:
                each = [
                    _sizes(self._route_of[index, batch], mode, num_probes)
                    for batch in range(len(self._batches))
                ]
                sizes.append(
                    Bytes(*[sum(column) for column in zip(Bytes(0, 0, 0, 0), *each, strict=True)])
                )
            budget = self.policy.budget_bytes
            if budget is None:
                budget = int(_USABLE * self.space.free_bytes())
            self._choices[key] = choose(self.policy.schedule, sizes, budget, num_probes)
        return self._choices[key]

    # Failure ------------------------------------------------------------------------------------

    def _first_non_finite_block(self) -> CurvatureError:
        """Walk again, looking at every block; all ranks come to the same answer."""
        names = [block.name for block in self.chain.blocks]
        first = len(names)
        xs = [self.chain.first_input(batch) for batch in self._batches]
        for index, block in enumerate(self.chain.blocks):
            with gathered(self.space, index, block, [self._theta]) as (p,):
                if index < len(names) - 1:
                    xs = [self._route(index, batch, p, x).value(p, x) for batch, x in enumerate(xs)]
                else:
                    xs = [
                        function_of(self._body(index, batch, True))(p, x)
                        for batch, x in enumerate(xs)
                    ]
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
        # One pass: what is not finite leaves no finite sum. The converse needs a closer look.
        fine = all(bool(shard.sum().isfinite()) or bool(shard.isfinite().all()) for shard in shards)
        if all(self.space.collective.gather_objects(fine)):
            return
        self._drop()
        self.loss()  # says which block, if the loss itself is at fault
        raise CurvatureError(
            "NON_FINITE", f"{what} is not finite although the loss is; use float64"
        )


def _sizes(route: Route, mode: Mode, num_probes: int) -> Bytes:
    """What a route would keep of one micro-batch."""
    if not isinstance(route, Traced):
        return Bytes(0, 0, 0, 0)
    dual = route.dual
    shared, cached = dual.kept_bytes(mode, "shared"), dual.shared_bytes(mode)
    return Bytes(
        dual.kept_bytes(mode, "lean") * num_probes,
        dual.kept_bytes(mode, "fast"),
        shared * num_probes,
        cached,
    )


def _unsupported(what: str) -> Callable[[Exception], CurvatureError]:
    def explain(error: Exception) -> CurvatureError:
        words = f"{what}: {type(error).__name__}: {str(error)[:300]}"
        if "allocate" in words or isinstance(error, MemoryError):
            return CurvatureError("OUT_OF_MEMORY", f"{words}; use a smaller micro-batch")
        return CurvatureError("MODEL_UNSUPPORTED", f"{words}; this model cannot be walked")

    return explain
