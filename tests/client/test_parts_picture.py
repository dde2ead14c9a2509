"""The picture of sums over parts."""

from __future__ import annotations

from pathlib import Path

import pytest
from hvp_operations.parts_picture import draw_parts
from hvp_operations.trace import TracePart
from hvp_operations.trace.record import TraceResult


def part(name: str, value: float, error: float = 0.1) -> TracePart:
    return TracePart(
        name=name,
        num_parameters=10,
        value=value,
        standard_error=error,
        low=value - 2 * error,
        high=value + 2 * error,
    )


@pytest.mark.parametrize(
    "values", [[1.0], [3.0, 2.0, 900.0], [-3.0, 0.05, 2.0], [0.0, 0.0]], ids=str
)
@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_sums_of_either_sign_can_be_drawn(values: list[float], suffix: str, tmp_path: Path) -> None:
    parts = [part(f"layer {index}", value) for index, value in enumerate(values)]
    draw_parts(parts, "Trace of a matrix", tmp_path / f"parts{suffix}")
    assert (tmp_path / f"parts{suffix}").stat().st_size > 5000


def test_of_many_parts_the_largest_are_drawn_and_the_picture_says_so(tmp_path: Path) -> None:
    parts = [part(f"p{index}", (-1) ** index * float(index)) for index in range(500)]
    draw_parts(parts, "Trace", tmp_path / "parts.svg")
    drawn = (tmp_path / "parts.svg").read_text()
    assert "the 60 largest of 500 parts" in drawn
    assert "<!-- p499 -->" in drawn
    assert "<!-- p400 -->" not in drawn
    with pytest.raises(ValueError, match="suffix"):
        draw_parts(parts, "Trace", tmp_path / "parts")


def test_a_trace_of_no_blocks_is_drawn_whole(tmp_path: Path) -> None:
    result = TraceResult(
        value=3.0,
        standard_error=0.1,
        low=2.8,
        high=3.2,
        rounding=0.0,
        outcome="CONVERGED",
        method="hutch++",
        reason="",
        num_probes=9,
        num_products=9,
        num_exact_products=0,
        parts=(),
        loss=0.0,
        provenance={"operator": "ggn", "num_parameters": "12"},
    )
    result.plot(tmp_path / "whole.svg")
    assert "<!-- whole -->" in (tmp_path / "whole.svg").read_text()
