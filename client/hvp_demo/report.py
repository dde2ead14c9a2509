"""The demo's results as files: JSON, a text table, a picture, and one page that holds them all."""

from __future__ import annotations

import base64
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path

from hvp_demo.findings import Findings, to_json, to_table
from hvp_demo.picture import DARK, LIGHT, draw

JSON_NAME = "eigenvalues.json"
TABLE_NAME = "eigenvalues.txt"
PICTURE_NAME = "spectrum.png"
PAGE_NAME = "report.html"


def write_report(findings: Findings, output: Path) -> list[Path]:
    """Write every form of the findings into a folder.

    Args:
        findings: Findings to report.
        output: The folder; made if missing, files of the same names are replaced.

    Returns:
        The files, in the order in which a reader would open them.
    """
    output.mkdir(parents=True, exist_ok=True)
    light = draw(findings, LIGHT)
    contents = {
        PAGE_NAME: to_html(findings, light, draw(findings, DARK)).encode(),
        PICTURE_NAME: light,
        TABLE_NAME: to_table(findings).encode(),
        JSON_NAME: to_json(findings).encode(),
    }
    for name, content in contents.items():
        (output / name).write_bytes(content)
    return [output / name for name in contents]


def to_html(findings: Findings, light: bytes, dark: bytes) -> str:
    """One self-contained page: styles and pictures are inside, nothing is loaded.

    Args:
        findings: Findings to report.
        light: The picture for a light page, as PNG.
        dark: The picture for a dark page, as PNG.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["data_uri"] = _data_uri
    environment.filters["duration"] = duration
    source = files("hvp_demo").joinpath("report.html.jinja").read_text(encoding="utf-8")
    total_s = sum(findings.stage_s.values())
    longest_s = max(findings.stage_s.values(), default=0.0) or 1.0
    return environment.from_string(source).render(
        f=findings,
        light=light,
        dark=dark,
        total_s=total_s,
        longest_s=longest_s,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def duration(seconds: float) -> str:
    """A time as a person would say it: `0.42 s`, `12.3 s`, `4 min 05 s`."""
    if seconds < 1:
        return f"{seconds:.2f} s"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
