"""vᵀAʲv for j up to a degree, of one random vector: a newcomer's first operation."""

from __future__ import annotations

from dataclasses import dataclass

from hvp_operations.checking import FIRST_SEED, Names, Seed
from hvp_operations.operation import Cost, Detail, Input, Operation, Result, Rule, Table


@dataclass(frozen=True)
class MomentsSpec:
    """Compute moments of the spectrum that one vector sees.

    Attributes:
        degree: The highest power.
        seed: Of a random vector.
        start: The vector; a random one where it is left out.
    """

    degree: int = 4
    seed: Seed = FIRST_SEED
    start: Names = ()


@dataclass(frozen=True, kw_only=True)
class MomentsProgress(Detail):
    """The latest moment."""

    moment: float = 0.0

    def table(self) -> Table:
        """One row."""
        return Table(headings=("latest moment",), rows=((f"{self.moment:.6g}",),))


@dataclass(frozen=True, kw_only=True)
class MomentsResult(Result):
    """The moments, from degree 0."""

    moments: tuple[float, ...]


OPERATION = Operation(
    name="moments",
    summary="Compute moments of the spectrum that one random vector sees.",
    spec=MomentsSpec,
    progress=MomentsProgress,
    result=MomentsResult,
    rules=(
        Rule(
            field="degree",
            reason="DEGREE_INVALID",
            holds=lambda spec, facts: spec.degree >= 1,
            allowed=lambda spec, facts: "1 or more are possible",
        ),
    ),
    cost=lambda spec, facts: Cost(
        max_products=(spec.degree + 1) // 2, least_vectors=3, wished_vectors=3
    ),
    inputs=(Input(field="start", least=0),),
    headline=lambda spec: f"moments to degree {spec.degree}",
    algorithm="hvp_operations.moments.algorithm:Moments",
    record="hvp_operations.moments.record:MomentsResult",
)
