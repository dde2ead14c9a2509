"""The SDK's record of the trace of a function."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvp_operations.operation import Table
from hvp_operations.trace import Level
from hvp_operations.trace_of import Outcome, TraceOfProbe

_OWN = ("levels", "spectrum_low", "spectrum_high")  # of the job alone

_MEANING: dict[str, str] = {
    "CONVERGED": "standard error and quadrature error meet the tolerance",
    "MAX_PRODUCTS": "the budget of products ran out before the tolerance was met",
    "MAX_STEPS": "the steps that a probe may have leave more open than the tolerance: give more "
    "num_steps, more memory, or a larger damping",
    "NOISE_LIMIT": "the tolerance is below what the rounding of products leaves open: use float64, "
    "or a larger damping",
    "UNVERIFIED": "there was no memory for exact products: the interval is of the operator that "
    "was computed with. Use precision full, or more memory",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class TraceOfResult:
    """tr f(A + λI) of an operator A of order n, with a 95 % interval.

    Of 100 runs with other seeds, about 95 or more give an interval that holds the number, of the
    exact operator. Its ends are those of the intervals of two means: of what bounds each probe's
    form from below, and from above. With the outcome `UNVERIFIED` it is the number of the operator
    as it was computed.

    Attributes:
        value: The estimate; NaN where there is no such number.
        standard_error: Standard deviation of `value` over the choice of random vectors, as they
            show it.
        low: Lower end of the 95 % interval; minus infinity where nothing bounds it.
        high: Upper end of the interval.
        quadrature_error: What finitely many steps leave open: half the mean width of the probes'
            bounds.
        rounding: The part of the interval's half-width that is for rounding in the products.
        outcome: `CONVERGED`, `MAX_PRODUCTS`, `MAX_STEPS`, `NOISE_LIMIT`, `UNVERIFIED`; or
            `INDEFINITE`: A + λI has an eigenvalue that the function does not take, as `smallest`
            shows.
        num_probes: Random vectors that the value is made of.
        num_steps: The most Lanczos steps that one of them had.
        smallest: Smallest Ritz value of A, without λ: A has an eigenvalue that is not above it.
        largest: Largest Ritz value of A: A has an eigenvalue that is not below it.
        num_products: Operator products spent.
        num_exact_products: Of them, those with the exact operator, where its own are coarser.
        probes: What each random vector has seen: value, bounds, and the Gauss quadrature of the
            spectral measure of A, without λ.
        levels: Running means over the probes, which a job that extends this one goes on from.
        spectrum_low: Bound below the spectrum of A, which the probes' bounds rest on; infinite
            where they need none.
        spectrum_high: Bound above it.
        loss: L(θ), in nats.
        provenance: Origin of the figures: versions, digests, dtype, seed.
    """

    value: float
    standard_error: float
    low: float
    high: float
    quadrature_error: float
    rounding: float
    outcome: Outcome
    num_probes: int
    num_steps: int
    smallest: float
    largest: float
    num_products: int
    num_exact_products: int
    probes: Sequence[TraceOfProbe]
    loss: float
    provenance: Mapping[str, str]
    levels: Sequence[Level] = ()
    spectrum_low: float = -math.inf
    spectrum_high: float = math.inf

    @property
    def interval(self) -> tuple[float, float]:
        """Both ends of the 95 % interval."""
        return self.low, self.high

    @property
    def converged(self) -> bool:
        """Whether standard error and quadrature error meet the tolerance."""
        return self.outcome == "CONVERGED"

    @property
    def num_parameters(self) -> int:
        """n, the order of the operator."""
        return int(self.provenance["num_parameters"])

    @property
    def claim(self) -> str:
        """A sentence that says how the run ended, and what would help."""
        if math.isnan(self.value):
            unsure = " by the products of the run, which are coarse" * (
                self.outcome == "UNVERIFIED"
            )
            return (
                f"There is no value{unsure}: A has an eigenvalue of {self.smallest:.6g} or less, "
                f"and the function needs a damping above {-self.smallest:.6g}. What the probes "
                "have seen is kept: `estimate` gives other functions of it"
            )
        told = _MEANING.get(self.outcome, "new to this client")
        if not math.isfinite(self.low) or not math.isfinite(self.high):
            told += (
                "; nothing bounds the value on one side, because it was not shown that A + λI is "
                "positive definite, or where the spectrum ends: more num_steps or damping would"
            )
        return told[0].upper() + told[1:]

    def estimate(self, f: Callable[[NDArray[np.float64]], Any]) -> tuple[float, float]:
        """Estimate tr f(A) for another function, from what the probes have seen.

        No products are taken, so that a log determinant at another damping costs nothing. What
        finitely many steps leave open is not known here.

        Args:
            f: The function, of an array of eigenvalues of A; as `lambda t: np.log(t + 1e-2)`.

        Returns:
            The estimate, and its standard error over the probes: infinite for one.

        Raises:
            ValueError: f gives something else than one number for each eigenvalue.
        """
        sums = []
        for probe in self.probes:
            nodes = np.asarray(probe.quadrature.nodes, np.float64)
            values = np.asarray(f(nodes), np.float64)
            if values.shape != nodes.shape:
                raise ValueError(
                    f"f gives {values.shape} for {nodes.shape} eigenvalues; one for each is needed"
                )
            sums.append(self.num_parameters * float(values @ np.asarray(probe.quadrature.weights)))
        count = len(sums)
        error = float(np.std(sums, ddof=1)) / math.sqrt(count) if count > 1 else math.inf
        return float(np.mean(sums)), error

    def table(self) -> Table:
        """The value with its interval, and the parts of what is not known."""
        told = (self.provenance.get(key) for key in ("operator", "dtype", "precision"))
        return Table(
            title=f"{self.num_probes} probes of at most {self.num_steps} steps, "
            f"{self.num_products} products, loss {self.loss:.6g} nats",
            headings=("", ""),
            rows=(
                ("value", f"{self.value:.6g}"),
                ("95 % interval", f"[{self.low:.6g}, {self.high:.6g}]"),
                ("standard error, over the probes", f"{self.standard_error:.2g}"),
                ("open by finitely many steps", f"± {self.quadrature_error:.2g}"),
                ("open by rounding", f"± {self.rounding:.2g}"),
                ("Ritz values of A", f"{self.smallest:.6g} to {self.largest:.6g}"),
            ),
            notes=(
                f"{self.outcome}: {self.claim}.",
                f"{', '.join(each for each in told if each)}",
            ),
        )

    def to_json(self) -> dict[str, Any]:
        """The record as plain numbers, strings, lists and dicts; null where there is no number."""
        plain = {
            name: value if not isinstance(value, float) or math.isfinite(value) else None
            for name, value in vars(self).items()
            if name not in _OWN
        }
        return {
            **plain,
            "probes": [
                {
                    **{name: _finite(getattr(each, name)) for name in ("value", "low", "high")},
                    "nodes": list(each.quadrature.nodes),
                    "weights": list(each.quadrature.weights),
                }
                for each in self.probes
            ],
            "provenance": dict(self.provenance),
        }

    def plot(self, path: str | Path) -> None:
        """Draw the value and its interval against the number of probes, and each probe's own.

        Args:
            path: Path of the picture; its suffix says the format, as `.png` or `.svg`.

        Raises:
            ValueError: The suffix names no format, or there is none; or there is no value.
            ImportError: matplotlib is not installed.
            OSError: The file cannot be written.
        """
        if not Path(path).suffix:
            raise ValueError(f"{str(path)!r} has no suffix to say the format; end it in .png")
        if math.isnan(self.value):
            raise ValueError(f"there is nothing to draw. {self.claim}.")
        from hvp_operations.trace_of.picture import draw

        draw(self, path)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
