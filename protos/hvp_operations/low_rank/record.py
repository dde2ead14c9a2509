"""The SDK's record of a low-rank approximation: a matrix to compute with, and its error."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from hvp_operations.low_rank.file import RowsFile
from hvp_operations.operation import Spectral, Table

VectorT = TypeVar("VectorT")

_TOLD = {
    "MAX_PRODUCTS": "The budget of products ran out before the eigenpairs had converged or were "
    "shown to be all: give more. The bound on the error holds all the same.",
    "NOISE_LIMIT": "The products were too coarse for the tolerance. The bound on the error holds "
    "all the same.",
    "UNVERIFIED": "Nothing is claimed of the exact operator: there was no memory for a product in "
    "float64. Use more workers.",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class LowRankResult(Spectral, Generic[VectorT]):
    """A symmetric matrix A_k = U diag(eigenvalues) Uᵀ of rank k near an operator A, on the ranks.

    `L @ v`, `L.solve(b, λ)` and `L.save(path)` are coroutines where the vectors are awaited ones.
    Vectors stay on the ranks; `H.solve(b, preconditioner=L)` takes it for a preconditioner.

    Attributes:
        eigenvalues: (k,) float64, ascending; of `nystrom` 0 or more.
        eigenvectors: U: k orthonormal vectors on the server, in the order of `eigenvalues`. They
            belong to the job and stay when their handles go.
        outcome: `CONVERGED`, or for `eigsh`: `MAX_PRODUCTS` or `NOISE_LIMIT` where the pairs do not
            meet the tolerance; `UNVERIFIED`: there was no memory for exact products.
        method: The method that was taken.
        reason: Why this method was taken.
        error: ‖A − A_k‖₂ is at least this.
        error_bound: It is at most this, but with `failure_probability`.
        failure_probability: Probability that the bound is wrong, over a random vector that A_k does
            not depend on.
        is_exact: Whether error and bound are those of the exact operator; else of the one that was
            computed with.
        orthogonality: ‖UᵀU − I‖₂.
        shift: Of `nystrom`: what was added to the diagonal while computing, and taken off again.
        num_products: Operator products spent in all.
        num_check_products: Of them, those that bound the error.
        num_exact_products: Of them, those of the exact operator, where the others are coarser.
        loss: L(θ), in nats.
        provenance: Origin of the figures: versions, digests, dtype, seed.
    """

    eigenvalues: NDArray[np.float64]
    eigenvectors: list[VectorT]
    outcome: str
    method: str
    reason: str
    error: float
    error_bound: float
    failure_probability: float
    is_exact: bool
    orthogonality: float
    shift: float
    num_products: int
    num_check_products: int
    num_exact_products: int
    loss: float
    provenance: Mapping[str, str]

    @property
    def spectral(self) -> tuple[Sequence[VectorT], Sequence[float]]:
        """See Spectral."""
        return self.eigenvectors, self.eigenvalues.tolist()

    @property
    def _first(self) -> Any:
        return self.eigenvectors[0]

    @property
    def shape(self) -> tuple[int, int]:
        """`(n, n)`."""
        n = self._first.shape[0]
        return n, n

    def __matmul__(self, v: VectorT) -> Any:
        """A_k v, as a new vector; two calls, in which k + 1 numbers travel."""
        return _on_server(v).along(self.eigenvectors, self.eigenvalues)

    def solve(self, b: VectorT, damping: float) -> Any:
        """(A_k + λI)⁻¹ b, without a product: the inverse is known on U and outside of it.

        Args:
            b: A vector on the server, of the operator's space.
            damping: λ > 0, with λ + each eigenvalue not 0.

        Returns:
            A new vector; two calls, in which k + 1 numbers travel.

        Raises:
            ValueError: λ is not above 0, or A_k + λI is singular.
        """
        damped = self._damped(damping)
        if not damped.all():
            raise ValueError(f"A_k + {damping:g} I is singular; take another damping")
        return _on_server(b).along(self.eigenvectors, 1 / damped - 1 / damping, 1 / damping)

    def trace(self) -> float:
        """Tr A_k, the sum of the eigenvalues."""
        return math.fsum(self.eigenvalues)

    def logdet(self, damping: float) -> float:
        """Log det (A_k + λI) of order n: Σ log(eigenvalue + λ) + (n − k) log λ.

        Args:
            damping: λ > 0, above the magnitude of each negative eigenvalue.

        Raises:
            ValueError: A_k + λI is not positive definite.
        """
        damped = self._damped(damping)
        if damped.min() <= 0:
            raise ValueError(
                f"A_k + {damping:g} I is not positive definite: the least eigenvalue of A_k is "
                f"{self.eigenvalues.min():.6g}; take a damping above its magnitude"
            )
        return math.fsum(np.log(damped)) + (self.shape[0] - len(damped)) * math.log(damping)

    def condition_bound(self, damping: float) -> float:
        """Bound on the condition number of A + λI with A_k as its preconditioner.

        The steps of CG go by its root. With E = A − A_k it is (λ_k + λ + ‖E‖) / λ for `nystrom`,
        where E ≥ 0 (Frangella, Tropp and Udell 2023), and (λ_k + λ + ‖E‖) / (λ − ‖E‖) for `eigsh`;
        λ_k is the least eigenvalue.

        Args:
            damping: λ > 0.

        Returns:
            The bound, which is as sure as `error_bound`; infinite where there is none.

        Raises:
            ValueError: λ is not above 0, or A_k has a negative eigenvalue.
        """
        self._damped(damping)
        below = damping - (0.0 if self.method == "nystrom" else self.error_bound)
        if below <= 0 or not math.isfinite(self.error_bound):
            return math.inf
        return (self._least + damping + self.error_bound) / below

    def suggest_damping(self, condition: float = 10.0) -> float:
        """The least λ for which `condition_bound(λ)` is at most `condition`.

        With it, preconditioned CG takes few steps: at most √condition/2 · log(2/ε) for a relative
        error of ε in the norm of the matrix.

        Args:
            condition: A condition number above 1.

        Raises:
            ValueError: `condition` is 1 or less, or A_k has a negative eigenvalue.
        """
        if not condition > 1:
            raise ValueError(f"condition is {condition:g}; above 1 is possible")
        missing = 1.0 if self.method == "nystrom" else 1.0 + condition
        return (self._least + missing * self.error_bound) / (condition - 1)

    @property
    def _least(self) -> float:
        least = float(self.eigenvalues.min())
        if least < 0:
            raise ValueError(
                f"A_k has the eigenvalue {least:.6g}: a matrix with negative eigenvalues is no "
                "preconditioner; take that of a GGN"
            )
        return least

    def _damped(self, damping: float) -> NDArray[np.float64]:
        if not damping > 0:
            raise ValueError(f"damping is {damping:g}; above 0 is possible: A_k alone is singular")
        return self.eigenvalues + damping

    def save(self, path: str | Path) -> Any:
        """Fetch the vectors and write the matrix to a safetensors file; `H.load_low_rank` reads it.

        Args:
            path: The file: `eigenvectors` (k, n) in the vectors' dtype, `eigenvalues` (k,) float64,
                and the other figures as its metadata.
        """
        figures = self.to_json()
        del figures["eigenvalues"], figures["eigenvectors"]
        file = RowsFile(
            Path(path),
            shape=(len(self.eigenvectors), self.shape[0]),
            dtype=self._first.dtype,
            eigenvalues=self.eigenvalues,
            metadata={"low_rank": json.dumps(figures)},
        )
        vectors: list[Any] = list(self.eigenvectors)
        if inspect.iscoroutinefunction(type(self._first).numpy):
            return _awaited(file, vectors)
        with file:
            for each in vectors:
                file.append(each.numpy())
        return None

    @property
    def claims(self) -> tuple[str, ...]:
        """Sentences for people that say what is certified and what is not."""
        told = [_TOLD[self.outcome]] if self.outcome in _TOLD else []
        sure = (
            ""
            if not self.failure_probability
            else f", with a probability of at least {1 - self.failure_probability:g}"
        )
        of = "the exact operator" if self.is_exact else "the operator that was computed with"
        told.append(
            f"Of {of}, the norm of the error A - A_k lies between {self.error:.4g} and "
            f"{self.error_bound:.4g}{sure}."
        )
        return tuple(told)

    def table(self) -> Table:
        """The eigenvalues, the largest magnitudes first, and what is certified of the error."""
        told = (self.provenance.get(key) for key in ("operator", "dtype", "precision"))
        order = np.argsort(-np.abs(self.eigenvalues), kind="stable")
        largest = float(np.abs(self.eigenvalues).max())
        names = [getattr(vector, "name", "") for vector in self.eigenvectors]
        notes = [
            *self.claims,
            f"{self.method}: {self.reason}",
            f"{self.num_check_products} of the products bound the error",
        ]
        if self.eigenvalues.min() >= 0 and math.isfinite(self.error_bound):
            damping = self.suggest_damping()
            notes.append(f"as a preconditioner: condition at most 10 with damping={damping:.3g}")
        return Table(
            title=f"{self.outcome} after {self.num_products} products",
            headings=("#", "eigenvalue", "of the largest"),
            rows=tuple(
                (
                    str(index),
                    f"{self.eigenvalues[index]:.8g}",
                    f"{self.eigenvalues[index] / largest:.2g}" if largest else "",
                )
                for index in order
            ),
            notes=(
                *notes,
                f"{''.join(f'{each}, ' for each in told if each)}loss {self.loss:.6g} nats",
                f"vectors orthonormal to {self.orthogonality:.1e}",
                f"vectors: {names[0]} to -{names[-1].rpartition('-')[2]}",
            ),
        )

    def to_json(self) -> dict[str, Any]:
        """The record as plain numbers, strings, lists and dicts; vectors by name."""
        return {
            "eigenvalues": self.eigenvalues.tolist(),
            "eigenvectors": [getattr(vector, "name", "") for vector in self.eigenvectors],
            "outcome": self.outcome,
            "method": self.method,
            "reason": self.reason,
            "error": self.error,
            # JSON has no infinity: null is a bound that is not known.
            "error_bound": self.error_bound if math.isfinite(self.error_bound) else None,
            "failure_probability": self.failure_probability,
            "is_exact": self.is_exact,
            "orthogonality": self.orthogonality,
            "shift": self.shift,
            "num_products": self.num_products,
            "num_check_products": self.num_check_products,
            "num_exact_products": self.num_exact_products,
            "loss": self.loss,
            "provenance": dict(self.provenance),
        }


def read_saved(path: str | Path) -> tuple[dict[str, Any], Any]:
    """Read what `LowRankResult.save` has written.

    Args:
        path: The file.

    Returns:
        The record's fields but `eigenvectors`, and a slice of that name's tensor (k, n), whose rows
        are read from the file when they are asked for.

    Raises:
        ValueError: The file holds something else.
    """
    from safetensors import SafetensorError, safe_open

    try:
        file: Any = safe_open(str(path), framework="numpy")
        figures = json.loads(file.metadata()["low_rank"])
        values, rows = file.get_tensor("eigenvalues"), file.get_slice("eigenvectors")
    except (SafetensorError, TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{path} holds no low-rank matrix that `save` has written") from error
    if figures["error_bound"] is None:
        figures["error_bound"] = math.inf
    return {**figures, "eigenvalues": values}, rows


async def _awaited(file: RowsFile, vectors: Sequence[Any]) -> None:
    with file:
        for each in vectors:
            file.append(await each.numpy())


def _on_server(value: Any) -> Any:
    if not hasattr(value, "along"):
        raise TypeError(
            f"a low-rank matrix takes vectors on the server, not {type(value).__name__}; "
            "H.vector(array) makes one of numbers"
        )
    return value
