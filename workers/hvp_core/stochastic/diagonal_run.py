"""A run that estimates a diagonal: what it has seen, and the method that it takes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from hvp_operations.diagonal import DiagonalSpec, beside, num_rows
from hvp_operations.trace import TOGETHER

from hvp_core.linop.linear_operator import LinearOperator
from hvp_core.runs.algorithm import Budget
from hvp_core.stochastic.probing import FEWEST, Choice, Probing, Seen
from hvp_core.stochastic.samples import Moments
from hvp_core.stochastic.vector_moments import VectorMoments
from hvp_core.stochastic.xdiag import XDiagSketch

#: A basis of fewer vectors is not worth its products.
_LEAST_ROWS = 8


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
        foreseen: Variance, over all elements, that the end of the budget would bring if the sketch
            grew no more; infinite before that is known.
    """

    samples: VectorMoments
    corrections: VectorMoments | None
    part_samples: Moments
    part_corrections: Moments
    sketch: XDiagSketch | None = None
    is_grown: bool = False
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


def chosen(spec: DiagonalSpec, operator: LinearOperator, budget: Budget) -> Choice:
    """Choose the method, where the spec leaves it open, and its sizes."""
    most = min(TOGETHER, operator.most_together or TOGETHER)
    of_basis = _together(most, budget.num_vectors // 3)
    room = budget.num_vectors - beside(of_basis)
    rows = num_rows(budget.max_products, room, operator.domain.dimension)
    method, reason = _method(spec, operator, budget, rows)
    if method == "xdiag":
        return Choice(method=method, reason=reason, num_rows=rows, num_together=of_basis)
    together = _together(most, budget.num_vectors)
    return Choice(method=method, reason=reason, num_rows=0, num_together=together)


def _together(most: int, num_vectors: int) -> int:
    """The most random vectors of a group that so many vectors suffice for, or one."""
    return max([1, *(each for each in range(1, most + 1) if beside(each) <= num_vectors)])


def _method(
    spec: DiagonalSpec, operator: LinearOperator, budget: Budget, rows: int
) -> tuple[str, str]:
    if operator.domain.dimension <= min(FEWEST, budget.max_products):
        return "exact", "there are so few parameters that each coordinate takes its turn"
    if spec.method != "auto":
        return spec.method, "it was asked for"
    if spec.per is not None:
        return "hutchinson", "its probes give the sums over all parts at once"
    if operator.noise:
        return (
            "hutchinson",
            "products are coarser than the dtype: its mean is corrected by a few exact ones, and "
            "xdiag would need exact ones throughout",
        )
    if rows < _LEAST_ROWS:
        return "hutchinson", "memory or products do not suffice for a basis"
    return (
        "xdiag",
        "there is memory for a basis, which takes large eigenvalues out of the variance, and grows "
        "for as long as that pays",
    )
