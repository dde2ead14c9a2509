"""A result as a picture: time over the gradient's, and memory beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.record import display_name, headline


def _colour(row: dict[str, Any]) -> str:
    if row["product"] == "gradient" and row["library"] == "torch":
        return "#8a8f98"
    return "#1f6feb" if row["library"] == "hvp" else "#e08b3e"


def _base(result: dict[str, Any]) -> tuple[str, str]:
    """The gradient that times are shown over, and its name."""
    measured = {row["key"] for row in result["rows"] if row["status"] == "measured"}
    if "gradient-compiled" in measured:
        return "gradient-compiled", "compiled gradients"
    return "gradient-eager", "eager gradients"


def draw(result: dict[str, Any], path: Path) -> None:
    """Horizontal bars, in the order of the table."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    base, unit = _base(result)
    rows = [row for row in result["rows"] if row["status"] in ("measured", "failed")][::-1]
    style = {
        "font.family": "sans-serif",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with pyplot.rc_context(style):
        figure, (time, memory) = pyplot.subplots(
            1, 2, sharey=True, figsize=(10, 1.6 + 0.3 * max(4, len(rows))), width_ratios=[3, 2]
        )
        places = range(len(rows))
        for axis, values, form, label in (
            (time, [row["ratios"].get(base) for row in rows], "{:.2f}", f"time, in {unit}"),
            (memory, [_gigabytes(row) for row in rows], "{:.1f}", "memory above the weights, GB"),
        ):
            top = max([value for value in values if value] or [1.0])
            for place, row, value in zip(places, rows, values, strict=True):
                if value is None:
                    text = f"fails: {row['reason'].split(':')[0]}" if axis is time else ""
                    axis.text(0.07 * top, place, text, va="center", color="#b03030", size=8)
                    continue
                hatch = "///" if "carried_from" in row else None
                axis.barh(
                    place, value, 0.72, color=_colour(row), hatch=hatch, edgecolor="white", lw=0
                )
                axis.text(value + 0.01 * top, place, form.format(value), va="center", size=8)
            axis.set_xlim(0, 1.12 * top)
            axis.set_xlabel(label)
            axis.tick_params(axis="y", length=0)
            axis.grid(axis="x", color="#e4e6ea", lw=0.8)
            axis.set_axisbelow(True)
        time.axvline(1, color="#8a8f98", lw=1, ls="--")
        time.set_yticks(list(places), [display_name(row) for row in rows])
        figure.suptitle(headline(result), x=0.01, ha="left", size=11, weight="bold")
        figure.text(0.01, 0.012, _explanation(rows, result), size=7.5, color="#5c6168")
        legend = [
            Patch(color="#1f6feb", label="hvp"),
            Patch(color="#e08b3e", label="others' products"),
            Patch(color="#8a8f98", label="gradients"),
        ]
        figure.legend(handles=legend, ncols=3, loc="upper right", frameon=False, fontsize=8)
        figure.tight_layout(rect=(0, 0.03, 1, 0.98))
        figure.savefig(path, dpi=130)
        pyplot.close(figure)


def _explanation(rows: list[dict[str, Any]], result: dict[str, Any]) -> str:
    words = "Hv: Hessian times vector. Gv: Gauss-Newton matrix times vector. "
    words += f"Medians of {result['rounds']} paired runs."
    if any("carried_from" in row for row in rows):
        words += " Hatched: an earlier run, on its date."
    return words


def _gigabytes(row: dict[str, Any]) -> float | None:
    return None if row["added_bytes"] is None else row["added_bytes"] / 1e9
