"""Running means and spreads of the elements of vectors, in memory that is taken once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

from hvp_operations.students_t import student_t
from torch import Tensor

from hvp_core.runs.snapshot import vectors_of_the_space
from hvp_core.vectors.vector_space import VectorSpace


@final
@dataclass
class VectorEstimate:
    """An estimate of a vector.

    Attributes:
        rows: The estimate, and the standard deviation of each of its elements, (2, local).
        factor: Standard errors that an interval of 95 % has on each side of the estimate; 0 of an
            estimate without an error.
    """

    rows: Tensor
    factor: float = 0.0

    @property
    def value(self) -> Tensor:
        """The estimate, (local,)."""
        return self.rows[0]

    @property
    def error(self) -> Tensor:
        """The standard error of its elements, (local,)."""
        return self.rows[1]

    def norms(self, space: VectorSpace) -> tuple[float, float]:
        """Norm of what is estimated, and of its standard error.

        The estimate's square has the mean of the one's square and the other's: what it is beyond
        the standard error's is what is estimated.
        """
        value, error = (
            float(space.dots(each.unsqueeze(0), each)[0]) for each in (self.value, self.error)
        )
        return max(0.0, value - error) ** 0.5, error**0.5


@final
@dataclass
class VectorMoments:
    """Mean and spread of samples that are vectors (Welford, Technometrics 4 (1962)).

    Attributes:
        rows: Mean of the samples, and sum of their squared distances from it, (2, local).
        count: Number of samples.
    """

    rows: Tensor = field(metadata=vectors_of_the_space("num_rows"))
    count: int = 0

    @classmethod
    def of(cls, space: VectorSpace) -> VectorMoments:
        """The moments of no samples."""
        vector = space.zeros()
        return cls(vector.new_zeros(2, len(vector)))

    @property
    def num_rows(self) -> int:
        """Both rows hold something, be it zeros."""
        return 2

    @property
    def mean(self) -> Tensor:
        """Mean of the samples, (local,)."""
        return self.rows[0]

    def clear(self) -> None:
        """Forget the samples."""
        self.rows.zero_()
        self.count = 0

    def add(self, sample: Tensor) -> None:
        """Take in one more sample, (local,), whose memory is then free for other things."""
        self.count += 1
        mean, squares = self.rows
        distance = sample.sub_(mean)
        mean.add_(distance, alpha=1 / self.count)
        squares.addcmul_(distance, distance, value=1 - 1 / self.count)

    def estimate(self) -> VectorEstimate:
        """The mean with its standard error, as new vectors; of two samples or more."""
        rows = self.rows.clone()
        rows[1].div_(self.count * (self.count - 1)).sqrt_()
        return VectorEstimate(rows, student_t(self.count - 1))


def added(space: VectorSpace, first: VectorEstimate, second: VectorEstimate) -> VectorEstimate:
    """The sum of independent estimates, in the first one's memory.

    The factor is that of the norms: of estimates with few degrees of freedom it is near theirs only
    where they have most of the error.
    """
    (_, one), (_, other) = first.norms(space), second.norms(space)
    half = (first.factor * one) ** 2 + (second.factor * other) ** 2
    whole = one**2 + other**2
    first.value.add_(second.value)
    first.error.square_().addcmul_(second.error, second.error).sqrt_()
    first.factor = (half / whole) ** 0.5 if whole else max(first.factor, second.factor)
    return first
