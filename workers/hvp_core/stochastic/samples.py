"""Means of samples with standard errors, and intervals made of several of them."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

#: Of so many degrees of freedom and more, Student's t is taken at this many: 1.962, not 1.960.
_MOST_DEGREES = 1000


@functools.cache
def student_t(degrees: int) -> float:
    """The number t that a Student's variable keeps within ± t of zero with a probability of 95 %.

    The probability is a finite sum for whole degrees (Abramowitz and Stegun, "Handbook of
    Mathematical Functions", 26.7.3 and 26.7.4), and grows with t: bisection finds it.

    Args:
        degrees: Degrees of freedom, at least 1; samples less one.
    """
    degrees = min(degrees, _MOST_DEGREES)
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, degrees) < 0.95 else (low, middle)
    return math.sqrt(degrees) * math.tan(high)


def _within(angle: float, degrees: int) -> float:
    """P(|t| ≤ √degrees · tan(angle))."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term = cosine if odd else 1.0
    total = term if degrees > 1 else 0.0
    for power in range(3 if odd else 2, degrees - 1, 2):
        term *= cosine * cosine * (power - 1) / power
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


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
