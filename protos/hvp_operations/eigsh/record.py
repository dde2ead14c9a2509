"""The SDK's record of a search for eigenpairs: the pairs, and what is certified of them."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from hvp_operations.certificates import Completeness
from hvp_operations.eigsh.overlap import Overlap
from hvp_operations.operation import Table

#: A handle with `inner_products(others)`, at once or to be awaited.
VectorT = TypeVar("VectorT", bound=Any)

_TELLING = 0.2  # a margin of this part of the largest value, or less, tells something


@dataclass(frozen=True, kw_only=True, eq=False)
class EigshResult(Generic[VectorT]):
    """k eigenpairs A y = λ y of an operator.

    Attributes:
        eigenvalues: (k,) float64, the Rayleigh quotients of the verifying products, ascending.
        residuals: (k,) float64, the norms ‖A y − λ y‖ / ‖y‖, each from a fresh product in float64.
        error_bounds: (k,) float64, half the width of `intervals`; infinite where nothing is
            claimed.
        completeness: Whether these are the k wanted ones, and how sure that is.
        eigenvectors: k orthonormal vectors on the server, in the order of `eigenvalues`. They
            belong to the job and stay when their handles go.
        num_products: Operator products spent, those of the residuals included.
        outcome: `CONVERGED`: every pair meets the tolerance and none of the wanted was missed.
            `MULTIPLICITY_UNCERTAIN`: that none was missed could not be shown within the budget.
            `MAX_PRODUCTS`: the budget ran out before every pair met the tolerance.
            `NOISE_LIMIT`: the search converged and float64 does not confirm it; more products of
            this precision would not help. `UNVERIFIED`: there was no memory to verify the pairs in
            float64.
        symmetry_defect: |u·Av − v·Au| / (‖Au‖ ‖v‖) over the run's own vectors; rounding shows
            here first.
        ritz_values: (m,) float64, the Ritz values of the first basis, before any restart.
        ritz_weights: (m,) float64, squared first components of T's eigenvectors: with
            `ritz_values` the picture of the spectral density.
        loss: L(θ), in nats.
        provenance: Origin of the figures: versions, digests, dtype, seed.
    """

    eigenvalues: NDArray[np.float64]
    residuals: NDArray[np.float64]
    error_bounds: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    completeness: Completeness = field(default_factory=Completeness)
    eigenvectors: list[VectorT]
    num_products: int
    outcome: str
    symmetry_defect: float
    ritz_values: NDArray[np.float64]
    ritz_weights: NDArray[np.float64]
    loss: float
    provenance: Mapping[str, str]

    def __post_init__(self) -> None:
        # A result of an older server, or an unverified one, claims nothing.
        if len(self.error_bounds) != len(self.eigenvalues):
            object.__setattr__(self, "error_bounds", np.full(len(self.eigenvalues), np.inf))

    @property
    def intervals(self) -> NDArray[np.float64]:
        """(k, 2) float64, intervals that each hold an eigenvalue of the exact operator.

        They do so whatever precision the search ran in; where nothing is claimed they are
        infinitely wide. Whether any of the wanted was missed is told by `completeness`.
        """
        return np.stack(
            (self.eigenvalues - self.error_bounds, self.eigenvalues + self.error_bounds), axis=1
        )

    def overlap(self, other: EigshResult[Any]) -> Any:
        """How much the spans of these eigenvectors and of another result's have in common.

        The inner products are taken where the vectors are; k · m numbers travel. Vectors of two
        checkpoints, selections of parameters or dtypes do not mix.

        Args:
            other: Another result, such as one of another batch, kind of matrix or precision.

        Returns:
            An `Overlap`: `cosines` and `angles` between the spans, `mean_squared_cosine`, and the
            `inner_products`. Of a result with awaited vectors it has to be awaited.

        Raises:
            InvalidArgumentError: `VECTOR_SPACE_MISMATCH`.
            NotFoundError: A job was deleted, and its eigenvectors with it.
        """
        rows = [vector.inner_products(other.eigenvectors) for vector in self.eigenvectors]
        return _gathered(rows) if inspect.isawaitable(rows[0]) else Overlap.of(rows)

    @property
    def claims(self) -> tuple[str, ...]:
        """Sentences for people that say what is certified and what is not."""
        return (*self._interval_claims(), self._completeness_claim())

    def _interval_claims(self) -> tuple[str, ...]:
        if self.outcome == "UNVERIFIED" or not np.isfinite(self.error_bounds).all():
            return (
                "Nothing is claimed of the exact operator: there was no memory to verify the pairs "
                "in float64. Use more workers or fewer Lanczos vectors.",
            )
        held = "Each interval holds an eigenvalue of the exact operator."
        if self.outcome == "NOISE_LIMIT":
            return (
                held,
                "The products of the search were too coarse for the tolerance, and more of them "
                "would not help: use a wider precision.",
            )
        if self.outcome == "MAX_PRODUCTS":
            return (
                held,
                "The budget of products ran out before every pair met the tolerance: give more.",
            )
        return (held,)

    def _completeness_claim(self) -> str:
        known, count = self.completeness, len(self.residuals)
        size = float(np.abs(self.eigenvalues).max())
        if known.shown and known.margin > _TELLING * size:
            return (
                f"Where the eigenvalues of their places lie is shown only to {known.margin:.1e}, "
                "which is of the size of these values: use a smaller tolerance or a wider "
                "precision."
            )
        if known.shown:
            sure = (
                ""
                if known.failure_probability == 0
                else f", with a probability of at least {1 - known.failure_probability:.4g}"
            )
            return (
                f"None was missed{sure}: counted from its end, "
                f"{f'each of these {count}' if count > 1 else 'this one'} is the eigenvalue of its "
                f"place, to {known.margin:.1e}."
            )
        if self.outcome == "MULTIPLICITY_UNCERTAIN":
            return (
                "That none was missed could not be shown within the budget: repeated eigenvalues "
                "may lack copies. Give more products."
            )
        return "That none of the wanted was missed is not shown."

    def table(self) -> Table:
        """Eigenvalues with their intervals, and what is certified of them."""
        told = (self.provenance.get(key) for key in ("operator", "dtype", "precision"))
        names = [getattr(vector, "name", "") for vector in self.eigenvectors]
        rows = zip(self.eigenvalues, self.error_bounds, self.residuals, strict=True)
        return Table(
            title=f"{self.outcome} after {self.num_products} products, loss {self.loss:.6g} nats",
            headings=("#", "eigenvalue", "± (certified)", "residual ‖Hy - λy‖"),
            rows=tuple(
                (str(index), f"{value:.8g}", f"{bound:.1e}", f"{residual:.2e}")
                for index, (value, bound, residual) in enumerate(rows)
            ),
            notes=(
                *self.claims,
                f"{''.join(f'{each}, ' for each in told if each)}symmetry defect "
                f"{self.symmetry_defect:.1e}",
                f"eigenvectors: {_span(names)}",
            ),
        )

    def to_json(self) -> dict[str, Any]:
        """The record as plain numbers, strings, lists and dicts; eigenvectors by name."""
        return {
            "eigenvalues": self.eigenvalues.tolist(),
            "residuals": self.residuals.tolist(),
            # JSON has no infinity: null is an end that is not known.
            "intervals": [[_finite(end) for end in interval] for interval in self.intervals],
            "completeness": {
                **asdict(self.completeness),
                "margin": _finite(self.completeness.margin),
            },
            "eigenvectors": [getattr(vector, "name", "") for vector in self.eigenvectors],
            "num_products": self.num_products,
            "outcome": self.outcome,
            "symmetry_defect": self.symmetry_defect,
            "ritz_values": self.ritz_values.tolist(),
            "ritz_weights": self.ritz_weights.tolist(),
            "loss": self.loss,
            "provenance": dict(self.provenance),
        }


async def _gathered(rows: Sequence[Awaitable[NDArray[np.float64]]]) -> Overlap:
    return Overlap.of([await row for row in rows])


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _span(names: list[str]) -> str:
    """The first name, and of the last the part that differs; a single name alone."""
    return f"{names[0]} to -{names[-1].rpartition('-')[2]}" if len(names) > 1 else "".join(names)
