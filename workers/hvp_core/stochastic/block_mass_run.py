"""A run that estimates masses of blocks: what it has seen, when it ends, and what comes next."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, final

import torch
from hvp_operations.block_mass import CORRECTIONS, LEAST_PROBES, BlockMassSpec, MassLevel
from hvp_operations.trace import Level as MomentsLevel
from torch import Tensor

from hvp_core.krylov.orthogonality import rounding
from hvp_core.linop.linear_operator import LinearOperator
from hvp_core.stochastic.probing import FEWEST
from hvp_core.stochastic.ratio import Level, Ratio, interval_of_ratio, ratio_of_means
from hvp_core.stochastic.samples import Moments
from hvp_core.stochastic.two_levels import COARSE_SHARE


@final
@dataclass
class Samples:
    """What probes have shown of one mean.

    Attributes:
        masses: Moments of the masses, (B · B,).
        off_block: Mass off the diagonal blocks, of each probe.
        total: The whole mass, of each probe.
    """

    masses: Moments
    off_block: list[float] = field(default_factory=list)
    total: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, level: MassLevel) -> Samples:
        """The samples of an earlier result."""
        moments = MomentsLevel(means=level.means, squares=level.squares, count=len(level.total))
        return cls(Moments.restored(moments), list(level.off_block), list(level.total))

    @property
    def count(self) -> int:
        """Number of probes."""
        return len(self.total)

    def add(self, masses: Tensor) -> None:
        """Take in the masses (B, B) that one more probe shows."""
        self.masses.add(masses.reshape(-1))
        self.total.append(float(masses.sum()))
        self.off_block.append(float(masses.clone().fill_diagonal_(0).sum()))

    def level(self) -> MassLevel:
        """The samples, written down."""
        of_masses = self.masses.level
        return MassLevel(
            means=of_masses.means,
            squares=of_masses.squares,
            off_block=tuple(self.off_block),
            total=tuple(self.total),
        )


@final
@dataclass(kw_only=True)
class BlockMassState:
    """What a run has seen.

    Attributes:
        samples: Masses that the operator's own products show.
        corrections: Differences of the masses of exact and coarse products, of other probes.
        under_way: Masses of the probe at hand, (B, B); the first `num_columns` columns are known.
        num_columns: Number of its parts that had their products.
        is_correcting: Whether it is one of the corrections.
        size: Sum over the samples of the squares by which the rounding of products goes.
        num_products: Products so far.
        num_exact: Of them, those of the exact operator where that is another.
        is_verified: Whether there was memory for the exact operator wherever it was needed.
        outcome: How the run ended; "" while it has not.
    """

    samples: Samples
    corrections: Samples
    under_way: Tensor
    num_columns: int = 0
    is_correcting: bool = False
    size: float = 0.0
    num_products: int = 0
    num_exact: int = 0
    is_verified: bool = True
    outcome: str = ""


@final
@dataclass(frozen=True)
class MassRun:
    """A run at one of its steps.

    Attributes:
        spec: The request.
        num_blocks: B, the number of blocks of parameters.
        max_products: Upper bound on products.
        operator: The operator.
        state: What the run has seen.
    """

    spec: BlockMassSpec
    num_blocks: int
    max_products: int
    operator: LinearOperator
    state: BlockMassState

    @property
    def is_coarse(self) -> bool:
        """Whether products have to be, and can be, compared with exact ones."""
        return bool(self.operator.noise) and self.state.is_verified

    @property
    def levels(self) -> list[Samples]:
        """The samples that an estimate is made of."""
        state = self.state
        return [each for each in (state.samples, state.corrections) if each.count > 1]

    def fraction(self) -> Ratio | None:
        """The fraction off the diagonal, without rounding; None where that is nothing so far."""
        if self.state.samples.count < 2:
            return None
        return ratio_of_means(self._of_fraction)

    @property
    def _of_fraction(self) -> list[Level]:
        return [(each.off_block, each.total) for each in self.levels]

    def interval(self, fraction: float) -> tuple[float, float]:
        """Both ends of the 95 % interval of the fraction, rounding included."""
        error = self.root_error()
        low, high = interval_of_ratio(self._of_fraction, fraction, 0.0, 1.0)
        return moved(low, -error), moved(high, error)

    def next(self) -> Literal["sampling", "correcting", ""]:
        """The kind of the next probe; "" where there is to be none."""
        state, each = self.state, self.num_blocks
        left, corrections = self.max_products - state.num_products, state.corrections.count
        reserve = 0
        if self.is_coarse and corrections < CORRECTIONS:
            most = (self.max_products // each - LEAST_PROBES) // 2
            reserve = 2 * each * min(CORRECTIONS - corrections, most)
        may_sample = state.samples.count < self.spec.num_probes and left - reserve >= each
        if self.is_coarse and state.samples.count > 1:
            has_to = corrections < CORRECTIONS and not may_sample
            if has_to or self._coarse_is_known():
                return "correcting" if left >= 2 * each else ""
        return "sampling" if may_sample else ""

    def _coarse_is_known(self) -> bool:
        """Whether the coarse level's error is within its share of the tolerance."""
        samples = self.state.samples
        if samples.count < min(FEWEST, self.spec.num_probes):
            return False
        coarse = ratio_of_means([(samples.off_block, samples.total)])
        return coarse.standard_error <= COARSE_SHARE * self._tolerance(coarse.value)

    def _tolerance(self, fraction: float) -> float:
        return max(self.spec.rtol * fraction, self.spec.atol)

    def judge(self) -> None:
        """End the run, or let it go on."""
        state, found, goes_on = self.state, self.fraction(), bool(self.next())
        is_enough = state.samples.count >= FEWEST
        if not any(state.samples.total) and (is_enough or not goes_on):
            state.outcome = "ZERO_OPERATOR"
            return
        outcome = "" if goes_on else "MAX_PRODUCTS"
        if self.is_coarse and state.corrections.count < CORRECTIONS:
            is_enough = False
        if found is not None and is_enough:
            tolerance, noise = self._tolerance(found.value), self.rounding(found.value)
            if found.standard_error <= max(tolerance, noise):
                outcome = "CONVERGED" if noise <= tolerance else "NOISE_LIMIT"
        is_compared = not self.operator.noise or (state.is_verified and state.corrections.count > 1)
        state.outcome = outcome if is_compared or not outcome else "UNVERIFIED"

    def rounding(self, fraction: float) -> float:
        """What the rounding of products can have moved the fraction by."""
        return moved(fraction, self.root_error()) - moved(fraction, 0.0)

    def root_error(self) -> float:
        """r: what rounding can have moved the root of a mass by, over that of the whole mass."""
        total = sum(math.fsum(each.total) / each.count for each in self.levels)
        if total <= 0:
            return math.inf
        eps = rounding(torch.finfo(self.operator.domain.dtype).eps)
        return eps * math.sqrt(self.state.size / self.state.samples.count / total)


def moved(fraction: float, error: float) -> float:
    """A fraction from 0 to 1 whose root is moved up by rounding, or down by an error below 0."""
    if error >= 1:
        return 1.0
    root = (math.sqrt(min(1.0, max(0.0, fraction))) + error) / (1 - error)
    return min(1.0, max(0.0, root) ** 2)
