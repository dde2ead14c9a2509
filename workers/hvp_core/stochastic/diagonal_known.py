"""What an earlier run knows of a diagonal, and how a run goes on from it.

Plain means
    of random signs are gone on with: mean and standard error give back the sums over the samples,
    and the new samples are added to them. What follows is that of one long run.

Other estimates
    are made of what is not kept: of the basis of a sketch, or of two levels of which only the sum
    is known. The new run, with random signs of its own, makes an independent estimate, and the
    answer is the mean of the two in which either has the weight of its inverse variance. The
    weights are two numbers, not two for each element: the variances are sums over all elements, so
    that they are nearly those that are meant, and an element's own errors have little part in them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from hvp_operations.diagonal import DiagonalResult
from torch import Tensor

from hvp_core.krylov.orthogonality import finite_norm, rounding
from hvp_core.stochastic.block_traces import Standing
from hvp_core.stochastic.samples import Moments
from hvp_core.stochastic.vector_moments import VectorEstimate, VectorMoments
from hvp_core.vectors.vector_space import VectorSpace


@final
@dataclass(frozen=True)
class Known:
    """An earlier estimate of a diagonal.

    Attributes:
        result: Its figures.
        value: The estimate, (local,); read only.
        error: Standard error of each element, (local,); read only.
    """

    result: DiagonalResult
    value: Tensor
    error: Tensor

    @property
    def is_mean(self) -> bool:
        """Whether it is a plain mean, with which a run goes on."""
        return self.result.num_samples > 0

    def error_norm(self, space: VectorSpace) -> float:
        """Norm of the standard error.

        Raises:
            CurvatureError: NON_FINITE.
        """
        return finite_norm(space, self.error)

    def restore(self, samples: VectorMoments, part_samples: Moments) -> None:
        """Set moments to those of the samples that a plain mean is made of."""
        count = self.result.num_samples
        samples.count = part_samples.count = count
        samples.rows[0] = self.value
        torch.mul(self.error, self.error, out=samples.rows[1]).mul_(count * (count - 1))
        # That of the whole comes first, and is nowhere told.
        means = [0.0, *(each.value for each in self.result.parts)]
        errors = [0.0, *(each.standard_error for each in self.result.parts)]
        part_samples.mean = torch.tensor(means, dtype=torch.float64)
        squares = torch.tensor(errors, dtype=torch.float64).square()
        part_samples.squares = squares * count * (count - 1)

    def size(self, eps: float) -> float:
        """What the rounding of one sample goes by, on average."""
        return self.result.rounding / rounding(eps)


def share(known: float, new: float) -> float:
    """The weight of a new estimate in the mean with an earlier one, by their inverse variances.

    Args:
        known: Norm of the standard error of the earlier one, infinite where there is none.
        new: That of the new one.
    """
    if math.isinf(known) or not new:
        return 1.0
    return known**2 / (known**2 + new**2)


def joined_error(known: float, new: float) -> float:
    """Norm of the standard error of the mean of two estimates."""
    weight = share(known, new)
    return math.hypot(weight * new, (1 - weight) * known) if weight < 1 else new


def joined(space: VectorSpace, known: Known, new: VectorEstimate) -> tuple[VectorEstimate, float]:
    """The mean of an earlier estimate and a new one, in the new one's memory, and its share in it.

    The factor is that of the norms, as that of a sum of estimates is.
    """
    one, (_, other) = known.error_norm(space), new.norms(space)
    weight = share(one, other)
    rest = 1 - weight
    new.value.mul_(weight).add_(known.value, alpha=rest)
    new.error.mul_(weight).square_().addcmul_(known.error, known.error, value=rest**2).sqrt_()
    terms = (
        ((weight * other) ** 2, new.factor),
        ((rest * one) ** 2, known.result.interval_factor),
    )
    whole = sum(square for square, _ in terms)
    if whole:
        new.factor = (sum(square * factor**2 for square, factor in terms) / whole) ** 0.5
    return new, weight


def joined_sums(known: Known, new: Standing, weight: float) -> Standing:
    """The sums over the parts that belong to the mean of two estimates."""
    rest = 1 - weight
    parts = known.result.parts
    noise = known.result.rounding
    before = [
        (0.0, *(each.value for each in parts)),
        (0.0, *(each.standard_error for each in parts)),
        (0.0, *((each.high - each.low) / 2 - noise * each.num_parameters**0.5 for each in parts)),
    ]
    value, error, half = (torch.tensor(each, dtype=torch.float64) for each in before)
    return Standing(
        weight * new.value + rest * value,
        torch.hypot(weight * new.error, rest * error),
        torch.hypot(weight * new.half, rest * half.clamp_min(0)),
    )
