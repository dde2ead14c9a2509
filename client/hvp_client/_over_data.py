"""Quadratic forms over batches: how far what some data tell is true of others like them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

import numpy as np
from hvp_operations.operation import Table
from hvp_operations.students_t import student_t
from numpy.typing import NDArray

from hvp_client._exceptions import InvalidArgumentError
from hvp_client._names import name_of


def checked_batches(batches: Sequence[Any]) -> list[str]:
    """Names of the batches that an error over data is taken of.

    Raises:
        InvalidArgumentError: `BATCHES_INVALID`: fewer than two, or one of them twice.
    """
    names = [name_of(each, "batches") for each in batches]
    if len(names) < 2 or len(set(names)) < len(names):
        raise InvalidArgumentError(
            f"an error over data takes two batches or more, each named once, not {len(names)} of "
            f"which {len(set(names))} differ",
            reason="BATCHES_INVALID",
            field="batches",
        )
    return names


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class OverData:
    """v·A v on each of several batches, and the mean over their data with its error.

    The loss of all batches together is the mean of their losses by numbers of targets, and so is
    its curvature: with batches that divide the data of an operator, and v an eigenvector of that
    one, `values` is its eigenvalue. To first order in the data an eigenvalue moves as v·A v does,
    so `standard_errors` is also how far it would move with other data of the same number; to first
    order only, and for eigenvalues that lie apart by more than that.

    The error is over the choice of data alone. That of a product or of a search is apart from it:
    see a result's own intervals.

    Attributes:
        kind: The matrix A, as `hessian`.
        forms: v·A v, (m, k) float64: of m batches and k vectors.
        losses: L(θ) of each batch, (m,), in nats.
        num_targets: Targets of each batch, (m,): their weights.
    """

    kind: str
    forms: NDArray[np.float64]
    losses: NDArray[np.float64]
    num_targets: NDArray[np.int64]

    @cached_property
    def values(self) -> NDArray[np.float64]:
        """The weighted means of the forms, (k,): those of all batches as one."""
        return np.asarray(self._weights @ self.forms)

    @cached_property
    def standard_errors(self) -> NDArray[np.float64]:
        """Standard errors of `values` over the choice of batches, (k,).

        They are those of a ratio of sums, for batches drawn independently of each other; rows that
        are cut from one text are not quite that.
        """
        m = len(self.forms)
        spread = self._weights[:, None] * (self.forms - self.values)
        return np.asarray(np.sqrt(m / (m - 1) * np.square(spread).sum(0)))

    @cached_property
    def intervals(self) -> NDArray[np.float64]:
        """95 % intervals, (k, 2): `values` ± Student's t of m − 1 degrees times the errors.

        They suppose that the forms of batches are about normal, and weights about equal.
        """
        half = student_t(len(self.forms) - 1) * self.standard_errors
        return np.stack((self.values - half, self.values + half), axis=1)

    @property
    def loss(self) -> float:
        """L(θ) of all batches as one, in nats."""
        return float(self._weights @ self.losses)

    def table(self) -> Table:
        """Each vector's figures."""
        least, most = self.forms.min(0), self.forms.max(0)
        return Table(
            title=f"{self.kind} on {len(self.forms)} batches, loss {self.loss:.6g} nats",
            headings=("vector", "v·Av ± standard error", "95 % interval", "least and largest"),
            rows=tuple(
                (
                    str(i),
                    f"{self.values[i]:.6g} ± {self.standard_errors[i]:.2g}",
                    f"[{self.intervals[i, 0]:.6g}, {self.intervals[i, 1]:.6g}]",
                    f"{least[i]:.6g}, {most[i]:.6g}",
                )
                for i in range(len(self.values))
            ),
            notes=("The error is over the choice of data, apart from that of products.",),
        )

    def to_json(self) -> dict[str, Any]:
        """The record as plain numbers, strings, lists and dicts."""
        return {
            "kind": self.kind,
            "forms": self.forms.tolist(),
            "losses": self.losses.tolist(),
            "num_targets": self.num_targets.tolist(),
            "values": self.values.tolist(),
            "standard_errors": self.standard_errors.tolist(),
            "intervals": self.intervals.tolist(),
        }

    @cached_property
    def _weights(self) -> NDArray[np.float64]:
        return self.num_targets / math.fsum(self.num_targets)

    def __repr__(self) -> str:
        size = f"{self.forms.shape[1]} vectors on {len(self.forms)} batches"
        return f"<{type(self).__name__} {self.kind} {size}>"
