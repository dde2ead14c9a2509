"""A run that estimates a trace: what it has seen, and how it asks for products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import final

import torch
from hvp_operations.trace import TraceSpec
from torch import Tensor

from hvp_core.krylov.krylov_basis import finite, finite_dots, finite_norm
from hvp_core.linop.linear_operator import LinearOperator
from hvp_core.runs.algorithm import derived_seed
from hvp_core.stochastic.samples import Estimate, Moments
from hvp_core.stochastic.sketches import NystromSketch, Range, XTraceSketch
from hvp_core.stochastic.trace_choice import Choice, blocks
from hvp_core.vectors.vector_space import Distribution, VectorSpace


@final
@dataclass
class TraceState:
    """What a run has seen.

    Attributes:
        samples: Forms of random probes: of the whole, and of each block.
        corrections: Differences of exact and coarse forms, of other probes.
        coordinates: Sum of the diagonal so far, of the whole and of each block.
        num_coordinates: Number of coordinates that have had their turn; −1 before they are begun.
        basis: The basis of `hutch++`.
        xtrace: The sketch of `xtrace` at hand.
        nystrom: The sketch of `xnystrace` at hand.
        batches: Estimates of the sketches before the one at hand.
        batch_sizes: Numbers of random vectors of these.
        captured: Trace on the first `num_captured` vectors of the basis.
        num_captured: Number of basis vectors that have had their product.
        size: Sum of the sizes by which the rounding of averaged forms goes.
        num_sizes: Number of these forms.
        whole_size: The same sum of forms that are added up, not averaged.
        num_drawn: Random vectors drawn so far.
        num_products: Products so far.
        num_exact: Of them, those of the exact operator where that is another.
        is_verified: Whether there was memory for the exact operator wherever it was needed.
        outcome: How the run ended; "" while it has not.
    """

    samples: Moments
    corrections: Moments
    coordinates: Tensor
    num_coordinates: int = -1
    basis: Range | None = None
    xtrace: XTraceSketch | None = None
    nystrom: NystromSketch | None = None
    batches: list[Estimate] = field(default_factory=list)
    batch_sizes: list[int] = field(default_factory=list)
    captured: float = 0.0
    num_captured: int = 0
    size: float = 0.0
    num_sizes: int = 0
    whole_size: float = 0.0
    num_drawn: int = 0
    num_products: int = 0
    num_exact: int = 0
    is_verified: bool = True
    outcome: str = ""

    @property
    def num_probes(self) -> int:
        """Random vectors that the value is made of."""
        return 0 if self.num_coordinates >= 0 else self.num_drawn


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
class TraceRun:
    """A run at one of its steps.

    Attributes:
        spec: The request.
        choice: The method and its sizes.
        max_products: Upper bound on products.
        operator: The operator.
        state: What the run has seen.
    """

    spec: TraceSpec
    choice: Choice
    max_products: int
    operator: LinearOperator
    state: TraceState

    @property
    def space(self) -> VectorSpace:
        """The space of the vectors."""
        return self.operator.domain

    @property
    def remaining(self) -> int:
        """Products that may still be taken."""
        return self.max_products - self.state.num_products

    @cached_property
    def blocks(self) -> dict[str, list[int]]:
        """Numbers of the parts of the space that make up each diagonal block asked for."""
        return blocks(self.space, self.spec.per)

    def tolerance(self, value: float) -> float:
        """The standard error that will do."""
        return max(self.spec.rtol * abs(value), self.spec.atol)

    def draw(self, count: int, law: Distribution) -> list[Tensor]:
        """The next random vectors."""
        first = self.state.num_drawn
        self.state.num_drawn += count
        return [self.vector(index, law) for index in range(first, first + count)]

    def vector(self, index: int, law: Distribution) -> Tensor:
        """The random vector of an index."""
        return self.space.random(derived_seed(self.spec.seed, index), law)

    def exact(self) -> LinearOperator:
        """The exact operator if there is memory for it; this one where it is exact itself."""
        if not self.operator.noise:
            return self.operator
        exact = self.operator.exact()
        self.state.is_verified = self.state.is_verified and exact is not None
        return exact or self.operator

    def apply(self, source: LinearOperator, vectors: Sequence[Tensor]) -> list[Tensor]:
        """Products that are counted, and good until the next call."""
        self._count(source, len(vectors))
        return source.apply(vectors, borrow=True)

    def _count(self, source: LinearOperator, num_products: int) -> None:
        self.state.num_products += num_products
        if source is not self.operator:
            self.state.num_exact += num_products

    def forms(self, source: LinearOperator, vectors: Sequence[Tensor]) -> list[Form]:
        """v·Av for each vector, which counts as a product however it is computed.

        Raises:
            CurvatureError: NON_FINITE.
        """
        if not self.blocks and (forms := source.forms(vectors)) is not None:
            self._count(source, len(vectors))
            numbers = finite(torch.tensor(forms, dtype=torch.float64))
            return [Form(each.reshape(1), abs(float(each))) for each in numbers]
        return [
            Form(
                self._numbers(vector, product),
                finite_norm(self.space, vector) * finite_norm(self.space, product),
            )
            for vector, product in zip(vectors, self.apply(source, vectors), strict=True)
        ]

    def _numbers(self, vector: Tensor, product: Tensor) -> Tensor:
        if not self.blocks:
            return finite_dots(self.space, vector.unsqueeze(0), product)
        parts = finite(self.space.dots_by_part(vector, product))
        sums = torch.stack([parts[numbers].sum() for numbers in self.blocks.values()])
        return torch.cat((sums.sum().reshape(1), sums))

    def average(self, forms: Sequence[Form]) -> None:
        """Take in forms of random probes."""
        for form in forms:
            self.state.samples.add(form.numbers)
            self.state.size += form.size
            self.state.num_sizes += 1
