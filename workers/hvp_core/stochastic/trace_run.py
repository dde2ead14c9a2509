"""A run that estimates a trace: what it has seen, and how it asks for products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from hvp_operations.trace import TraceSpec
from torch import Tensor

from hvp_core.krylov.orthogonality import finite, finite_norm
from hvp_core.linop.linear_operator import LinearOperator
from hvp_core.stochastic.probing import Probing, Seen
from hvp_core.stochastic.samples import Estimate, Moments
from hvp_core.stochastic.sketches import NystromSketch, Range, XTraceSketch


@final
@dataclass(kw_only=True)
class TraceState(Seen):
    """What a run has seen, beside what all do.

    Attributes:
        samples: Forms of random probes: of the whole, and of each block.
        corrections: Differences of exact and coarse forms, of other probes.
        coordinates: Sum of the diagonal so far, of the whole and of each block.
        basis: The basis of `hutch++`.
        xtrace: The sketch of `xtrace` at hand.
        nystrom: The sketch of `xnystrace` at hand.
        batches: Estimates of the sketches before the one at hand.
        batch_sizes: Numbers of random vectors of these.
        captured: Trace on the first `num_captured` vectors of the basis.
        num_captured: Number of basis vectors that have had their product.
    """

    samples: Moments
    corrections: Moments
    coordinates: Tensor
    basis: Range | None = None
    xtrace: XTraceSketch | None = None
    nystrom: NystromSketch | None = None
    batches: list[Estimate] = field(default_factory=list)
    batch_sizes: list[int] = field(default_factory=list)
    captured: float = 0.0
    num_captured: int = 0


@final
@dataclass(frozen=True)
class Form:
    """v·Av.

    Attributes:
        numbers: Of the whole and of each block, (1 + blocks,) float64.
        size: What its rounding goes by: ‖v‖ ‖Av‖, or the form itself where it is a sum of squares.
    """

    numbers: Tensor
    size: float


@final
@dataclass(frozen=True)
class TraceRun(Probing):
    """A run at one of its steps."""

    spec: TraceSpec
    state: TraceState

    def forms(self, source: LinearOperator, vectors: Sequence[Tensor]) -> list[Form]:
        """v·Av for each vector, which counts as a product however it is computed.

        Raises:
            CurvatureError: NON_FINITE.
        """
        if not self.blocks and (forms := source.forms(vectors)) is not None:
            self.count(source, len(vectors))
            numbers = finite(torch.tensor(forms, dtype=torch.float64))
            return [Form(each.reshape(1), abs(float(each))) for each in numbers]
        found = []
        for vector, product in zip(vectors, self.apply(source, vectors), strict=True):
            length = finite_norm(self.space, vector)
            size = length * self.size_of(source, product, length)
            found.append(Form(self.numbers(vector, product), size))
        return found

    def average(self, forms: Sequence[Form]) -> None:
        """Take in forms of random probes."""
        for form in forms:
            self.state.samples.add(form.numbers)
            self.note_size(form.size)
