"""The SDK's record of a diagonal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from hvp_operations.operation import Table
from hvp_operations.trace import Outcome, TracePart
from hvp_operations.trace.record import MEANING, estimate_of, interval_of, part_of
from hvp_operations.wording import name_of_matrix

VectorT = TypeVar("VectorT")


@dataclass(frozen=True, kw_only=True, eq=False)
class DiagonalResult(Generic[VectorT]):
    """Diagonal of an operator, with a standard error of each element.

    The standard errors are those of the diagonal of the exact operator; with the outcome
    `UNVERIFIED` of the operator as it was computed, rounding and all. About 95 of 100 elements lie
    within `interval_factor` standard errors of their estimates, and the rounding on top.

    Attributes:
        diagonal: The estimate, a vector on the server; it belongs to the job, as the next one does.
        standard_error: Standard deviation of each element of the estimate over the choice of random
            vectors, as they show it; 0 where the diagonal was computed without them.
        norm: Norm of the diagonal: the root of what the estimate's square is beyond the standard
            error's.
        relative_standard_error: Norm of the standard error over `norm`; infinite where the estimate
            is no more than its error.
        interval_factor: Student's t for 95 %; 0 where the diagonal was computed without random
            vectors.
        rounding: Norm of what the rounding of products may have added to the estimate.
        outcome: `CONVERGED`, `MAX_PRODUCTS`, `NOISE_LIMIT` or `UNVERIFIED`.
        method: The method that was taken; `exact` if all coordinates took their turn.
        reason: Why this method was taken.
        num_probes: Random vectors that the estimate is made of.
        num_products: Operator products spent.
        num_exact_products: Of them, those with the exact operator, where the others are coarser.
        parts: Sums over the parts of the diagonal, in canonical order, each with a 95 % interval.
        num_samples: Samples of random signs of which the estimate is the plain mean, with which an
            extension goes on; 0 where it is made otherwise.
        num_corrections: Random vectors whose products were taken of both operators, in this run and
            those before it.
        loss: L(θ), in nats.
        provenance: Origin of the figures: versions, digests, dtype, seed.
    """

    diagonal: VectorT
    standard_error: VectorT
    norm: float
    relative_standard_error: float
    interval_factor: float
    rounding: float
    outcome: Outcome
    method: str
    reason: str
    num_probes: int
    num_products: int
    num_exact_products: int
    parts: Sequence[TracePart]
    loss: float
    provenance: Mapping[str, str]
    num_samples: int = 0
    num_corrections: int = 0

    @property
    def converged(self) -> bool:
        """Whether the estimate converged: its standard error meets the tolerance."""
        return self.outcome == "CONVERGED"

    def part(self, name: str) -> TracePart:
        """The sum over the part of a tensor or a layer.

        Raises:
            KeyError: There is no part of this name.
        """
        return part_of(self.parts, name)

    def table(self) -> Table:
        """The sums and means over the parts of the diagonal, or else what is known of its norm."""
        told = (self.provenance.get(key) for key in ("operator", "dtype", "precision"))
        headings, rows = self._parts() if self.parts else self._whole()
        return Table(
            title=f"{self.method}, {self.num_products} products, loss {self.loss:.6g} nats",
            headings=headings,
            rows=rows,
            notes=(
                f"{self.outcome}: {MEANING.get(self.outcome, 'new to this client')}.",
                f"{''.join(f'{each}, ' for each in told if each)}{self.reason}",
                *(f"{field}: {name}" for field, name in self._names().items()),
            ),
        )

    def _parts(self) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
        return ("part of the diagonal", "elements", "mean", "sum ± error", "95 % interval"), tuple(
            (
                part.name,
                str(part.num_parameters),
                f"{part.value / part.num_parameters:.4g}",
                estimate_of(part),
                interval_of(part),
            )
            for part in self.parts
        )

    def _whole(self) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
        return ("norm of the diagonal", "relative standard error", "95 % of elements within"), (
            (
                f"{self.norm:.6g}",
                f"{self.relative_standard_error:.2g}",
                f"{self.interval_factor:.3g} standard errors",
            ),
        )

    def _names(self) -> dict[str, str]:
        return {
            field: getattr(getattr(self, field), "name", "")
            for field in ("diagonal", "standard_error")
        }

    def plot(self, path: str | Path) -> None:
        """Draw the sums and means over the parts, of a job that was asked for them.

        Args:
            path: Path of the picture; its suffix says the format, as `.png` or `.svg`.

        Raises:
            ValueError: The job gave no sums over parts; or the suffix names no format.
            ImportError: matplotlib is not installed.
            OSError: The file cannot be written.
        """
        if not self.parts:
            raise ValueError("there are no sums over parts to draw; ask with per='layer'")
        from hvp_operations.parts_picture import draw_parts

        kind = self.provenance.get("operator", "operator")
        draw_parts(self.parts, f"Diagonal of {name_of_matrix(kind)}, by parts", path)

    def to_json(self) -> dict[str, Any]:
        """The record as plain numbers, strings, lists and dicts; vectors by name."""
        return {
            **vars(self),
            **self._names(),
            "relative_standard_error": _finite(self.relative_standard_error),
            "parts": [asdict(part) for part in self.parts],
            "provenance": dict(self.provenance),
        }


def _finite(number: float) -> float | None:
    """The number as JSON has it, which has no infinity."""
    return number if math.isfinite(number) else None
