"""The operator that a request names, made of a model's matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import final

import torch
from hvp_core.autodiff.product_spec import Draws
from hvp_core.errors import CurvatureError
from hvp_core.linop.block_diagonal import BlockDiagonal
from hvp_core.linop.compositions import Identity, Preconditioned, Scaled, Shifted, Sum
from hvp_core.linop.linear_operator import LinearOperator
from hvp_core.vectors.space import ShardedSpace
from hvp_operations.matrices import Matrix

from hvp_workers import backend as api
from hvp_workers.operators import (
    TOGETHER,
    CurvatureOperator,
    LoadedOperator,
    no_vector_memory,
)
from hvp_workers.plan import Policy


@final
class ComposedOperator:
    """An operator, with the matrices that it is made of.

    Args:
        loaded: The loss at a point.
        operator: The operator.
        root: The diagonal of D^-1/2, where the operator is preconditioned.
        is_checked: Whether the products of the first calls are compared.

    Attributes:
        linear: The operator itself.
        num_matrices: Number of matrices that each of its products takes one of.
    """

    def __init__(
        self,
        loaded: LoadedOperator,
        operator: api.Operator,
        root: torch.Tensor | None,
        *,
        is_checked: bool = True,
    ):
        def matrix(kind: str, draws: Draws) -> CurvatureOperator:
            return CurvatureOperator(loaded, kind, operator.precision, draws, is_checked=is_checked)

        composition = operator.composition
        if composition is None:
            self._matrices = [matrix(operator.kind, draws_of(operator))]
            self.linear: LinearOperator = self._matrices[0]
        else:
            self._matrices = [
                matrix(each.kind, Draws(each.sample_seed, each.num_samples or 1))
                for each in composition.terms
            ]
            self.linear = _composed(composition, self._matrices, loaded.curvature.space, root)
        self.num_matrices = len(self._matrices)

    def notes(self) -> Mapping[str, str]:
        """How the products of its matrices were computed."""
        return {key: note for each in self._matrices for key, note in each.notes().items()}


def _composed(
    composition: Matrix,
    matrices: list[CurvatureOperator],
    space: ShardedSpace,
    root: torch.Tensor | None,
) -> LinearOperator:
    terms: list[LinearOperator] = [
        each if term.coefficient == 1 else Scaled(each, term.coefficient)
        for term, each in zip(composition.terms, matrices, strict=True)
    ]
    linear: LinearOperator
    if not terms:
        linear = Scaled(Identity(space), composition.damping)
    else:
        linear = terms[0] if len(terms) == 1 else Sum(*terms)
        if composition.blocks is not None:
            numbers = {name: number for number, name in enumerate(space.parts())}
            blocks = composition.blocks.divide(list(numbers)).values()
            linear = BlockDiagonal(linear, [[numbers[name] for name in each] for each in blocks])
        if composition.damping:
            linear = Shifted(linear, composition.damping)
    if root is not None:
        linear = Preconditioned(linear, root)
    return Shifted(linear, composition.shift) if composition.shift else linear


def quadratic(
    linear: LinearOperator,
    vectors: Sequence[torch.Tensor],
    room_bytes: int,
    beside: int,
    decide: Policy,
) -> list[float]:
    """v·Av for each vector; products that are made on the way do not outlive the call.

    Args:
        linear: The operator A.
        vectors: This rank's shards.
        room_bytes: Memory that products may take.
        beside: Vectors that each product takes beside itself.
        decide: Decides how many products are taken at once.

    Raises:
        CurvatureError: VECTOR_MEMORY: there is no room for one product, or DETERMINISTIC_MEMORY,
            for as many as it has to be; NON_FINITE.
    """
    found: list[float] = []
    while len(found) < len(vectors):
        some = vectors[len(found) : len(found) + TOGETHER]
        forms = linear.forms(some)
        if forms is None:
            each_bytes = (1 + beside) * vectors[0].nbytes
            at_once = decide.at_once(len(some), each_bytes=each_bytes, room_bytes=room_bytes)
            if at_once < 1:
                raise no_vector_memory(each_bytes, max(0, room_bytes))
            some = some[:at_once]
            products = linear.apply(some, borrow=True)
            forms = [
                float(linear.domain.dots(vector.unsqueeze(0), product)[0])
                for vector, product in zip(some, products, strict=True)
            ]
        found += forms
    return found


def draws_of(operator: api.Operator) -> Draws:
    """The labels of an operator, if it is a Fisher matrix of drawn ones."""
    return Draws(operator.sample_seed, operator.num_samples or 1)


def inverse_root(space: ShardedSpace, diagonal: torch.Tensor) -> torch.Tensor:
    """The diagonal of D^-1/2.

    Args:
        space: Space of the vector.
        diagonal: The diagonal of D, this rank's shard.

    Raises:
        CurvatureError: PRECONDITIONER_INVALID, on all ranks alike: an element is not positive and
            finite.
    """
    index = space.first(diagonal, lambda part: ~((part > 0) & part.isfinite()))
    if index is not None:
        raise CurvatureError(
            "PRECONDITIONER_INVALID",
            f"element {index} of the preconditioner is not a positive finite number; D^-1/2 takes "
            "the root of each, so add something to those that are zero",
            {"index": str(index)},
        )
    # Padding is 0 in every vector, whatever it is multiplied by.
    return diagonal.where(diagonal > 0, 1).sqrt().reciprocal_()
