"""Runs that go on from what another one has found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hvp_core.linop.linear_operator import LinearOperator
from hvp_core.runs.algorithm import Algorithm, Budget, Found, drive
from hvp_operations.operation import EARLIER, Operation, load
from torch import Tensor


def going_on(
    operation: Operation[Any],
    spec: Any,
    operator: LinearOperator,
    earlier: Found | None,
    *,
    num_vectors: int = 10**6,
    max_products: int = 300,
) -> Algorithm[Any]:
    """The algorithm of a question, with what its extension needs of an earlier answer."""
    inputs: dict[str, Any] = {each.field: () for each in operation.inputs}
    if earlier is not None:
        assert operation.extension is not None
        assert operation.extension.refusal(spec, earlier.result) == ""
        of = by_field(earlier)
        inputs |= {f"{EARLIER}{name}": of[name] for name in operation.extension.vectors}
        inputs |= {each.field: of[each.taken_from] for each in operation.inputs if each.taken_from}
    budget = Budget(
        max_products=spec.max_products or max_products,
        num_vectors=num_vectors,
        inputs=inputs,
        earlier=earlier and earlier.result,
    )
    algorithm: Algorithm[Any] = load(operation.algorithm).configure(spec, operator, budget)
    return algorithm


def answer(algorithm: Algorithm[Any], operator: LinearOperator) -> Found:
    """The answer of a run, with vectors of its own."""
    found = drive(algorithm, operator)
    return Found(result=found.result, vectors=[each.clone() for each in found.vectors])


def by_field(found: Found) -> Mapping[str, list[Tensor]]:
    """The vectors of an answer in each field."""
    vectors = iter(found.vectors)
    return {
        name: [next(vectors) for _ in range(count)]
        for name, count in found.result.vector_counts().items()
    }
