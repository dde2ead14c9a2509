"""The method that a diagonal is estimated by, and the memory that it takes."""

from __future__ import annotations

from hvp_operations.diagonal import DiagonalSpec, beside, num_rows
from hvp_operations.trace import TOGETHER

from hvp_core.linop.linear_operator import LinearOperator
from hvp_core.runs.algorithm import Budget
from hvp_core.stochastic.probing import FEWEST, Choice

#: A basis of fewer vectors is not worth its products.
_LEAST_ROWS = 8


def chosen(spec: DiagonalSpec, operator: LinearOperator, budget: Budget) -> Choice:
    """Choose the method, where the spec leaves it open, and its sizes."""
    most = min(TOGETHER, operator.most_together or TOGETHER)
    of_basis = _together(most, budget.num_vectors // 3)
    room = budget.num_vectors - beside(of_basis)
    rows = num_rows(budget.max_products, room, operator.domain.dimension)
    method, reason = _method(spec, operator, budget, rows)
    if method == "xdiag":
        return Choice(method=method, reason=reason, num_rows=rows, num_together=of_basis)
    together = _together(most, budget.num_vectors)
    return Choice(method=method, reason=reason, num_rows=0, num_together=together)


def _together(most: int, num_vectors: int) -> int:
    """The most random vectors of a group that so many vectors suffice for, or one."""
    return max([1, *(each for each in range(1, most + 1) if beside(each) <= num_vectors)])


def _method(
    spec: DiagonalSpec, operator: LinearOperator, budget: Budget, rows: int
) -> tuple[str, str]:
    if operator.domain.dimension <= min(FEWEST, budget.max_products):
        return "exact", "there are so few parameters that each coordinate takes its turn"
    if spec.method != "auto":
        return spec.method, "it was asked for"
    if spec.per is not None:
        return "hutchinson", "its probes give the sums over all parts at once"
    if operator.noise:
        return (
            "hutchinson",
            "products are coarser than the dtype: its mean is corrected by a few exact ones, and "
            "xdiag would need exact ones throughout",
        )
    if rows < _LEAST_ROWS:
        return "hutchinson", "memory or products do not suffice for a basis"
    return (
        "xdiag",
        "there is memory for a basis, which takes large eigenvalues out of the variance, and grows "
        "for as long as that pays",
    )
