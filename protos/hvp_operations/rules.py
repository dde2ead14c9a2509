"""Rules of specs that several operations have in common: tolerances, sizes of a basis, seeds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hvp_operations.operation import Facts, Rule

SEED_RULE: Rule[Any] = Rule(
    field="seed",
    reason="SEED_INVALID",
    holds=lambda spec, facts: spec.seed >= 0,
    allowed=lambda spec, facts: "a seed is 0 or more",
)


def of_estimates(quantity: str) -> tuple[Rule[Any], Rule[Any]]:
    """The rules of `rtol` and `atol`, tolerances on the standard error of a quantity.

    Args:
        quantity: What is estimated, such as `the trace`.
    """
    return (
        Rule(
            field="rtol",
            reason="RTOL_INVALID",
            holds=lambda spec, facts: 0 < spec.rtol < 1,
            allowed=lambda spec, facts: (
                f"0 < rtol < 1 is possible; it is relative to {quantity}. The error falls as one "
                "over the root of the products"
            ),
        ),
        Rule(
            field="atol",
            reason="ATOL_INVALID",
            holds=lambda spec, facts: spec.atol >= 0,
            allowed=lambda spec, facts: f"0 or more is possible, in units of {quantity}",
        ),
    )


def of_basis(least: Callable[[Any, Facts], int], most: Callable[[Facts], int]) -> Rule[Any]:
    """The rule of `num_lanczos_vectors`, the size of a Krylov basis.

    Args:
        least: Gives the smallest basis that does.
        most: Gives the dimension of the space.
    """
    return Rule(
        field="num_lanczos_vectors",
        reason="NUM_LANCZOS_VECTORS_INVALID",
        holds=lambda spec, facts: (
            spec.num_lanczos_vectors is None
            or least(spec, facts) <= spec.num_lanczos_vectors <= most(facts)
        ),
        allowed=lambda spec, facts: (
            f"{least(spec, facts)} to {most(facts)} are possible; left out, the server chooses"
        ),
    )


def of_more(k: int, known: int) -> str:
    """Why an extension cannot ask for k of what a job has so many of; "" where it can."""
    if k >= known:
        return ""
    return f"k is {k}, and the job has {known} already; ask for {known} or more"
