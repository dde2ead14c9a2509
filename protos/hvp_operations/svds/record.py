"""The SDK's record of a search for singular values: the triplets, and what is certified of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from hvp_operations.certificates import Completeness
from hvp_operations.operation import Table

VectorT = TypeVar("VectorT")

_TELLING = 0.2  # a margin of this part of the largest value, or less, tells something


@dataclass(frozen=True, kw_only=True, eq=False)
class SvdsResult(Generic[VectorT]):
    """k singular triplets of a Jacobian: J v = σ u and Jᵀ u = σ v.

    Attributes:
        singular_values: (k,) float64, u·Jv of the verifying products, descending.
        residuals: (k,) float64, the norms ‖J v − σ u‖, each from a fresh product in float64.
        transposed_residuals: (k,) float64, the norms ‖Jᵀ u − σ v‖, likewise.
        error_bounds: (k,) float64, the width of `intervals` on either side; infinite where nothing
            is claimed.
        completeness: Whether these are the k largest, and how sure that is; its `num_products` are
            those of both kinds.
        u: k orthonormal vectors on the server, of the space of J's products, in the order of
            `singular_values`. They belong to the job and stay when their handles go.
        v: k orthonormal vectors on the server, of the space of the vectors that J takes.
        num_products: Products spent, with J and with Jᵀ together, those of the residuals included.
        outcome: `CONVERGED`: every triplet meets the tolerance and none of the wanted was missed.
            `MULTIPLICITY_UNCERTAIN`: that none was missed could not be shown within the budget.
            `MAX_PRODUCTS`: the budget ran out before every triplet met the tolerance.
            `NOISE_LIMIT`: the search converged and float64 does not confirm it; more products of
            this precision would not help. `UNVERIFIED`: there was no memory to verify the triplets
            in float64.
        adjoint_defect: |u·Jv − v·Jᵀu| relative to the products' norms, over the run's own vectors;
            rounding shows here first.
        loss: L(θ), in nats, of the checkpoint on the batch.
        provenance: Origin of the figures: versions, digests, dtype, seed.
    """

    singular_values: NDArray[np.float64]
    residuals: NDArray[np.float64]
    transposed_residuals: NDArray[np.float64]
    error_bounds: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    completeness: Completeness = field(default_factory=Completeness)
    u: list[VectorT]
    v: list[VectorT]
    num_products: int
    outcome: str
    adjoint_defect: float
    loss: float
    provenance: Mapping[str, str]

    def __post_init__(self) -> None:
        if len(self.error_bounds) != len(self.singular_values):  # an unverified one claims nothing
            object.__setattr__(self, "error_bounds", np.full(len(self.singular_values), np.inf))

    @property
    def intervals(self) -> NDArray[np.float64]:
        """(k, 2) float64, intervals that each hold a singular value of the exact Jacobian.

        They do so whatever precision the search ran in; where nothing is claimed they have no upper
        end. Whether any of the wanted was missed is told by `completeness`.
        """
        low = np.maximum(self.singular_values - self.error_bounds, 0.0)
        return np.stack((low, self.singular_values + self.error_bounds), axis=1)

    @property
    def claims(self) -> tuple[str, ...]:
        """Sentences for people that say what is certified and what is not."""
        if self.outcome == "UNVERIFIED" or not np.isfinite(self.error_bounds).all():
            held = (
                "Nothing is claimed of the exact Jacobian: there was no memory to verify the "
                "triplets in float64. Use more workers or fewer Lanczos vectors."
            )
        else:
            held = "Each interval holds a singular value of the exact Jacobian."
        more = {
            "NOISE_LIMIT": "The products of the search were too coarse for the tolerance, and more "
            "of them would not help: use a wider precision.",
            "MAX_PRODUCTS": "The budget of products ran out before every triplet met the "
            "tolerance: give more.",
        }
        told = [more[self.outcome]] if self.outcome in more else []
        return (held, *told, self._completeness_claim())

    def _completeness_claim(self) -> str:
        known, count = self.completeness, len(self.residuals)
        if known.shown and known.margin > _TELLING * float(self.singular_values.max()):
            return (
                "Where the singular values of their places lie is shown only to "
                f"{known.margin:.1e}, which is of the size of these values: use a smaller "
                "tolerance or a wider precision."
            )
        if known.shown:
            sure = (
                ""
                if known.failure_probability == 0
                else f", with a probability of at least {1 - known.failure_probability:.4g}"
            )
            these = f"each of these {count}" if count > 1 else "this one"
            return (
                f"None was missed{sure}: counted from the largest, {these} is the singular value "
                f"of its place, to {known.margin:.1e}."
            )
        if self.outcome == "MULTIPLICITY_UNCERTAIN":
            return (
                "That none was missed could not be shown within the budget: repeated singular "
                "values may lack copies. Give more products."
            )
        return "That none of the wanted was missed is not shown."

    def table(self) -> Table:
        """Singular values with their bounds, and what is certified of them."""
        known = self.provenance
        told = "".join(f"{known[key]}, " for key in ("dtype", "precision") if known.get(key))
        of = f"of the {known.get('output', 'outputs')} by the {known.get('input', 'parameters')}"
        rows = zip(
            self.singular_values,
            self.error_bounds,
            self.residuals,
            self.transposed_residuals,
            strict=True,
        )
        return Table(
            title=f"{self.outcome} after {self.num_products} products",
            headings=("#", "singular value s", "± (certified)", "‖Jv - su‖", "‖Jᵀu - sv‖"),
            rows=tuple(
                (str(index), f"{value:.8g}", f"{bound:.1e}", f"{here:.2e}", f"{there:.2e}")
                for index, (value, bound, here, there) in enumerate(rows)
            ),
            notes=(
                *self.claims,
                f"J {of}, {told}adjoint defect {self.adjoint_defect:.1e}",
                f"u: {_span(self.u)}",
                f"v: {_span(self.v)}",
            ),
        )

    def to_json(self) -> dict[str, Any]:
        """The record as plain numbers, strings, lists and dicts; vectors by name."""
        return {
            "singular_values": self.singular_values.tolist(),
            "residuals": self.residuals.tolist(),
            "transposed_residuals": self.transposed_residuals.tolist(),
            # JSON has no infinity: null is an end that is not known.
            "intervals": [[_finite(end) for end in interval] for interval in self.intervals],
            "completeness": {
                **asdict(self.completeness),
                "margin": _finite(self.completeness.margin),
            },
            "u": [getattr(vector, "name", "") for vector in self.u],
            "v": [getattr(vector, "name", "") for vector in self.v],
            "num_products": self.num_products,
            "outcome": self.outcome,
            "adjoint_defect": self.adjoint_defect,
            "loss": self.loss,
            "provenance": dict(self.provenance),
        }


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _span(vectors: list[Any]) -> str:
    """The first name, and of the last the part that differs; a single name alone."""
    names = [getattr(vector, "name", "") for vector in vectors]
    return f"{names[0]} to -{names[-1].rpartition('-')[2]}" if len(names) > 1 else "".join(names)
