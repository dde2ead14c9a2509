"""The methods by which a trace is estimated, each in steps of a few products.

Hutchinson: for random z with E zzᵀ = I, E z·Az = tr A (Commun. Stat. Simul. Comput. 19 (1990)). The
others take the trace on a part of the range exactly and average over the rest alone: see Meyer,
Musco, Musco and Woodruff, "Hutch++: optimal stochastic trace estimation", SOSA 2021, and
`sketches.py`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from hvp_core.linop.linear_operator import LinearOperator
from hvp_core.stochastic.block_traces import Standing
from hvp_core.stochastic.probing import FEWEST, Stepper, Turns
from hvp_core.stochastic.samples import combined
from hvp_core.stochastic.sketches import NystromSketch, Range, XTraceSketch
from hvp_core.stochastic.trace_run import TraceRun
from hvp_core.stochastic.two_levels import COARSE_SHARE, TwoLevels


@dataclass(frozen=True)
class Method(Stepper):
    """A method by which a trace is estimated."""

    run: TraceRun

    @abstractmethod
    def standing(self) -> Standing | None:
        """What is known; None where that is nothing so far."""


def _certain(value: Tensor) -> Standing:
    return Standing(value, torch.zeros_like(value), torch.zeros_like(value))


@final
class Coordinates(Method, Turns):
    """The sum of the diagonal, element by element."""

    def take(self, source: LinearOperator, start: int, vectors: Sequence[Tensor]) -> None:
        """See Turns."""
        state = self.run.state
        for form in self.run.forms(source, vectors):
            state.coordinates = state.coordinates + form.numbers
            state.whole_size += form.size

    def standing(self) -> Standing | None:
        """See Method."""
        return _certain(self.run.state.coordinates) if self.is_enough() else None


@final
class Hutchinson(Method, TwoLevels):
    """The mean of forms of random signs."""

    @property
    def num_samples(self) -> int:
        """See TwoLevels."""
        return self.run.state.samples.count

    @property
    def num_corrections(self) -> int:
        """See TwoLevels."""
        return self.run.state.corrections.count

    def is_known(self) -> bool:
        """See TwoLevels."""
        coarse = self.run.state.samples.estimate()
        most = COARSE_SHARE * self.run.tolerance(float(coarse.value[0]))
        return float(coarse.standard_error[0]) <= most

    def sample(self, vectors: Sequence[Tensor]) -> None:
        """See TwoLevels."""
        self.run.average(self.run.forms(self.run.operator, vectors))

    def compare(self, exact: LinearOperator, vectors: Sequence[Tensor]) -> None:
        """See TwoLevels."""
        run = self.run
        coarse, fine = run.forms(run.operator, vectors), run.forms(exact, vectors)
        for rough, true in zip(coarse, fine, strict=True):
            run.state.corrections.add(true.numbers - rough.numbers)

    def standing(self) -> Standing | None:
        """See Method."""
        state = self.run.state
        if state.samples.count < 2:
            return None
        levels = [each for each in (state.samples, state.corrections) if each.count > 1]
        return Standing(*combined([(1.0, each.estimate()) for each in levels]))


@final
@dataclass(frozen=True)
class HutchPlusPlus(Method):
    """The trace on a basis of the range, and the mean of forms over what is left of it.

    Attributes:
        basis: The basis.
    """

    basis: Range

    def step(self) -> str:
        """See Stepper."""
        run, state, basis = self.run, self.run.state, self.basis
        together = run.choice.num_together
        missing = len(basis.rows) - state.num_drawn
        if missing > 0 and not basis.is_whole:
            # Whatever these products are, what they span will do: they need not be exact.
            products = run.apply(run.operator, run.draw(min(together, missing), "rademacher"))
            for product in products:
                basis.extend(run.space, product)
            return "sketching"
        start, stop = state.num_captured, min(state.num_captured + together, basis.num_rows)
        if start < stop:
            for form in run.forms(run.exact(), list(basis.rows[start:stop])):
                state.captured += float(form.numbers[0])
                state.whole_size += form.size
            state.num_captured = stop
            return "projecting"
        vectors = run.draw(max(1, min(together, run.remaining)), "rademacher")
        for vector in vectors:
            basis.take_out(run.space, vector)
        run.average(run.forms(run.exact(), vectors))
        return "sampling"

    def standing(self) -> Standing | None:
        """See Method."""
        state = self.run.state
        captured = torch.full_like(state.samples.mean, state.captured)
        if self._is_certain():
            return _certain(captured)
        if state.samples.count < 2:
            return None
        value, error, half = combined([(1.0, state.samples.estimate())])
        return Standing(captured + value, error, half)

    def _is_certain(self) -> bool:
        return self.basis.is_whole and self.run.state.num_captured == self.basis.num_rows

    def is_enough(self) -> bool:
        """See Stepper."""
        return self._is_certain() or self.run.state.samples.count >= FEWEST

    def can_go_on(self) -> bool:
        """See Stepper."""
        return self.run.remaining >= 1

    @property
    def rest(self) -> float:
        """See Stepper."""
        return math.sqrt(self.run.space.dimension) * self.basis.rest


@dataclass(frozen=True)
class Sketching(Method):
    """A sketch each of whose random vectors is left out in turn, or several one after another.

    Attributes:
        sketch: The sketch at hand.
    """

    sketch: XTraceSketch | NystromSketch

    @property
    @abstractmethod
    def products_a_probe(self) -> int:
        """Products that a random vector takes."""

    def _group(self) -> list[Tensor]:
        """The next random vectors, of norm 1."""
        run, room = self.run, self.run.choice.num_rows - self.sketch.num_probes
        count = min(run.choice.num_together, room, run.remaining // self.products_a_probe)
        return run.draw(count, "sphere")

    def _note_size(self, source: LinearOperator, product: Tensor) -> None:
        """Note what rounding goes by: a vector of norm 1 stands for one of norm √n."""
        self.run.note_size(self.run.space.dimension * self.run.size_of(source, product, 1.0))

    def standing(self) -> Standing | None:
        """The mean over sketches, by their numbers of vectors; of one that is whole, its own."""
        state, sketch = self.run.state, self.sketch
        batches = list(zip(state.batch_sizes, state.batches, strict=True))
        if sketch.is_whole:
            return _certain(sketch.estimate(self.run.space).value)
        if sketch.num_probes > 1:
            batches.append((sketch.num_probes, sketch.estimate(self.run.space)))
        if not batches:
            return None
        total = sum(size for size, _ in batches)
        return Standing(*combined([(size / total, each) for size, each in batches]))

    def is_enough(self) -> bool:
        """See Stepper."""
        num_probes = self.sketch.num_probes + sum(self.run.state.batch_sizes)
        return self.sketch.is_whole or num_probes >= min(FEWEST, self.run.space.dimension)

    def can_go_on(self) -> bool:
        """See Stepper; a sketch that is full makes room for another of at least two vectors."""
        run, state, each = self.run, self.run.state, self.products_a_probe
        if self.sketch.num_probes < run.choice.num_rows:
            return run.remaining >= each
        if run.remaining < 2 * each:
            return False
        state.batches.append(self.sketch.estimate(run.space))
        state.batch_sizes.append(self.sketch.num_probes)
        self.sketch.clear()
        return True

    @property
    def rest(self) -> float:
        """See Stepper."""
        return self.run.space.dimension * self.sketch.rest


@final
@dataclass(frozen=True)
class XTrace(Sketching):
    """See `XTraceSketch`."""

    sketch: XTraceSketch

    @property
    def products_a_probe(self) -> int:
        """See Sketching."""
        return 2

    def step(self) -> str:
        """See Stepper."""
        run, sketch, basis = self.run, self.sketch, self.sketch.range
        exact = run.exact()
        start, first = basis.num_rows, run.state.num_drawn - basis.num_rows
        vectors = self._group()
        for product in run.apply(exact, vectors):
            basis.extend(run.space, product)
            self._note_size(exact, product)
        new = list(basis.rows[start : basis.num_rows])
        if new:
            sketch.project(run.space, start, run.apply(exact, new))
        if not basis.is_whole:
            for index in range(start):
                earlier = run.vector(first + index, "sphere")
                sketch.compare(run.space, start, index, earlier)
            for index, vector in enumerate(vectors, start):
                sketch.compare(run.space, 0, index, vector)
        return "sketching"


@final
@dataclass(frozen=True)
class XNysTrace(Sketching):
    """See `NystromSketch`."""

    sketch: NystromSketch

    @property
    def products_a_probe(self) -> int:
        """See Sketching."""
        return 1

    def step(self) -> str:
        """See Stepper."""
        run, vectors, exact = self.run, self._group(), self.run.exact()
        for vector, product in zip(vectors, run.apply(exact, vectors), strict=True):
            self.sketch.extend(run.space, vector, product)
            self._note_size(exact, product)
        return "sketching"


def stepper(run: TraceRun) -> Method:
    """The method of a run."""
    state = run.state
    if state.num_coordinates >= 0:
        return Coordinates(run)
    if state.basis is not None:
        return HutchPlusPlus(run, state.basis)
    if state.xtrace is not None:
        return XTrace(run, state.xtrace)
    if state.nystrom is not None:
        return XNysTrace(run, state.nystrom)
    return Hutchinson(run)
