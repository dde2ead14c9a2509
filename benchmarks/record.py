"""Results as JSON, as a table, and as a comparison over time."""

from __future__ import annotations

import json
import platform
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, final

import torch

from benchmarks.contest import BASES, Row
from benchmarks.peers import installed_version
from benchmarks.problem import Problem

#: Raised when a field changes its meaning.
FORMAT = 1


def heading(problem: Problem, rounds: int, reference: str) -> dict[str, Any]:
    """What a result is a result of."""
    device: dict[str, Any] = {"kind": problem.device.type}
    if problem.device.type == "cuda":
        properties = torch.cuda.get_device_properties(problem.device)
        device |= {"name": properties.name, "bytes": properties.total_memory}
    else:
        device |= {"name": platform.machine(), "threads": torch.get_num_threads()}
    libraries = ("torch", "transformers", "triton", "numpy", "hvp")
    versions = {each: version for each in libraries if (version := installed_version(each))}
    return {
        "format": FORMAT,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "shape": problem.shape.name,
        "model": problem.shape.model,
        "rows_of_tokens": [problem.shape.rows, problem.shape.tokens],
        "weights_from": problem.weights_from,
        "parameters": problem.numel,
        "multiplied_parameters": problem.multiplied,
        "weights_bytes": problem.weights_bytes,
        "precision": problem.precision,
        "compiled": problem.compiled,
        "device": device,
        "versions": {"python": platform.python_version(), **versions},
        "rounds": rounds,
        "reference": reference,
    }


def file_name(head: dict[str, Any]) -> str:
    """By device, shape and precision: what can be compared has one name."""
    device = head["device"]
    name = device["name"] if device["kind"] == "cuda" else f"cpu-{device['threads']}-threads"
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return f"{slug}_{head['shape']}_{head['precision']}.json"


def save(path: Path, head: dict[str, Any], rows: Iterable[Row]) -> None:
    """Write all rows, in one piece: a run that is killed leaves the last whole file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".partial")
    record = {**head, "rows": [_as_json(row) for row in rows]}
    scratch.write_text(json.dumps(record, indent=1) + "\n")
    scratch.replace(path)


def load(path: Path) -> dict[str, Any] | None:
    """A result of this format, or None."""
    if not path.is_file():
        return None
    record: dict[str, Any] = json.loads(path.read_text())
    return record if record.get("format") == FORMAT else None


def _as_json(row: Row) -> dict[str, Any]:
    contestant, median = row.contestant, row.median_s
    found: dict[str, Any] = {
        "key": contestant.key,
        "name": contestant.name,
        "product": contestant.product,
        "library": contestant.library,
        "version": contestant.version,
        "status": row.status,
        "reason": row.reason,
        "median_s": median,
        "ratios": {base: statistics.median(values) for base, values in row.ratios.items()},
        "added_bytes": row.added_bytes,
        "peak_bytes": row.peak_bytes,
        "tflops": row.flops / median / 1e12 if median else None,
        "error": row.error,
        "asymmetry": row.asymmetry,
        "ready_s": row.ready_s,
        "seconds": [float(f"{each:.6g}") for each in row.seconds],
        "notes": row.notes,
    }
    if row.kernels:
        found["kernels"] = {
            "seconds": sum(kernel.seconds for kernel in row.kernels),
            "launches": sum(kernel.launches for kernel in row.kernels),
            "top": [
                {"name": each.name, "seconds": each.seconds, "launches": each.launches}
                for each in row.kernels[:20]
            ],
        }
    return found


def carry(result: dict[str, Any], committed: dict[str, Any]) -> None:
    """Show libraries that this run could not measure, or has in another version, as they were."""
    now = {row["key"]: row for row in result["rows"]}
    for row in committed["rows"]:
        if row["library"] in ("hvp", "torch") or row["status"] != "measured":
            continue
        here = now.get(row["key"])
        if here and here["status"] == "measured" and here["version"] == row["version"]:
            continue
        if here and here["status"] == "not installed":
            result["rows"].remove(here)
        result["rows"].append({**row, "carried_from": row.get("carried_from", committed["date"])})


# The table ---------------------------------------------------------------------------------------


def display_name(row: dict[str, Any]) -> str:
    """With the version of a foreign library, and the date of what was not measured now."""
    name = str(row["name"])
    if row["library"] not in ("hvp", "torch") and row["version"]:
        library, _, product = name.partition(":")
        name = f"{library} {row['version']}:{product}"
    return name + (f" ({row['carried_from']})" if "carried_from" in row else "")


def headline(result: dict[str, Any]) -> str:
    """What was measured on what, in one line."""
    rows, tokens = result["rows_of_tokens"]
    device = result["device"]
    count = device.get("threads")
    where = device["name"] if count is None else f"CPU, {count} thread{'s' if count > 1 else ''}"
    return f"{result['model']}, {rows} x {tokens} tokens, {result['precision']}, {where}"


def table(result: dict[str, Any]) -> str:
    """Time, ratios, memory, rate and digits of every contestant."""
    cuda = result["device"]["kind"] == "cuda"
    hidden = () if cuda else ("x graph", "peak GB")
    width = max(len(display_name(row)) for row in result["rows"])
    lines = [headline(result), ""]
    for row in result["rows"]:
        name = f"{display_name(row):{width}s}"
        if row["status"] != "measured":
            lines.append(f"{name}  {row['status']}: {row['reason']}")
            continue
        ratios = row["ratios"]
        cells = {
            "median": _seconds(row["median_s"]),
            "x comp.": _number(ratios.get("gradient-compiled"), ".2f"),
            "x graph": _number(ratios.get("gradient-graph"), ".2f"),
            "x eager": _number(ratios.get("gradient-eager"), ".2f"),
            "adds GB": _number(row["added_bytes"], ".2f", 1e9),
            "peak GB": _number(row["peak_bytes"], ".2f", 1e9),
            "TFLOP/s": _number(row["tflops"], ".1f" if cuda else ".3f"),
            "error": _number(row["error"], ".1e"),
            "asymm.": _number(row["asymmetry"], ".1e"),
        }
        shown = {title: cell for title, cell in cells.items() if title not in hidden}
        lines[1] = " " * width + "".join(f"{title:>10s}" for title in shown)
        lines.append(name + "".join(f"{cell:>10s}" for cell in shown.values()))
    lines.append(f"error: relative to {result['reference']}; {result['rounds']} rounds")
    for row in result["rows"]:
        lines += _kernel_lines(row)
    return "\n".join(lines)


def _kernel_lines(row: dict[str, Any]) -> list[str]:
    found = row.get("kernels")
    if not found:
        return []
    wall = row["median_s"]
    lines = [
        f"{row['name']}: {1e3 * found['seconds']:.2f} ms in {found['launches']} kernels, "
        f"{1e3 * wall:.2f} ms by the clock ({wall / found['seconds'] - 1:+.1%})"
    ]
    for kernel in found["top"]:
        lines.append(
            f"  {1e3 * kernel['seconds']:8.3f} ms x{kernel['launches']:5d}  {kernel['name'][:100]}"
        )
    return lines


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.1f} ms"


def _number(value: float | None, form: str, unit: float = 1.0) -> str:
    return "-" if value is None else format(value / unit, form)


# Over time ---------------------------------------------------------------------------------------


@final
@dataclass(frozen=True, kw_only=True)
class Change:
    """Of one quantity of one of our ways, in ratios to the gradient of the same run."""

    name: str
    what: str
    old: float
    new: float | None  # None where it failed

    def worse(self, tolerance: float) -> bool:
        """By more than the tolerance, or gone."""
        return self.new is None or self.new > self.old * (1 + tolerance)

    def __str__(self) -> str:
        """One line."""
        if self.new is None:
            return f"{self.name}, {self.what}: {self.old:.2f} -> failed"
        return (
            f"{self.name}, {self.what}: {self.old:.2f} -> {self.new:.2f} "
            f"({self.new / self.old - 1:+.1%})"
        )


def changes(old: dict[str, Any], new: dict[str, Any]) -> Sequence[Change]:
    """Of ours between two results; what was left out of the newer one is not among them."""
    before, now = ({row["key"]: row for row in each["rows"]} for each in (old, new))
    found = []
    for key, row in before.items():
        here = now.get(key)
        if row["library"] != "hvp" or row["status"] != "measured" or here is None:
            continue
        if here["status"] not in ("measured", "failed"):
            continue
        base = _base(row, here)
        if base:
            found.append(
                Change(
                    name=row["name"],
                    what="time",
                    old=row["ratios"][base],
                    new=here["ratios"].get(base),
                )
            )
        if new["device"]["kind"] == "cuda" and here["status"] == "measured":
            was, size = _size(row, before), _size(here, now)
            if was and size:
                found.append(Change(name=row["name"], what="memory", old=was, new=size))
    return found


def _base(row: dict[str, Any], here: dict[str, Any]) -> str | None:
    """The gradient of the same form that both were measured against."""
    order = [BASES[1], BASES[2], BASES[0]]
    if row["key"].endswith("-graph"):
        order = [BASES[2], BASES[1], BASES[0]]
    failed = here["status"] == "failed"
    return next(
        (each for each in order if each in row["ratios"] and (failed or each in here["ratios"])),
        None,
    )


def _size(row: dict[str, Any], rows: dict[str, Any]) -> float | None:
    """Added memory over the compiled gradient's."""
    gradient = rows.get("gradient-compiled", {}).get("added_bytes")
    return row["added_bytes"] / gradient if gradient and row["added_bytes"] else None
