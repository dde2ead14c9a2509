"""The executors of one operator, found and checked before its first product."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import final

import torch
from torch import Tensor

from hvp_core.autodiff.builder import ExecutorBuilder
from hvp_core.autodiff.comparison import Comparer
from hvp_core.autodiff.compiler import COMPILER
from hvp_core.autodiff.eager import EagerExecutor, EagerHead
from hvp_core.autodiff.executor import BlockExecutor, Bytes, HeadExecutor, ParamsAndTangents
from hvp_core.autodiff.passes import Retention
from hvp_core.autodiff.product_spec import LOSS, ProductSpec
from hvp_core.autodiff.reference import Params
from hvp_core.autodiff.selected_parameters import SelectedParameters
from hvp_core.autodiff.sums import Accumulator
from hvp_core.autodiff.verify import Verifier
from hvp_core.blame import raised_again, working_on
from hvp_core.curvature.drawn_labels import DrawnLabels
from hvp_core.curvature.executors import Executors
from hvp_core.curvature.retention import PINNED_BYTES, BlockRetention, choose, pinned
from hvp_core.curvature.sweep import ParameterFeed, sweep
from hvp_core.errors import CurvatureError
from hvp_core.model.chain import Block, Body, Chain, MicroBatch, function_of
from hvp_core.model.rows import RowCheck
from hvp_core.precision import exact_products, listening
from hvp_core.settings import ComputeSettings
from hvp_core.vectors.space import ParameterSpace

_USABLE = 0.7  # of the memory that is free, for what blocks keep; the rest is for the work itself


@final
class ExecutorTable(Executors):
    """The executor of each block with each micro-batch of this rank.

    Args:
        chain: The model.
        space: Space of the vectors: their parameters are the selected ones.
        batches: This rank's micro-batches.
        dtype: The dtype of the operands of products.
        num_targets: Number of targets of the whole batch, which derivatives of the loss are divided
            by.
        settings: How products are computed.
        pair: Two rows of the whole batch, as `Chain.pair` gives them.
        labels: Labels drawn from the model, for products that read those.

    Raises:
        CurvatureError: MODEL_UNSUPPORTED: a micro-batch's constants cannot be made.
    """

    def __init__(
        self,
        chain: Chain,
        space: ParameterSpace,
        batches: Sequence[MicroBatch],
        dtype: torch.dtype,
        num_targets: float,
        settings: ComputeSettings,
        pair: MicroBatch | None,
        labels: DrawnLabels,
    ):
        self._chain, self._space, self._batches = chain, space, batches
        self.selected = SelectedParameters(chain, space)
        self._dtype, self._num_targets, self._settings = dtype, num_targets, settings
        # Constants are the model's own, in the model's own arithmetic.
        with (
            space.collective.same_fate(raised_again),
            working_on("constants", "the masks and positions of the layers"),
        ):
            self._contexts = [chain.context(each) for each in batches]
        self._builder = ExecutorBuilder(chain, settings)
        #: As `ComputeSettings.budget_bytes`.
        self.budget_bytes = settings.budget_bytes
        self._pair, self._labels = pair, labels
        self.executor_of: dict[tuple[int, int], BlockExecutor] = {}
        #: Shape of a row of the output, once a product has asked for it; None on ranks without
        #: rows.
        self.output_shape: tuple[int, ...] | None = None
        self._head_of: dict[tuple[ProductSpec, int, int], HeadExecutor] = {}
        self._traces_head = True
        self._prepared: set[ProductSpec] = set()
        self._choices: dict[tuple[ProductSpec, int], list[BlockRetention]] = {}
        self._compile_seconds_before = COMPILER.seconds

    def prepare(self, spec: ProductSpec, feed: ParameterFeed) -> None:
        """Find the executor of every block, and see that it is right, before the first walk.

        Only shapes are walked: no block that can be traced is computed at full size. A second call
        for the same product returns at once.

        Args:
            spec: The product that is going to be computed.
            feed: Brings the parameters of each block.

        Raises:
            CurvatureError: DOUBLE_BACKWARD_UNSUPPORTED or MODEL_UNSUPPORTED, naming the block. All
                ranks raise it, also those that have no micro-batch and would never have met it.
        """
        spec = spec.program
        if spec in self._prepared:
            return
        verifier = None
        if spec is not LOSS:
            plain = ComputeSettings(deterministic=self._settings.deterministic)
            builder = ExecutorBuilder(self._chain, plain)
            verifier = Verifier(
                self._chain,
                self._batches,
                spec,
                builder.head,
                Comparer(self._chain.loss, spec, builder.of),
                self.selected,
                self._space.collective,
            )
        takes_rows = RowCheck(self._chain, None if self._prepared else self._pair)
        last = len(self._chain.blocks) - 1
        xs: list[Tensor] = []

        def visit(index: int, weights: ParamsAndTangents, _: Sequence[Accumulator]) -> None:
            block, p = self._chain.blocks[index], weights.p
            if index == 0:
                xs[:] = [self._chain.first_input(batch) for batch in self._batches]
            with listening() as remarks:
                takes_rows(block, p)
                before = [x.shape for x in xs]
                if index < last:
                    for batch, x in enumerate(xs):
                        xs[batch] = self.executor(index, batch, p, x).like(p, x)
                elif "outputs" in (spec.given, spec.measured) and xs:
                    self._look_at_output(p, xs[0])
                if verifier is not None:
                    with exact_products():
                        if index == last:
                            verifier.head(p)
                        else:
                            keeps_shape = index > 0 and before == [x.shape for x in xs]
                            executor = self.executor_of.get((index, 0))
                            verifier.block(index, p, executor, keeps_shape=keeps_shape)
                self._builder.remark(block.name, remarks)

        def guard(block: Block) -> AbstractContextManager[object]:
            stack = ExitStack()
            stack.enter_context(self._space.collective.same_fate(raised_again))
            stack.enter_context(working_on(block.name, f"its preparation for the {spec.title}"))
            return stack

        sweep(feed, range(last + 1), visit, guard)
        if verifier is not None:
            with exact_products():
                again = verifier.settle()
            if again:
                sweep(feed, range(last + 1), visit, guard)
            if self._settings.deterministic:
                self._require_traces(verifier.contradicted)
            else:
                for index in verifier.wrong:
                    self._refuse(index)
        self._prepared.add(spec)

    @torch.no_grad()
    def _look_at_output(self, p: Params, x: Tensor) -> None:
        """Learn the shape of a row of the output from a piece of the last block's input."""
        pieces = list(self.pieces(0, x))
        y = function_of(self.body(len(self._chain.blocks) - 1, 0, True))(p, pieces[0][0])
        self.output_shape = tuple(y.shape[1:])
        if len(pieces) > 1:
            self.output_shape = (x.shape[1], *y.shape[2:])

    def _require_traces(self, contradicted: Sequence[int]) -> None:
        """See that torch contradicts no trace, on any rank.

        A block whose trace it contradicts for one product goes another way from then on, in every
        product: the bits of these would depend on what was asked before.

        Raises:
            CurvatureError: DETERMINISM_UNSUPPORTED, naming the block.
        """
        for indices in self._space.collective.gather_objects(list(contradicted)):
            for index in indices:
                name = self._chain.blocks[index].name
                raise CurvatureError(
                    "DETERMINISM_UNSUPPORTED",
                    f"torch does not confirm the trace of block {name}, so that the way it is "
                    "computed depends on what was asked before; ask without deterministic",
                    {"block": name},
                )

    def _refuse(self, index: int) -> None:
        """Let torch differentiate a block, whose trace is not the block."""
        name = self._chain.blocks[index].name
        self._builder.record_fallback(
            name, "torch does not confirm its trace: it is differentiated line by line"
        )
        if index == len(self._chain.blocks) - 1:
            self._traces_head = False
            self._head_of.clear()  # what another product has made of that trace too
            return
        for batch in range(len(self._batches)):
            body = self.body(index, batch, True)
            self.executor_of[index, batch] = EagerExecutor(
                function_of(body), self.selected.links[index].selected
            )

    def body(self, index: int, batch: int, dense: bool) -> Body:
        """See Executors."""
        return self._chain.blocks[index].body(self._contexts[batch], dense).cast(self._dtype)

    def executor(self, index: int, batch: int, p: Params, x: Tensor) -> BlockExecutor:
        """See Executors."""
        if (index, batch) not in self.executor_of:
            self.executor_of[index, batch] = self._builder.of(
                self.selected.links[index], lambda dense: self.body(index, batch, dense), p, x
            )
        return self.executor_of[index, batch]

    def head(
        self, spec: ProductSpec, batch: int, piece: int, p: Params, x: Tensor, target: Tensor
    ) -> HeadExecutor:
        """See Executors."""
        key = spec, batch, piece
        if key not in self._head_of:
            self._forget_labels()
            self._head_of[key] = self._close(spec, batch, p, x, target)
        return self._head_of[key]

    def _forget_labels(self) -> None:
        """Drop the heads of labels that are not kept."""
        self._head_of = {
            key: head
            for key, head in self._head_of.items()
            if key[0].draws is None or key[0].draws in self._labels
        }

    def drop_labels(self) -> None:
        """Forget all drawn labels: θ is another."""
        self._labels.drop()
        self._forget_labels()

    def _close(
        self, spec: ProductSpec, batch: int, p: Params, x: Tensor, target: Tensor
    ) -> HeadExecutor:
        last = len(self._chain.blocks) - 1
        link, loss, scale = self.selected.links[last], self._chain.loss, 1 / self._num_targets
        if spec.given == "outputs":
            scale = 1.0
        body = self.body(last, batch, True)
        if not self._traces_head:
            return EagerHead(function_of(body), link.selected, spec, loss, target, scale)
        return self._builder.head(spec, link, body, loss, p, x, target, scale)

    def choose(self, spec: ProductSpec, num_probes: int) -> list[BlockRetention]:
        """What every block keeps that has a derivative, but for the last block.

        The choice is made once for each product and number of probes, from the memory that is free
        then.

        Raises:
            CurvatureError: DETERMINISTIC_MEMORY, on all ranks alike.
        """
        spec = spec.program
        blocks = range(self.selected.first, len(self._chain.blocks) - 1)
        if not spec.passes.keeps:
            way: Retention = "lean" if self._settings.schedule == "lean" else "fast"
            if spec.passes.forward == "tangent" and num_probes > 1:
                way = "shared"  # keeps nothing, for nothing goes back
            return [BlockRetention(way, False) for _ in blocks]
        key = spec, num_probes
        if key not in self._choices:
            sizes = []
            for index in blocks:
                each = [
                    self.executor_of[index, batch].kept_bytes(spec.passes, num_probes)
                    for batch in range(len(self._batches))
                ]
                sizes.append(
                    Bytes(*[sum(column) for column in zip(Bytes(0, 0, 0, 0), *each, strict=True)])
                )
            budget = self.budget_bytes
            if budget is None:
                budget = int(_USABLE * self._space.free_bytes())
            self._choices[key] = self._chosen(sizes, budget, num_probes)
        return self._choices[key]

    def _chosen(self, sizes: Sequence[Bytes], budget: int, num_probes: int) -> list[BlockRetention]:
        schedule = self._settings.schedule
        if not self._settings.deterministic:
            return choose(schedule, sizes, budget, num_probes)
        most = PINNED_BYTES[self._space.device.type]
        with self._space.collective.same_fate(raised_again):
            return pinned(schedule, sizes, budget, most)

    def targets(self, spec: ProductSpec, batch: int) -> Tensor:
        """See Executors."""
        return (
            self._batches[batch].targets if spec.draws is None else self._labels[spec.draws][batch]
        )

    def pieces(
        self, batch: int, x: Tensor, targets: Tensor | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """See Executors."""
        targets = self._batches[batch].targets if targets is None else targets
        pieces = self._chain.pieces(x)
        if not pieces:
            yield x, targets
        for piece in pieces:
            yield x[:, piece].contiguous(), targets[:, piece].contiguous()

    def notes(self) -> dict[str, str]:
        """How this rank computes products, for whoever wants to reproduce or explain them."""
        found = {"precision": self._settings.precision, **self._chain.notes}
        if self._settings.compile:
            found["compiled_parts"] = str(COMPILER.compiled)
            found["compile_seconds"] = f"{COMPILER.seconds - self._compile_seconds_before:.1f}"
            if COMPILER.refused:
                found["not_compiled"] = f"{len(COMPILER.refused)}: {COMPILER.refused[-1]}"
        for (spec, num_probes), choices in self._choices.items():
            tells = not self._settings.deterministic  # what changes no bit is left out then
            names = ["cached" if each.cached and tells else each.way for each in choices]
            counts = {name: names.count(name) for name in dict.fromkeys(names)}
            key = f"schedule_{spec.name}{f'_of_{num_probes}' if num_probes > 1 else ''}"
            found[key] = ", ".join(f"{count} {name}" for name, count in counts.items())
        for name, why in self._builder.fallbacks.items():
            found[f"fallback_{name}"] = why
        for name, remark in self._builder.remarks.items():
            found[f"remark_{name}"] = remark
        return found
