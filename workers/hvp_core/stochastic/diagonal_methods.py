"""The methods by which a diagonal is estimated, each in steps of a few products.

Hutchinson: for random signs z, E z ∘ Az = diag A, and the variance of the i-th element is
Σ_{j≠i} Aᵢⱼ² (Bekas, Kokiopoulou and Saad, "An estimator for the diagonal of a matrix", Appl. Numer.
Math. 57 (2007), without the division by z ∘ z, which is 1). XDiag: see `xdiag`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from hvp_operations.diagonal import DiagonalSpec
from torch import Tensor

from hvp_core.krylov.orthogonality import finite_norm
from hvp_core.linop.linear_operator import LinearOperator
from hvp_core.stochastic.block_traces import Standing
from hvp_core.stochastic.diagonal_known import joined_error
from hvp_core.stochastic.probing import FEWEST, Probing, Seen, Stepper, Turns
from hvp_core.stochastic.samples import Moments, combined
from hvp_core.stochastic.two_levels import COARSE_SHARE, TwoLevels
from hvp_core.stochastic.vector_moments import VectorEstimate, VectorMoments, added
from hvp_core.stochastic.xdiag import XDiagSketch


@final
@dataclass(kw_only=True)
class DiagonalState(Seen):
    """What a run has seen, beside what all do.

    Attributes:
        samples: Samples of random probes; with a sketch, of what its basis leaves of their
            products. Where coordinates take their turns, the diagonal so far is their mean.
        corrections: Differences of exact and coarse samples, of other probes; None of an operator
            that is exact itself.
        part_samples: Forms of the random probes: of the whole, and of each block.
        part_corrections: The same of the differences.
        sketch: The sketch at hand; None where the method is another.
        is_grown: Whether the sketch grows no more.
        num_compared: Corrections that earlier runs took samples for.
        known_error: Norm of the standard error of an earlier estimate that the new one is averaged
            with; infinite where there is none.
        foreseen: Variance, over all elements, that the end of the budget would bring if the sketch
            grew no more; infinite before that is known.
    """

    samples: VectorMoments
    corrections: VectorMoments | None
    part_samples: Moments
    part_corrections: Moments
    sketch: XDiagSketch | None = None
    is_grown: bool = False
    num_compared: int = 0
    known_error: float = math.inf
    foreseen: float = math.inf

    @property
    def num_corrections(self) -> int:
        """Number of samples of differences."""
        return self.corrections.count if self.corrections is not None else 0


@final
@dataclass(frozen=True)
class DiagonalRun(Probing):
    """A run at one of its steps."""

    spec: DiagonalSpec
    state: DiagonalState


@dataclass(frozen=True)
class Method(Stepper):
    """A method by which a diagonal is estimated."""

    run: DiagonalRun

    @abstractmethod
    def estimate(self) -> VectorEstimate | None:
        """What is known, as new vectors; None where that is nothing so far."""

    def sums(self, estimate: VectorEstimate) -> Standing | None:
        """What is known of the sum of the diagonal, and of its sums over the parts asked for.

        Args:
            estimate: The estimate at hand.

        Returns:
            The sums; None where the method gives none.
        """
        return None


@final
class Coordinates(Method, Turns):
    """The diagonal, element by element."""

    def take(self, source: LinearOperator, start: int, vectors: Sequence[Tensor]) -> None:
        """See Turns."""
        run, state = self.run, self.run.state
        if not start:  # in the memory of what was known before
            state.samples.clear()
            state.sketch = None
        for vector, product in zip(vectors, run.apply(source, vectors), strict=True):
            state.whole_size = math.hypot(state.whole_size, run.size_of(source, product, 1.0))
            state.samples.mean.addcmul_(vector, product)

    def estimate(self) -> VectorEstimate | None:
        """See Method."""
        return VectorEstimate(self.run.state.samples.rows.clone()) if self.is_enough() else None

    def sums(self, estimate: VectorEstimate) -> Standing:
        """See Method."""
        value = self.run.numbers(torch.ones_like(estimate.value), estimate.value)
        return Standing(value, torch.zeros_like(value), torch.zeros_like(value))


@final
class Hutchinson(Method, TwoLevels):
    """The mean of z ∘ Az over random signs z."""

    @property
    def num_samples(self) -> int:
        """See TwoLevels."""
        return self.run.state.samples.count

    @property
    def num_corrections(self) -> int:
        """See TwoLevels."""
        return self.run.state.num_corrections

    @property
    def num_compared(self) -> int:
        """See TwoLevels."""
        return self.run.state.num_compared + self.run.state.num_corrections

    def is_known(self) -> bool:
        """See TwoLevels."""
        state = self.run.state
        norm, error = state.samples.estimate().norms(self.run.space)
        return joined_error(state.known_error, error) <= COARSE_SHARE * self.run.tolerance(norm)

    def sample(self, vectors: Sequence[Tensor]) -> None:
        """See TwoLevels."""
        run, state = self.run, self.run.state
        for vector, product in zip(vectors, run.apply(run.operator, vectors), strict=True):
            run.note_size(run.size_of(run.operator, product, math.sqrt(run.space.dimension)))
            if run.blocks:
                state.part_samples.add(run.numbers(vector, product))
            state.samples.add(vector * product)

    def compare(self, exact: LinearOperator, vectors: Sequence[Tensor]) -> None:
        """See TwoLevels."""
        run, state = self.run, self.run.state
        assert state.corrections is not None  # there is another operator
        coarse = run.apply(run.operator, vectors, borrow=False)
        fine = run.apply(exact, vectors)
        for vector, difference, true in zip(vectors, coarse, fine, strict=True):
            difference.neg_().add_(true)
            finite_norm(run.space, difference)
            if run.blocks:
                state.part_corrections.add(run.numbers(vector, difference))
            state.corrections.add(difference.mul_(vector))

    def estimate(self) -> VectorEstimate | None:
        """See Method."""
        state = self.run.state
        if state.samples.count < 2:
            return None
        found = state.samples.estimate()
        if state.corrections is not None and state.corrections.count > 1:
            found = added(self.run.space, found, state.corrections.estimate())
        return found

    def sums(self, estimate: VectorEstimate) -> Standing:
        """See Method."""
        state = self.run.state
        levels = [each for each in (state.part_samples, state.part_corrections) if each.count > 1]
        return Standing(*combined([(1.0, each.estimate()) for each in levels]))


@final
@dataclass(frozen=True)
class XDiag(Method):
    """A sketch each of whose vectors is left out in turn, and a mean of what its basis leaves.

    Attributes:
        sketch: The sketch.
    """

    sketch: XDiagSketch

    def step(self) -> str:
        """See Stepper."""
        run, state, sketch = self.run, self.run.state, self.sketch
        exact, together = run.exact(), run.choice.num_together
        if state.is_grown:
            vectors = run.draw(min(together, run.remaining), "rademacher")
            for vector, product in zip(vectors, run.apply(exact, vectors), strict=True):
                run.note_size(run.size_of(exact, product, math.sqrt(run.space.dimension)))
                state.samples.add(sketch.left_of(run.space, product).mul_(vector))
            return "sampling"
        start = sketch.num_probes
        count = min(together, run.choice.num_rows - start, run.remaining // 2)
        vectors = run.draw(count, "rademacher")
        for vector, product in zip(vectors, run.apply(exact, vectors), strict=True):
            run.note_size(run.size_of(exact, product, math.sqrt(run.space.dimension)))
            sketch.extend(run.space, vector, product)
        if new := list(sketch.range.rows[start : sketch.num_probes]):
            for product in run.apply(exact, new):
                sketch.project(run.space, product)
        state.is_grown = sketch.num_probes == run.choice.num_rows or not self._pays()
        return "sketching"

    def _pays(self) -> bool:
        """Whether the last vectors of the sketch made the variance smaller that is foreseen.

        With k vectors in the sketch, max_products − 2k samples can follow, each with the variance
        of one that the sketch gives.
        """
        run, state, k = self.run, self.run.state, self.sketch.num_probes
        if run.spec.method != "auto" or k < FEWEST // 2 or self.sketch.is_whole:
            return True
        _, error = self.sketch.estimate(run.space, state.samples).norms(run.space)
        before, state.foreseen = state.foreseen, k * error**2 / max(1, run.max_products - k)
        return state.foreseen <= before

    def estimate(self) -> VectorEstimate | None:
        """See Method."""
        sketch = self.sketch
        if sketch.num_probes < 2 and not sketch.is_whole:
            return None
        return sketch.estimate(self.run.space, self.run.state.samples)

    def is_enough(self) -> bool:
        """See Stepper."""
        num_probes = self.sketch.num_probes + self.run.state.samples.count
        return self.sketch.is_whole or num_probes >= min(FEWEST, self.run.space.dimension)

    def can_go_on(self) -> bool:
        """See Stepper."""
        return self.run.remaining >= (1 if self.run.state.is_grown else 2)

    @property
    def rest(self) -> float:
        """See Stepper."""
        return self.sketch.range.rest


def stepper(run: DiagonalRun) -> Method:
    """The method of a run."""
    if run.state.num_coordinates >= 0:
        return Coordinates(run)
    if run.state.sketch is not None:
        return XDiag(run, run.state.sketch)
    return Hutchinson(run)
