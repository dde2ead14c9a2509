"""Runs that ask an operator about random vectors until an estimate is known well enough.

The trace and the diagonal are estimated alike: by probes in groups, by a sketch each of whose
vectors is left out in turn, or by all coordinates one after another. What they have in common is
here: how products are asked for and counted, what rounding goes by, and when a run ends.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, final

import torch
from hvp_operations.parameters import layer_of
from hvp_operations.trace import Per
from torch import Tensor

from hvp_core.krylov.orthogonality import finite, finite_dots, finite_norm, rounding
from hvp_core.linop.linear_operator import LinearOperator
from hvp_core.runs.algorithm import derived_seed
from hvp_core.vectors.vector_space import Distribution, VectorSpace

#: Random vectors before the standard error is believed; so few coordinates each take their turn.
FEWEST = 16


@final
@dataclass(frozen=True, kw_only=True)
class Choice:
    """A method and its sizes.

    Attributes:
        method: The method; `exact` takes all coordinates in turn.
        reason: Why it is this one, as a sentence.
        num_rows: Vectors that its basis has room for; 0 of a method without a basis.
        num_together: Random vectors whose products are taken in one call.
    """

    method: str
    reason: str
    num_rows: int
    num_together: int


class Asked(Protocol):
    """What the specs of estimates have in common."""

    @property
    def rtol(self) -> float:
        """Tolerance on the standard error, relative to what is estimated."""

    @property
    def atol(self) -> float:
        """Tolerance on the standard error in units of what is estimated."""

    @property
    def per(self) -> Per | None:
        """The diagonal blocks whose traces are asked for too."""

    @property
    def seed(self) -> int:
        """Seed of the random vectors."""


def blocks(space: VectorSpace, per: Per | None) -> dict[str, list[int]]:
    """The numbers of the parts of a space that belong to each diagonal block, by its name."""
    found: dict[str, list[int]] = {}
    if per is not None:
        for number, name in enumerate(space.parts()):
            found.setdefault(layer_of(name) if per == "layer" else name, []).append(number)
    return found


@dataclass(kw_only=True)
class Seen:
    """What a run has seen, whatever it estimates; the base of every state.

    Attributes:
        num_coordinates: Number of coordinates that have had their turn; −1 before they are begun.
        size: Sum of the sizes by which the rounding of averaged samples goes.
        num_sizes: Number of these samples.
        whole_size: The same sum of what is added up, not averaged.
        num_drawn: Random vectors drawn so far.
        num_products: Products so far.
        num_exact: Of them, those of the exact operator where that is another.
        is_verified: Whether there was memory for the exact operator wherever it was needed.
        outcome: How the run ended; "" while it has not.
    """

    num_coordinates: int = -1
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
        """Random vectors that the estimate is made of."""
        return 0 if self.num_coordinates >= 0 else self.num_drawn


@dataclass(frozen=True)
class Probing(ABC):
    """A run at one of its steps; the base of every kind of run.

    Attributes:
        spec: The request.
        choice: The method and its sizes.
        max_products: Upper bound on products.
        operator: The operator.
        state: What the run has seen.
    """

    spec: Asked
    choice: Choice
    max_products: int
    operator: LinearOperator
    state: Seen

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

    def apply(
        self, source: LinearOperator, vectors: Sequence[Tensor], *, borrow: bool = True
    ) -> list[Tensor]:
        """Products that are counted, and good until the next call unless they are one's own."""
        self.count(source, len(vectors))
        return source.apply(vectors, borrow=borrow)

    def count(self, source: LinearOperator, num_products: int) -> None:
        """Count products with the operator or the exact one."""
        self.state.num_products += num_products
        if source is not self.operator:
            self.state.num_exact += num_products

    def numbers(self, vector: Tensor, product: Tensor) -> Tensor:
        """v·w of two vectors, of the whole and of each block, (1 + blocks,) float64.

        Raises:
            CurvatureError: NON_FINITE.
        """
        if not self.blocks:
            return finite_dots(self.space, vector.unsqueeze(0), product)
        parts = finite(self.space.dots_by_part(vector, product))
        sums = torch.stack([parts[numbers].sum() for numbers in self.blocks.values()])
        return torch.cat((sums.sum().reshape(1), sums))

    def note_size(self, size: float) -> None:
        """Note what the rounding of a sample goes by, in its units."""
        self.state.size += size
        self.state.num_sizes += 1

    def size_of(self, source: LinearOperator, product: Tensor, length: float) -> float:
        """What the rounding of a source's product with a vector of this norm goes by.

        Where terms of the operator cancel, their errors are those of larger products.
        """
        return max(finite_norm(self.space, product), source.size * length)

    def rounding(self, rest: float) -> float:
        """What the rounding of products can have moved the estimate by.

        Args:
            rest: What a sketch took for rounding of what is outside its span.
        """
        state = self.state
        size = state.whole_size
        if state.num_sizes and state.num_coordinates < 0:
            size += state.size / state.num_sizes
        return rounding(torch.finfo(self.space.dtype).eps) * size + rest


@dataclass(frozen=True)
class Stepper(ABC):
    """A method at work in a run.

    Attributes:
        run: The run.
    """

    run: Probing

    @abstractmethod
    def step(self) -> str:
        """Take in a few products, and say the stage in a word. Raises CurvatureError NON_FINITE."""

    @abstractmethod
    def is_enough(self) -> bool:
        """Whether the standard error is to be believed."""

    @abstractmethod
    def can_go_on(self) -> bool:
        """Whether the budget suffices for another step, which may be prepared here."""

    @property
    def rest(self) -> float:
        """What a sketch took for rounding of what is outside its span, in units of the estimate."""
        return 0.0

    @property
    def is_compared(self) -> bool:
        """Whether coarse products, where the method takes any, were compared with exact ones."""
        return True


@dataclass(frozen=True)
class Turns(Stepper):
    """All coordinates one after another: exact but for rounding."""

    @abstractmethod
    def take(self, source: LinearOperator, start: int, vectors: Sequence[Tensor]) -> None:
        """Take in the products with the unit vectors of the coordinates from `start` on."""

    def step(self) -> str:
        """See Stepper."""
        run, state = self.run, self.run.state
        start = state.num_coordinates
        stop = min(start + run.choice.num_together, run.space.dimension)
        vectors = [run.space.coordinate(index) for index in range(start, stop)]
        self.take(run.exact(), start, vectors)
        state.num_coordinates = stop
        return "exact"

    def is_enough(self) -> bool:
        """See Stepper."""
        return self.run.state.num_coordinates == self.run.space.dimension

    def can_go_on(self) -> bool:
        """See Stepper; they are begun only where the budget suffices for all."""
        return True


def judge(run: Probing, method: Stepper, error: float, tolerance: float) -> None:
    """End the run, or choose how it goes on.

    Args:
        run: The run.
        method: The method that has made the last step.
        error: The standard error; infinite where nothing is known.
        tolerance: The standard error that will do.
    """
    state = run.state
    if error < float("inf") and method.is_enough():
        noise = run.rounding(method.rest)
        if error <= max(tolerance, noise):
            _end(run, method, "CONVERGED" if noise <= tolerance else "NOISE_LIMIT")
            return
        if _coordinates_are_cheaper(run, error, tolerance):
            state.num_coordinates, state.whole_size = 0, 0.0
            return
    if not method.can_go_on():
        _end(run, method, "MAX_PRODUCTS")


def _end(run: Probing, method: Stepper, outcome: str) -> None:
    state = run.state
    state.is_verified = state.is_verified and method.is_compared
    state.outcome = outcome if state.is_verified else "UNVERIFIED"


def _coordinates_are_cheaper(run: Probing, error: float, tolerance: float) -> bool:
    """Whether all coordinates take fewer products than are missing, by the spread so far."""
    if run.space.dimension > run.remaining:
        return False
    if not tolerance:
        return True
    needed = (error / tolerance) ** 2 * run.state.num_products
    return needed - run.state.num_products > run.space.dimension


def method_told(choice: Choice, state: Seen) -> tuple[str, str]:
    """The method that an estimate was made by, and why."""
    if state.num_coordinates < 0 or choice.method == "exact":
        return choice.method, choice.reason
    return "exact", (
        f"{choice.method} would have taken more products than there are coordinates: each of these "
        "took its turn"
    )
