"""The SDK's record of a trace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hvp_operations.operation import Table
from hvp_operations.trace import Level, Outcome, TracePart
from hvp_operations.wording import name_of_matrix

_OWN = ("provenance", "levels", "size")  # of the job alone
#: What each outcome of an estimate says.
MEANING: Mapping[str, str] = {
    "CONVERGED": "the standard error meets the tolerance",
    "MAX_PRODUCTS": "the budget of products ran out before the tolerance was met",
    "NOISE_LIMIT": "the tolerance is below the rounding of the products: use a wider dtype",
    "UNVERIFIED": "coarse products were not compared with exact ones: the estimate is of the "
    "operator that was computed with. Use precision full, or more memory or products",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class TraceResult:
    """Trace of an operator, with a 95 % interval.

    Of 100 runs with other seeds, about 95 give an interval that holds the trace of the exact
    operator: `value` ± Student's t times the standard error, and `rounding` on top. With the
    outcome `UNVERIFIED` it is the trace of the operator as it was computed, rounding and all.

    Attributes:
        value: The estimate.
        standard_error: Standard deviation of `value` over the choice of random vectors, as they
            show it; 0 where the trace was computed without them.
        low: Lower end of the 95 % interval.
        high: Upper end of the interval.
        rounding: The part of the interval's half-width that is for rounding in the products.
        outcome: `CONVERGED`, `MAX_PRODUCTS`, `NOISE_LIMIT` or `UNVERIFIED`.
        method: The method that was taken; `exact` if all coordinates took their turn.
        reason: Why this method was taken.
        num_probes: Random vectors that the value is made of.
        num_products: Operator products spent.
        num_exact_products: Of them, those with the exact operator, where the others are coarser.
        parts: Traces of the diagonal blocks, in canonical order; their values add up to the whole.
        levels: Running means of `hutchinson`, which a job that extends this one goes on from.
        size: Sum of the sizes by which the rounding of their samples goes.
        loss: L(θ), in nats.
        provenance: Origin of the figures: versions, digests, dtype, seed.
    """

    value: float
    standard_error: float
    low: float
    high: float
    rounding: float
    outcome: Outcome
    method: str
    reason: str
    num_probes: int
    num_products: int
    num_exact_products: int
    parts: Sequence[TracePart]
    levels: Sequence[Level] = ()
    size: float = 0.0
    loss: float
    provenance: Mapping[str, str]

    @property
    def interval(self) -> tuple[float, float]:
        """Both ends of the 95 % interval."""
        return self.low, self.high

    @property
    def converged(self) -> bool:
        """Whether the estimate converged: its standard error meets the tolerance."""
        return self.outcome == "CONVERGED"

    def part(self, name: str) -> TracePart:
        """The diagonal block of a tensor or a layer.

        Raises:
            KeyError: There is no block of this name.
        """
        return part_of(self.parts, name)

    def table(self) -> Table:
        """The whole, and its parts."""
        whole = ("whole", estimate_of(self), interval_of(self))
        rows = [(part.name, estimate_of(part), interval_of(part)) for part in self.parts]
        told = (self.provenance.get(key) for key in ("operator", "dtype", "precision"))
        return Table(
            title=f"{self.method}, {self.num_products} products, loss {self.loss:.6g} nats",
            headings=("trace", "estimate ± standard error", "95 % interval"),
            rows=(whole, *rows),
            notes=(
                f"{self.outcome}: {MEANING.get(self.outcome, 'new to this client')}.",
                f"{''.join(f'{each}, ' for each in told if each)}{self.reason}",
            ),
        )

    def plot(self, path: str | Path) -> None:
        """Draw the traces of the blocks and their mean eigenvalues; of no blocks, of the whole.

        Args:
            path: Path of the picture; its suffix says the format, as `.png` or `.svg`.

        Raises:
            ValueError: The suffix names no format, or there is no suffix.
            ImportError: matplotlib is not installed.
            OSError: The file cannot be written.
        """
        from hvp_operations.parts_picture import draw_parts

        n = int(self.provenance["num_parameters"])
        whole = TracePart(
            name="whole",
            num_parameters=n,
            value=self.value,
            standard_error=self.standard_error,
            low=self.low,
            high=self.high,
        )
        kind = self.provenance.get("operator", "operator")
        draw_parts(
            self.parts or [whole], f"Trace of {name_of_matrix(kind)}, {n:,} parameters", path
        )

    def to_json(self) -> dict[str, Any]:
        """The record as plain numbers, strings, lists and dicts."""
        return {
            **{name: value for name, value in vars(self).items() if name not in _OWN},
            "parts": [asdict(part) for part in self.parts],
            "provenance": dict(self.provenance),
        }


def part_of(parts: Sequence[TracePart], name: str) -> TracePart:
    """The diagonal block of a name.

    Raises:
        KeyError: There is no block of this name.
    """
    for each in parts:
        if each.name == name:
            return each
    raise KeyError(name)


def estimate_of(each: TraceResult | TracePart) -> str:
    """A trace with its standard error, for people."""
    return f"{each.value:.6g} ± {each.standard_error:.2g}"


def interval_of(each: TraceResult | TracePart) -> str:
    """The 95 % interval of a trace, for people."""
    return f"[{each.low:.6g}, {each.high:.6g}]"
