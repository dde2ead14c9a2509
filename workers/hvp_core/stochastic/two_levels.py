"""Means of samples of random signs; of a coarse operator in two levels.

What is estimated of A is E f(Ã, z) + E (f(A, z) − f(Ã, z)), with probes of its own for each term:
many coarse products, and a few probes with a coarse and an exact product each (Giles, "Multilevel
Monte Carlo methods", Acta Numerica 24 (2015)).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from hvp_core.linop.linear_operator import LinearOperator
from hvp_core.stochastic.probing import FEWEST, Stepper

#: The fewest probes with a coarse and an exact product; where the seeds of these probes begin.
CORRECTIONS, CORRECTION_SEEDS = 4, 1 << 32
#: The share of the tolerance that the coarse level may take.
COARSE_SHARE = 0.9


@dataclass(frozen=True)
class TwoLevels(Stepper):
    """The mean of samples of random signs, with a correction where products are coarse."""

    @property
    @abstractmethod
    def num_samples(self) -> int:
        """Number of samples of the operator's own products."""

    @property
    @abstractmethod
    def num_corrections(self) -> int:
        """Number of samples of the difference of exact and coarse products."""

    @property
    def num_compared(self) -> int:
        """Number of random vectors of corrections so far, those of earlier runs among them."""
        return self.num_corrections

    @abstractmethod
    def is_known(self) -> bool:
        """Whether the first level's error is within its share of the tolerance."""

    @abstractmethod
    def sample(self, vectors: Sequence[Tensor]) -> None:
        """Take in one sample of each of these probes."""

    @abstractmethod
    def compare(self, exact: LinearOperator, vectors: Sequence[Tensor]) -> None:
        """Take in the difference of exact and coarse samples of each of these probes."""

    def step(self) -> str:
        """See Stepper."""
        run = self.run
        if self._corrects():
            self._correct()
            return "correcting"
        count = max(1, min(run.choice.num_together, run.remaining - self._reserve()))
        self.sample(run.draw(count, "rademacher"))
        return "sampling"

    @property
    def _is_coarse(self) -> bool:
        """Whether products have to be, and can be, compared with exact ones."""
        return bool(self.run.operator.noise) and self.run.state.is_verified

    def _reserve(self) -> int:
        """Products that are kept for corrections."""
        if not self._is_coarse or self.num_corrections >= CORRECTIONS:
            return 0
        return 2 * min(CORRECTIONS, (self.run.max_products - 2) // 2)

    def _corrects(self) -> bool:
        """Whether the coarse level is known well enough, so that the other one has its turn."""
        if not self._is_coarse or self.num_samples < 2:
            return False
        if self.run.remaining <= self._reserve():
            return True
        return self.num_samples >= FEWEST and self.is_known()

    def _correct(self) -> None:
        """Compare coarse products with exact ones, of one more group of probes."""
        run = self.run
        exact = run.exact()
        if not run.state.is_verified:
            return
        first = CORRECTION_SEEDS + self.num_compared
        count = max(1, min(run.choice.num_together, CORRECTIONS, run.remaining // 2))
        vectors = [run.vector(index, "rademacher") for index in range(first, first + count)]
        self.compare(exact, vectors)

    def is_enough(self) -> bool:
        """See Stepper."""
        is_corrected = not self._is_coarse or self.num_corrections >= CORRECTIONS
        return self.num_samples >= FEWEST and is_corrected

    def can_go_on(self) -> bool:
        """See Stepper."""
        return self.run.remaining >= (2 if self._corrects() else 1)

    @property
    def is_compared(self) -> bool:
        """See Stepper."""
        return not self.run.operator.noise or self.num_corrections >= 2
