"""Algorithms that ask an operator for products: configured, run in steps, stopped at any step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, final

from torch import Tensor

from hvp_core.linop.linear_operator import LinearOperator

StateT = TypeVar("StateT")


@final
@dataclass(frozen=True, kw_only=True)
class Budget:
    """The products and the memory that a run may take, and the vectors that it is given.

    Attributes:
        max_products: Products with the operator.
        num_vectors: Vectors that the run may hold beside the operator's own; at least the
            operation's `least_vectors`.
        inputs: The vectors that the spec names, (local,) each, by its fields, and those of the
            earlier result that the operation's extension needs, by its fields behind `EARLIER`;
            read, never written to, and not among the `num_vectors`.
        earlier: Result of the same question that the run goes on from; None for a run of its own.
    """

    max_products: int
    num_vectors: int
    inputs: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)
    earlier: Any = None


@final
@dataclass(frozen=True, kw_only=True)
class Advance:
    """Where a run stands after a step.

    Attributes:
        stage: A word, such as `iterating`.
        num_products: Products so far.
        detail: The operation's own progress.
    """

    stage: str
    num_products: int
    detail: Any


@final
@dataclass(frozen=True, kw_only=True)
class Found:
    """The answer of a finished run.

    Attributes:
        result: The operation's own result, without the loss; its `provenance` holds what the
            algorithm adds.
        vectors: Vectors that belong to the result, (local,) each, in its order. They may be views
            of the run's own memory: copy them before the state goes.
    """

    result: Any
    vectors: Sequence[Tensor] = ()


def derived_seed(seed: int, index: int) -> int:
    """A seed of 64 bits, different for each index and far from those that people choose."""
    return (seed + index * 0x9E3779B97F4A7C15) % 2**64


class Algorithm(ABC, Generic[StateT]):
    """A question and the method that answers it; frozen.

    Laws: everything that a run knows is in its state, a dataclass that `hvp_core.runs.snapshot` can
    write down after any step; a step makes a bounded number of products; the same state and
    operator give the same next state, bit for bit; what depends on one process alone is agreed on
    (`VectorSpace.agree`) before it decides anything.
    """

    @classmethod
    @abstractmethod
    def configure(cls, spec: Any, operator: LinearOperator, budget: Budget) -> Algorithm[StateT]:
        """Fill in what the spec leaves open; nothing is computed.

        Args:
            spec: Spec of the operation, checked.
            operator: Operator that the question is about.
            budget: Products and memory that the run may take, and the vectors that the spec names.
        """

    @abstractmethod
    def begin(self, operator: LinearOperator) -> StateT:
        """The state before the first product; allocates what the run holds."""

    @abstractmethod
    def step(self, operator: LinearOperator, state: StateT) -> Advance | None:
        """Go on by a few products, changing the state.

        Returns:
            Where the run stands; None, with nothing done, if the run was finished already.

        Raises:
            CurvatureError: NON_FINITE.
        """

    @abstractmethod
    def result(self, operator: LinearOperator, state: StateT) -> Found:
        """The answer of a finished run."""


def drive(
    algorithm: Algorithm[StateT],
    operator: LinearOperator,
    tell: Callable[[Advance], None] = lambda advance: None,
) -> Found:
    """Run an algorithm from its beginning to its end.

    Args:
        algorithm: Algorithm that is configured for the operator.
        operator: Operator that the question is about.
        tell: Called with where the run stands, after every step.

    Returns:
        The answer.

    Raises:
        CurvatureError: NON_FINITE.
    """
    state = algorithm.begin(operator)
    while (advance := algorithm.step(operator, state)) is not None:
        tell(advance)
    return algorithm.result(operator, state)
