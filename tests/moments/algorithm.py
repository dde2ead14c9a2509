"""(Aⁱv)·(Aʲv), a product at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hvp_core.linop.linear_operator import LinearOperator
from hvp_core.runs.algorithm import Advance, Algorithm, Budget, Found
from hvp_operations.moments import MomentsProgress, MomentsResult, MomentsSpec
from torch import Tensor


@dataclass
class MomentsState:
    """The latest power, and the moments so far."""

    power: Tensor
    moments: list[float]
    num_products: int = 0


@dataclass(frozen=True)
class Moments(Algorithm[MomentsState]):
    """Powers of the operator on one vector."""

    spec: MomentsSpec
    start: Sequence[Tensor]

    @classmethod
    def configure(cls, spec: MomentsSpec, operator: LinearOperator, budget: Budget) -> Moments:
        """See Algorithm."""
        return cls(spec, budget.inputs["start"])

    def begin(self, operator: LinearOperator) -> MomentsState:
        """See Algorithm."""
        (v,) = self.start or [operator.domain.random(self.spec.seed, "gaussian")]
        return MomentsState(v, [float(operator.domain.dots(v[None], v)[0])])

    def step(self, operator: LinearOperator, state: MomentsState) -> Advance | None:
        """See Algorithm."""
        if len(state.moments) > self.spec.degree:
            return None
        (following,) = operator.apply([state.power])
        state.num_products += 1
        for vector in (state.power, following):
            state.moments.append(float(operator.domain.dots(vector[None], following)[0]))
        state.power = following
        return Advance(
            stage="iterating",
            num_products=state.num_products,
            detail=MomentsProgress(moment=state.moments[-1]),
        )

    def result(self, operator: LinearOperator, state: MomentsState) -> Found:
        """See Algorithm."""
        found = tuple(state.moments[: self.spec.degree + 1])
        return Found(result=MomentsResult(num_products=state.num_products, moments=found))
