"""The walk over the blocks: loss, gradient and curvature products of a sharded model.

Layer-major: the weights of a block are gathered once per pass, every micro-batch of this rank is
pushed through, and the weights are dropped again. Backwards, each block's part of the product is
summed over the ranks and cut into shards as soon as it is known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import final

import torch
from torch import Tensor

from hvp_core.autodiff.executor import ParamsAndTangents
from hvp_core.autodiff.product_spec import (
    CENTRED,
    GRADIENT,
    HESSIAN,
    LOSS,
    OUTPUT_JVP,
    OUTPUT_VJP,
    SLOPES,
    Draws,
    ProductSpec,
    Unit,
    gradient_of_factors,
    matrix,
)
from hvp_core.autodiff.sums import Accumulator
from hvp_core.blame import InStep, raise_first
from hvp_core.curvature.drawn_labels import DrawnLabels, uniform_numbers
from hvp_core.curvature.exchange import Exchange, refuse_slower_ways
from hvp_core.curvature.executor_table import ExecutorTable
from hvp_core.curvature.factor_sums import FactorSums
from hvp_core.curvature.graphed_product import GraphedProducts
from hvp_core.curvature.kronecker import KroneckerFactors
from hvp_core.curvature.mean_gradient import MeanGradient
from hvp_core.curvature.nonfinite import first_non_finite_block
from hvp_core.curvature.passage import Passage
from hvp_core.curvature.retention import BlockRetention
from hvp_core.curvature.shards import Collector, Results
from hvp_core.curvature.sweep import ParameterFeed, sweep
from hvp_core.errors import CurvatureError
from hvp_core.model.chain import Chain, MicroBatch, placed, rows
from hvp_core.model.places import Observed, Observer, Place
from hvp_core.precision import arithmetic, compute_dtype
from hvp_core.settings import ComputeSettings
from hvp_core.vectors.output_space import OutputSpace
from hvp_core.vectors.space import ParameterSpace, ShardedSpace


@final
class Curvature:
    """The mean loss of a chain on a batch, as a function of θ, and its derivatives at θ.

    Args:
        chain: The model.
        space: Space of all of its parameters.
        parameters: θ, this rank's shard. What is computed from it may be kept: to move to another
            θ, assign another tensor to the attribute `parameters`.
        batch: The whole batch, on every rank.
        micro_batch_size: Rows that go through a block at once. Rank r of N takes every N-th
            micro-batch. Results do not depend on it.
        settings: How products are computed.
        selected: Space of the vectors, if these have only some of the parameters (see
            `ParameterSpace.part`); all other parameters are constants. None: vectors of all.
        labels: Labels drawn from the model for the same cut of the batch, which a Fisher matrix is
            to have; None: it draws its own.
        recorded: Further fields of each of this rank's micro-batches, where the chain has any.

    Attributes:
        space: Space of the vectors.
        labels: The labels that Fisher matrices have.
        micro_batch_size: Rows that go through a block at once.
        theta_space: Space of all parameters, of which `parameters` is the point.

    Raises:
        CurvatureError: NO_TARGETS: no target of the batch counts; MICRO_BATCH_INVALID: the size is
            below 1; PRECISION_UNSUPPORTED.
    """

    def __init__(
        self,
        chain: Chain,
        space: ParameterSpace,
        parameters: Tensor,
        batch: MicroBatch,
        micro_batch_size: int,
        settings: ComputeSettings | None = None,
        selected: ParameterSpace | None = None,
        labels: DrawnLabels | None = None,
        recorded: Sequence[Mapping[str, Tensor]] = (),
    ):
        if micro_batch_size < 1:
            raise CurvatureError(
                "MICRO_BATCH_INVALID", f"micro_batch_size is {micro_batch_size}; give 1 or more"
            )
        self.chain, self.micro_batch_size = chain, micro_batch_size
        self.space = selected or space
        self.theta_space = space
        self.settings = settings or ComputeSettings()
        self.num_targets = chain.loss.weight(batch.targets)
        if self.num_targets == 0:
            raise CurvatureError("NO_TARGETS", "no target of the batch counts")
        self._dtype = compute_dtype(space.dtype, self.settings.precision)
        count = len(batch.targets)
        starts = range(0, count, micro_batch_size)
        rank, world_size = space.collective.rank, space.collective.world_size
        self._num_rows = count
        self._row_ranges = [
            range(start, min(start + micro_batch_size, count))
            for start in list(starts)[rank::world_size]
        ]
        self._batches = [
            placed(rows(batch, each.start, each.stop), space.device, self._dtype)
            for each in self._row_ranges
        ]
        if recorded:
            self._batches = [
                MicroBatch(inputs={**each.inputs, **more}, targets=each.targets)
                for each, more in zip(self._batches, recorded, strict=True)
            ]
        pair = chain.pair(batch)
        self.labels = labels or DrawnLabels(self.draw)
        self._executors = ExecutorTable(
            chain,
            self.space,
            self._batches,
            self._dtype,
            self.num_targets,
            self.settings,
            None if pair is None else placed(pair, space.device, self._dtype),
            self.labels,
        )
        self._passage = Passage(chain, self._batches, self._executors)
        self._output_space: OutputSpace | None = None
        self._input_space: OutputSpace | None = None
        self._probes: dict[int, list[Tensor]] = {}
        self._exchange = Exchange(space.collective, self._executors.notes)
        self._mean = MeanGradient(self.space, self.gradient, chain.loss, batch.targets)
        self._take(parameters)

    @property
    def parameters(self) -> Tensor:
        """θ, this rank's shard."""
        return self._parameters

    @parameters.setter
    def parameters(self, parameters: Tensor) -> None:
        self._mean.drop()
        self._executors.drop_labels()
        self._take(parameters)

    def _take(self, parameters: Tensor) -> None:
        self._parameters = parameters
        self._feed = ParameterFeed(
            self.theta_space, self.chain.blocks, parameters.to(self._dtype), self.space
        )
        self._drop()

    def _drop(self) -> None:
        """Forget what was kept for later products."""
        self._passage.drop()
        self._graphs = GraphedProducts()

    def release(self) -> None:
        """Give back the memory of what was kept for later products."""
        self._drop()

    def allow(self, budget_bytes: int) -> None:
        """Let blocks keep so many bytes of products that have not been made yet."""
        self._executors.budget_bytes = budget_bytes

    # The questions ------------------------------------------------------------------------------

    def loss(self) -> float:
        """L(θ). Cost: 1 GEMM pass over the data.

        Raises:
            CurvatureError: NON_FINITE, naming the first block with an infinite or undefined value.
        """
        step = InStep()
        with arithmetic(self.settings):
            self._executors.prepare(LOSS, self._feed)
            total = self._passage.loss(self._feed, step)
            answers = self.space.collective.gather_objects((total, step.failure))
            if any(failure for _, failure in answers):
                self._drop()
            raise_first(failure for _, failure in answers)
            value: float = sum(part for part, _ in answers) / self.num_targets
            if value - value != 0:  # NaN or infinite, on every rank alike
                raise first_non_finite_block(self.chain, self._feed, self._executors, self._batches)
        return value

    def losses_along(
        self, directions: Sequence[Tensor], points: Sequence[Sequence[float]]
    ) -> list[float]:
        """L(θ + Σ aᵢ dᵢ) at several points. Cost: 1 GEMM pass over the data for each point.

        Args:
            directions: The directions dᵢ, K shards (shard_numel,).
            points: The K coefficients aᵢ of each point. All points' activations are held together.

        Returns:
            The losses, one for each point. Far from θ one may be infinite or NaN: it is that of
            the function, and no error.

        Raises:
            CurvatureError: The errors of a block's code.
        """
        step = InStep()
        with arithmetic(self.settings):
            self._executors.prepare(LOSS, self._feed)
            tangents = [each.to(self.space.dtype) for each in directions]
            totals = self._passage.losses_along(self._feed, tangents, points, step)
            answers = self.space.collective.gather_objects((totals, step.failure))
        if any(failure for _, failure in answers):
            self._drop()
        raise_first(failure for _, failure in answers)
        return [sum(each) / self.num_targets for each in zip(*(a for a, _ in answers), strict=True)]

    def gradient(self) -> Tensor:
        """∇L(θ), this rank's shard. Cost: 3 GEMM passes.

        Raises:
            CurvatureError: NON_FINITE.
        """
        return self._product(GRADIENT, [])[0]

    def product(
        self,
        kind: str,
        vectors: Sequence[Tensor],
        *,
        draws: Draws | None = None,
        borrow: bool = False,
    ) -> list[Tensor]:
        """The curvature matrix times each vector.

        Args:
            kind: A kind of `product_spec.MATRICES`, such as `hessian` or `ggn`.
            vectors: Shards (shard_numel,), of the space's type or of 16 bits. Those that `probes`
                gave are read where they are.
            draws: The labels of a Fisher matrix; None for those of `Draws()`. The first product
                with them costs a forward pass more.
            borrow: The products may be overwritten by the next call, which saves copying them.

        Returns:
            Shards of the products, one for each vector, of the space's type. Where a vector has 16
            bits, so has its product: it is summed in float32, and rounded when a block is through.

        Raises:
            CurvatureError: NON_FINITE; DOUBLE_BACKWARD_UNSUPPORTED, naming the block;
                KIND_UNSUPPORTED: the model has no outputs; LOSS_HAS_NO_DISTRIBUTION.
        """
        spec = matrix(kind, draws)
        self._require_outputs(spec)
        self._require_labels(spec)
        products = self._product(spec, vectors, borrow=borrow)
        if kind in CENTRED:
            self._mean.take_off(CENTRED[kind], vectors, products)
        return products

    def _require_labels(self, spec: ProductSpec) -> None:
        """See that the labels are there that a product reads."""
        if spec.draws is not None and spec.draws not in self.labels:
            self.labels.draw(spec.draws)
            self._graphs = GraphedProducts()  # those of labels that are dropped hold memory

    def draw(self, draws: Draws) -> list[Tensor]:
        """Draw labels from the model, as `labels` keeps them. Cost: 1 GEMM pass over the data.

        Args:
            draws: Which labels.

        Returns:
            For each of this rank's micro-batches its targets, with S draws in one more dimension.

        Raises:
            CurvatureError: LOSS_HAS_NO_DISTRIBUTION; the errors of a block's code.
        """
        step = InStep()
        with arithmetic(self.settings):
            self._executors.prepare(LOSS, self._feed)
            drawn = self._passage.draw(self._feed, lambda batch: self._uniform(draws, batch), step)
            failures = self.space.collective.gather_objects(step.failure)
        if any(failures):
            self._drop()
        raise_first(failures)
        return drawn

    def _uniform(self, draws: Draws, batch: int) -> Tensor:
        shape = self._batches[batch].targets.shape[1:]
        return uniform_numbers(draws, self._row_ranges[batch], shape, self.space.device)

    def _require_outputs(self, spec: ProductSpec) -> None:
        """Refuse a product that wants outputs of a model that gives its loss alone.

        Raises:
            CurvatureError: KIND_UNSUPPORTED: the model has no outputs.
        """
        if spec.of_outputs and not self.chain.loss.has_outputs:
            raise CurvatureError(
                "KIND_UNSUPPORTED",
                f"the {spec.title} is one of a model's outputs, and this model returns its loss "
                "alone; ask for the Hessian, or register the model with its outputs and a loss",
                {"kind": spec.name},
            )

    def factors(
        self, kind: str, most_elements: int, *, draws: Draws | None = None
    ) -> KroneckerFactors:
        """Kronecker factors of a matrix near the curvature matrix of a kind.

        They are made of the operands of a gradient's products, that of labels drawn from the model
        or, of an empirical Fisher matrix, of the batch (see `gradient_of_factors`). Cost: 3 GEMM
        passes, one more for the labels, the factors' own products, and decompositions.

        Args:
            kind: A kind of `product_spec.MATRICES`.
            most_elements: Elements that the factors may have on all ranks together; those of the
                largest matrices are diagonal where there would be more.
            draws: The labels, of which the first of each target is taken; None for `Draws()`.

        Raises:
            CurvatureError: NON_FINITE; the errors of a block's code.
        """
        spec = gradient_of_factors(kind, draws, is_likelihood=self.chain.loss.is_likelihood)
        self._require_labels(spec)
        into = FactorSums(self.space, most_elements)
        (gradient,) = self._product(spec, [], into=into)
        labels = "of the batch" if spec.draws is None else f"drawn by seed {spec.draws.seed}"
        return KroneckerFactors(self.space, into.totals(), gradient, self.num_targets, labels)

    def probes(self, count: int) -> list[Tensor]:
        """Vectors to fill and to multiply, time after time, that a CUDA graph reads where they are.

        Args:
            count: Number of vectors. A second call with the same count gives the same vectors.

        Returns:
            Shards (shard_numel,) of the type of the operands of matrix products; zero at first.
        """
        if count not in self._probes:
            self._probes[count] = [self.space.zeros(self._dtype) for _ in range(count)]
        return list(self._probes[count])

    def hvp(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """H v for each v. Cost in GEMM passes: 11, 8 or 6 each by schedule."""
        return self._product(HESSIAN, vectors)

    def ggn(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """G v for each v, G = Jᵀ H_out J. Cost in GEMM passes: 6, 5 or 4 each by schedule."""
        return self.product("ggn", vectors)

    def empirical_fisher(self, vectors: Sequence[Tensor], unit: Unit) -> list[Tensor]:
        """F v for each v, of the empirical Fisher matrix of tokens or of sequences.

        F = (1/W) Σ_u g_u g_uᵀ, with g_u the gradient of the summed losses of a unit and W the
        number of targets, whatever the unit (see `product_spec.py`). Cost in GEMM passes: as `ggn`.
        With sequences the last block is gone through once more, before any piece of a row goes
        back.

        Args:
            vectors: Shards, as for `product`.
            unit: `token`: each g_u is the gradient of one target's loss. `sequence`: it is that of
                a row of the batch with all its targets.
        """
        kinds: dict[Unit, str] = {
            "token": "empirical_fisher_token",
            "sequence": "empirical_fisher_sequence",
        }
        return self.product(kinds[unit], vectors)

    def slopes(self, vectors: Sequence[Tensor]) -> list[float]:
        """∇L·v for each v, by going forward alone. Cost for K vectors: 1 + 2K GEMM passes.

        Args:
            vectors: Shards, as for `product`.

        Raises:
            CurvatureError: NON_FINITE.
        """
        return self._numbers(SLOPES, vectors)

    def quadratic(
        self, kind: str, vectors: Sequence[Tensor], *, draws: Draws | None = None
    ) -> list[float]:
        """v·Av for each v, by going forward alone. Cost for K vectors: 1 + 2K GEMM passes.

        Args:
            kind: The kind of A, as for `product`; not `hessian`, which has no such rule here.
            vectors: Shards, as for `product`.
            draws: The labels of a Fisher matrix, as for `product`.

        Raises:
            KeyError: There is no rule for this kind.
            CurvatureError: NON_FINITE; KIND_UNSUPPORTED: the model has no outputs;
                LOSS_HAS_NO_DISTRIBUTION.
        """
        form = matrix(kind, draws).form
        if form is None:
            raise KeyError(kind)
        self._require_outputs(form)
        self._require_labels(form)
        found = self._numbers(form, vectors)
        return self._mean.taken_off(CENTRED[kind], vectors, found) if kind in CENTRED else found

    @property
    def output_space(self) -> OutputSpace:
        """The space of the model's outputs on the batch, cut by rows over the ranks.

        The space is found at the first call, which all ranks make together.

        Raises:
            CurvatureError: KIND_UNSUPPORTED: the model has no outputs; the errors of the
                preparation of `jvp`.
        """
        self._require_outputs(OUTPUT_JVP)
        if self._output_space is None:
            with arithmetic(self.settings):
                self._executors.prepare(OUTPUT_JVP, self._feed)
            self._output_space = self.space_of_rows(self._executors.output_shape)
        return self._output_space

    @property
    def input_space(self) -> ShardedSpace:
        """The space of the vectors that `jvp` takes: `space` or, where that moves, the input's.

        The space is found at the first call, which all ranks make together.
        """
        if not self.chain.input_moves:
            return self.space
        if self._input_space is None:
            shapes = [self.chain.first_input(each).shape[1:] for each in self._batches]
            self._input_space = self.space_of_rows(shapes[0] if shapes else None)
        return self._input_space

    def space_of_rows(self, shape: Sequence[int] | None) -> OutputSpace:
        """The space of tensors with a row of this shape for each row of the batch.

        Args:
            shape: The shape of a row; None on a rank that has no row.
        """
        shapes = self.space.collective.gather_objects(shape)
        return OutputSpace(
            self._num_rows,
            next(each for each in shapes if each is not None),
            self._row_ranges,
            self.space.collective,
            self.space.dtype,
            self.space.device,
        )

    def jvp(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """J v for each v, J = ∂(outputs)/∂θ, of every position, whether its label counts or not.

        The outputs are what the loss is given: a language model's logits. Where the chain's input
        moves, J is the derivative by that. Memory: the results, and pieces of the last block. Cost
        for K vectors: 1 + 2K GEMM passes, 1 + K where θ is constant.

        Args:
            vectors: Vectors of `input_space`: shards, as for `product`, or this rank's rows.

        Returns:
            Vectors of `output_space`, (local,): each rank has those of its own rows.

        Raises:
            CurvatureError: NON_FINITE.
        """
        outputs = self.output_space
        found = [outputs.zeros() for _ in vectors]
        self._measure(OUTPUT_JVP, vectors, [outputs.by_row(each) for each in found])
        return found

    def vjp(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """Jᵀ u for each u of the `output_space`, J as for `jvp`, at the same cost.

        Args:
            outputs: Vectors (local,), this rank's rows.

        Returns:
            Vectors of `input_space`.

        Raises:
            CurvatureError: NON_FINITE.
        """
        space = self.output_space
        if not outputs:
            return []
        given = [space.by_row(each) for each in outputs]
        if not self.chain.input_moves:
            return self._product(OUTPUT_VJP, [], given=given)
        assert isinstance(self.input_space, OutputSpace)
        found = [self.input_space.zeros() for _ in outputs]
        of_input = [self.input_space.by_row(each) for each in found]
        self._product(OUTPUT_VJP, [], given=given, of_input=of_input)
        return found

    def observe(self, index: int, places: Sequence[Place]) -> list[Observed]:
        """A block's input, and activations inside it, of each of this rank's micro-batches.

        Cost: 1 GEMM pass over the data, up to this block. All ranks call it together.

        Args:
            index: Index of the block.
            places: The activations; those that the block does not make are left out.

        Raises:
            CurvatureError: MODULE_UNSUPPORTED: an activation is not one tensor; the errors of a
                block's code.
        """
        step, found = InStep(), list[Observed]()

        def visit(index: int, weights: ParamsAndTangents, _: Sequence[Accumulator]) -> None:
            for batch, x in enumerate(step.live(xs)):
                observer = Observer(self.chain, places, len(x))
                if places:
                    observer.run(self._executors.body(index, batch, True), weights.p, x)
                found.append(Observed(x, observer.seen))

        with arithmetic(self.settings), torch.no_grad():
            self._executors.prepare(LOSS, self._feed)
            xs = self._passage.inputs_of(index, self._feed, step)
            sweep(self._feed, [index], visit, lambda block: step.on(block.name, "its activations"))
        raise_first(self.space.collective.gather_objects(step.failure))
        return found

    def notes(self) -> dict[str, str]:
        """How products were computed, for whoever wants to reproduce or explain them.

        The notes are those of all ranks, as of the last product. A note that only some ranks made
        names these ranks.
        """
        return self._exchange.notes()

    # The walk -----------------------------------------------------------------------------------

    def _product(
        self,
        spec: ProductSpec,
        vectors: Sequence[Tensor],
        *,
        borrow: bool = False,
        given: Sequence[Tensor] = (),
        of_input: Sequence[Tensor] = (),
        into: Collector | None = None,
    ) -> list[Tensor]:
        """Products that go back: one without vectors, or one with each vector."""
        if spec.passes.forward == "tangent" and not vectors:
            return []
        if not self._passage.is_of_use_to(spec.passes):
            self._passage.drop_residuals()
            self._graphs = GraphedProducts()
        step = InStep()
        with arithmetic(self.settings):
            self._executors.prepare(spec, self._feed)
            choices = self._executors.choose(spec, len(vectors))
            results = None
            if not given and into is None:
                results = self._replayed(spec, choices, vectors, borrow)
            if results is None:
                tangents = [vector.to(self._dtype) for vector in vectors]
                dtypes = [self.space.dtype for _ in given] or self._dtypes(vectors)
                into = into or Results(self.space, dtypes)
                results = self._passage.there_and_back(
                    spec, choices, self._feed, tangents, into, step, given, of_input
                )
        self._agree([*results, *of_input], f"the {spec.title}", step)
        return results

    def _measure(
        self, spec: ProductSpec, vectors: Sequence[Tensor], into: Sequence[Tensor]
    ) -> None:
        """Write into `into` what a product that goes forward alone measures of this rank's rows."""
        if not vectors:
            return
        step = InStep()
        with arithmetic(self.settings):
            self._executors.prepare(spec, self._feed)
            choices = self._executors.choose(spec, len(vectors))
            tangents = [vector.to(self._dtype) for vector in vectors]
            x_dots: list[Tensor] = []
            if self.chain.input_moves:  # of the parameters there are none
                assert isinstance(self.input_space, OutputSpace)
                x_dots = [self.input_space.by_row(each) for each in vectors]
                tangents = [self.space.zeros(self._dtype) for _ in vectors]
            self._passage.there(spec, choices, self._feed, tangents, into, step, x_dots)
        self._agree(into, f"the {spec.title}", step)

    def _numbers(self, spec: ProductSpec, vectors: Sequence[Tensor]) -> list[float]:
        """(1/W) Σ mᵖ for each vector, over all rows: m is a row's measured number, p the power."""
        shape = len(vectors), sum(len(each) for each in self._row_ranges)
        measured = torch.zeros(shape, dtype=torch.float64, device=self.space.device)
        self._measure(spec, vectors, list(measured))
        own = measured.pow(spec.power).sum(1).cpu()
        return [float(each) / self.num_targets for each in self.space.collective.sum(own)]

    def _replayed(
        self,
        spec: ProductSpec,
        choices: Sequence[BlockRetention],
        vectors: Sequence[Tensor],
        borrow: bool,
    ) -> list[Tensor] | None:
        """The products by a CUDA graph; None where there is no graph, or not yet."""
        alone = self.space.collective.world_size == 1
        if not (self.settings.graphs and alone and self.space.device.type == "cuda"):
            return None
        probes = self._probes.get(len(vectors), [])
        in_place = bool(probes) and all(a is b for a, b in zip(vectors, probes, strict=True))
        dtypes = self._dtypes(vectors)

        def walk(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> object:
            into = Results(self.space, dtypes, outputs)
            step = InStep(alone=True)
            return self._passage.there_and_back(spec, choices, self._feed, inputs, into, step)

        replay = self._graphs.get(
            (spec, tuple(dtypes), in_place),
            walk,
            lambda: probes if in_place else [self.space.zeros(self._dtype) for _ in vectors],
            lambda: [self.space.zeros(dtype) for dtype in dtypes],
        )
        return None if replay is None else replay(vectors, borrow=borrow)

    def _dtypes(self, vectors: Sequence[Tensor]) -> list[torch.dtype]:
        """The products' dtypes: a vector's own where it has 16 bits, otherwise the space's.

        Without vectors there is one, for the gradient.
        """
        space = self.space.dtype
        found = [each.dtype if each.itemsize == 2 else space for each in vectors]
        return found or [space]

    def _agree(self, shards: Sequence[Tensor], what: str, step: InStep) -> None:
        """See, with all ranks, that a product is finite and that no rank failed.

        Raises:
            CurvatureError: NON_FINITE; the error that was raised on a rank; under strict settings
                MODEL_UNSUPPORTED where a slower way was taken.
        """
        try:
            fine = self._exchange(shards, step)
        except CurvatureError:
            self._drop()
            raise
        if self.settings.strict:
            refuse_slower_ways(self.notes())
        if fine:
            return
        self._drop()
        if self.chain.ends_in_loss:
            self.loss()  # says which block, if the loss itself is at fault
        raise CurvatureError(
            "NON_FINITE", f"{what} is not finite although the loss is; use float64"
        )
