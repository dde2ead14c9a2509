"""The findings of a run of the demo: one frozen record, and its plain forms, JSON and a table."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Where the Lanczos run stood after a product."""

    num_products: int
    ritz_values: tuple[float, ...]  # at the wanted ends, ascending
    residual_estimates: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Findings:
    """Everything the report tells; times in seconds, losses in nats per token."""

    model: str
    num_parameters: int
    num_sequences: int
    sequence_length: int
    num_ranks: int
    dtype: str

    loss: float
    gradient_norm: float
    probe_seed: int
    probe_norm: float
    product_norm: float  # ||Hv||
    product_s: float
    u_dot_hv: float
    v_dot_hu: float

    eigenvalues: tuple[float, ...]  # ascending
    residuals: tuple[float, ...]  # ||H y - lambda y||, from fresh products in float64
    intervals: tuple[tuple[float, float], ...]  # each holds an eigenvalue of H
    claims: tuple[str, ...]  # what is certified, as sentences
    num_products: int
    num_completeness_products: int  # of these, spent on showing that none was missed
    outcome: str
    symmetry_defect: float  # of the Lanczos run
    ritz_values: tuple[float, ...]
    ritz_weights: tuple[float, ...]
    history: tuple[Snapshot, ...]

    stage_s: Mapping[str, float] = field(default_factory=dict)  # in the order they ran
    provenance: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check that the parallel tuples are parallel.

        Raises:
            ValueError: Two of them have different lengths.
        """
        lengths = {len(self.eigenvalues), len(self.residuals), len(self.intervals)}
        if len(lengths) > 1 or not self.eigenvalues:
            raise ValueError("each eigenvalue needs its residual and its interval; one is needed")
        if len(self.ritz_values) != len(self.ritz_weights):
            raise ValueError("each Ritz value needs its weight")

    @property
    def num_tokens(self) -> int:
        """Tokens in the batch."""
        return self.num_sequences * self.sequence_length

    @property
    def symmetry_gap(self) -> float:
        """|u·Hv − v·Hu| / ‖Hv‖‖u‖ for two independent probes; zero but for rounding.

        The two probes have equal norms (both are Rademacher), so one norm serves for both.
        """
        scale = self.product_norm * self.probe_norm
        return abs(self.u_dot_hv - self.v_dot_hu) / scale if scale else 0.0

    @property
    def largest(self) -> float:
        """The largest eigenvalue found."""
        return self.eigenvalues[-1]

    @property
    def smallest(self) -> float:
        """The smallest eigenvalue found."""
        return self.eigenvalues[0]

    @property
    def rows(self) -> list[Row]:
        """The eigenvalues, largest first."""
        size = max(abs(value) for value in self.eigenvalues) or 1.0
        known = zip(self.eigenvalues, self.residuals, self.intervals, strict=True)
        rows = [
            Row(
                index=index,
                eigenvalue=value,
                residual=residual,
                relative_residual=residual / size,
                interval=interval,
            )
            for index, (value, residual, interval) in enumerate(known)
        ]
        return rows[::-1]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One eigenvalue with what is known of its error."""

    index: int  # place in the ascending order
    eigenvalue: float
    residual: float
    relative_residual: float  # residual over the largest magnitude found
    interval: tuple[float, float]  # holds an eigenvalue of H


def to_json(findings: Findings) -> str:
    """The record as JSON."""
    fields = dataclasses.asdict(findings)
    # JSON has no infinity: null is an end that is not known.
    fields["intervals"] = [
        [end if math.isfinite(end) else None for end in interval] for interval in findings.intervals
    ]
    fields["symmetry_gap"] = findings.symmetry_gap
    return json.dumps(fields, indent=2, allow_nan=False) + "\n"


def to_table(findings: Findings) -> str:
    """The eigenvalues as an aligned text table, largest first."""
    header = ("", "eigenvalue", "residual", "relative", "an eigenvalue lies in")
    body = [
        (
            f"{row.index + 1}",
            f"{row.eigenvalue:+.6f}",
            f"{row.residual:.2e}",
            f"{row.relative_residual:.1e}",
            f"[{row.interval[0]:+.6f}, {row.interval[1]:+.6f}]",
        )
        for row in findings.rows
    ]
    title = (
        f"Hessian of the mean loss of {findings.model} "
        f"({findings.num_parameters:,} parameters) on {findings.num_tokens} tokens\n"
        f"loss {findings.loss:.6f} nats/token, gradient norm {findings.gradient_norm:.6f}, "
        f"{findings.num_products} products, {findings.outcome}\n"
    )
    return title + "\n" + _align([header, *body]) + "\n" + "\n".join(findings.claims) + "\n"


def _align(table: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
    lines = (
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    )
    return "\n".join(lines) + "\n"
