"""The method that a trace is estimated by, and the memory that it takes."""

from __future__ import annotations

from typing import Literal

from hvp_operations.trace import TOGETHER, TraceSpec, num_rows

from hvp_core.errors import CurvatureError
from hvp_core.linop.linear_operator import LinearOperator
from hvp_core.runs.algorithm import Budget
from hvp_core.stochastic.probing import FEWEST, Choice

#: A basis of fewer vectors is not worth its products.
_LEAST_ROWS = 8

Method = Literal["hutchinson", "hutch++", "xtrace", "xnystrace", "exact"]


def chosen(spec: TraceSpec, operator: LinearOperator, budget: Budget) -> Choice:
    """Choose the method, where the spec leaves it open, and its sizes.

    Raises:
        CurvatureError: METHOD_UNSUPPORTED: `xnystrace` of an operator that may have negative
            eigenvalues.
    """
    if spec.method == "xnystrace" and not operator.semidefinite:
        raise CurvatureError(
            "METHOD_UNSUPPORTED",
            "xnystrace needs an operator that has no negative eigenvalue; use xtrace",
        )
    dimension, together = operator.domain.dimension, operator.most_together or TOGETHER
    # With a basis, each vector of a group has a product, and one vector is to work in.
    of_basis = min(TOGETHER, together, max(1, (budget.num_vectors - 3) // 4))
    room = min(budget.num_vectors - 2 * of_basis - 1, dimension)
    method, reason = _method(spec, operator, budget, room)
    rows = min(num_rows(method, budget.max_products), room)
    alone = min(TOGETHER, together, max(1, budget.num_vectors // 2))
    return Choice(
        method=method, reason=reason, num_rows=rows, num_together=of_basis if rows else alone
    )


def _method(
    spec: TraceSpec, operator: LinearOperator, budget: Budget, room: int
) -> tuple[Method, str]:
    dimension = operator.domain.dimension
    if dimension <= min(FEWEST, budget.max_products):
        return "exact", "there are so few parameters that each coordinate takes its turn"
    if spec.method != "auto":
        return spec.method, "it was asked for"
    if spec.per is not None:
        return "hutchinson", "its probes give the traces of all blocks at once"
    if operator.noise:
        return (
            "hutchinson",
            "products are coarser than the dtype: its mean is corrected by a few exact ones, and "
            "other methods would need exact ones throughout",
        )
    if min(room, budget.max_products // 2) < _LEAST_ROWS:
        return "hutchinson", "memory or products do not suffice for a basis"
    if operator.semidefinite:
        return (
            "xnystrace",
            "no eigenvalue is negative: each product gives a vector of the basis and a sample",
        )
    return "xtrace", "the largest eigenvalues go into a basis, and do not add to the variance"
