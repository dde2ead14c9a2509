"""Means of samples with standard errors, and intervals made of several of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from hvp_operations.students_t import student_t
from hvp_operations.trace import Level
from torch import Tensor


@final
@dataclass(frozen=True)
class Estimate:
    """An estimate of one number or several, from independent samples of them together.

    Attributes:
        value: The mean, (p,) float64.
        standard_error: Standard deviation of the mean, (p,) float64.
        degrees: Degrees of freedom that the standard error has.
    """

    value: Tensor
    standard_error: Tensor
    degrees: int


def combined(terms: Sequence[tuple[float, Estimate]]) -> tuple[Tensor, Tensor, Tensor]:
    """A weighted sum of independent estimates.

    The half-width is √(Σ (w t s)²), with t of each estimate's own degrees of freedom: of normal
    estimates such an interval holds the truth with at least the probability of each (Banerjee,
    "Approximate confidence interval for linear functions of means of k populations when the
    population variances are not equal", Sankhyā 22 (1960)).

    Args:
        terms: Weights with their estimates.

    Returns:
        Value, standard error and half-width of the 95 % interval, (p,) each.
    """
    value = torch.stack([weight * each.value for weight, each in terms]).sum(0)
    errors = [(weight * each.standard_error).square() for weight, each in terms]
    halves = [
        error * student_t(each.degrees) ** 2 for error, (_, each) in zip(errors, terms, strict=True)
    ]
    return value, torch.stack(errors).sum(0).sqrt(), torch.stack(halves).sum(0).sqrt()


@final
@dataclass
class Moments:
    """Running mean and spread of samples (Welford, Technometrics 4 (1962)).

    Attributes:
        mean: Mean of the samples so far, (p,) float64.
        squares: Sum of their squared distances from the mean, (p,) float64.
        count: Number of samples.
    """

    mean: Tensor
    squares: Tensor
    count: int = 0

    @classmethod
    def of(cls, num_parts: int) -> Moments:
        """The moments of no samples of `num_parts` numbers each."""
        zeros = torch.zeros(num_parts, dtype=torch.float64)
        return cls(zeros, zeros.clone())

    @classmethod
    def restored(cls, level: Level) -> Moments:
        """The moments that were written down."""
        mean, squares = (
            torch.tensor(each, dtype=torch.float64) for each in (level.means, level.squares)
        )
        return cls(mean, squares, level.count)

    @property
    def level(self) -> Level:
        """The moments, written down."""
        return Level(
            means=tuple(self.mean.tolist()), squares=tuple(self.squares.tolist()), count=self.count
        )

    def add(self, sample: Tensor) -> None:
        """Take in one more sample, (p,) float64."""
        self.count += 1
        distance = sample - self.mean
        self.mean = self.mean + distance / self.count
        self.squares = self.squares + distance * (sample - self.mean)

    def estimate(self) -> Estimate:
        """The mean with its standard error; of two samples or more."""
        error = (self.squares / (self.count - 1) / self.count).sqrt()
        return Estimate(self.mean, error, self.count - 1)
