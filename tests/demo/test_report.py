"""The report tells what was found, in files that need nothing else."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import struct
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hvp_demo.findings import Findings, to_json, to_table
from hvp_demo.picture import (
    DARK,
    DOTS_PER_INCH,
    HEIGHT_INCHES,
    LIGHT,
    WIDTH_INCHES,
    Theme,
    draw,
    round_ticks,
    smoothed_counts,
)
from hvp_demo.report import duration, write_report

from tests.demo import examples

VOID = {"meta", "link", "br", "img", "source", "hr", "input"}


class _Page(HTMLParser):
    """Collects what a browser would load, and checks that tags are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loaded: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.loaded += [
            value for name, value in attrs if value and name in ("src", "srcset", "href", "data")
        ]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def found() -> Findings:
    return examples.findings()


@pytest.fixture(scope="module")
def files(found: Findings, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    output = tmp_path_factory.mktemp("report") / "new"
    return {path.name: path for path in write_report(found, output)}


def test_four_files_are_written(files: dict[str, Path]) -> None:
    assert set(files) == {"report.html", "spectrum.png", "eigenvalues.txt", "eigenvalues.json"}


def test_the_page_loads_nothing_and_closes_every_tag(files: dict[str, Path]) -> None:
    source = files["report.html"].read_text()
    page = _Page()
    page.feed(source)
    assert not page.open
    assert len(page.loaded) == 2  # the picture, light and dark
    assert all(each.startswith("data:image/png;base64,") for each in page.loaded)
    assert not re.search(r"https?://|@import|url\(|<script", source)


def test_the_page_shows_every_eigenvalue_and_escapes_names(
    found: Findings, files: dict[str, Path]
) -> None:
    page = _Page()
    page.feed(files["report.html"].read_text())
    for value in found.eigenvalues:
        assert f"{value:+.6f}" in page.text
    assert found.model in page.text
    assert found.provenance["checkpoint"] in page.text


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_the_picture_is_a_png_of_the_size_it_says(found: Findings, theme: Theme) -> None:
    png = draw(found, theme)
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", png[16:24])
    assert (width, height) == (
        round(WIDTH_INCHES * DOTS_PER_INCH),
        round(HEIGHT_INCHES * DOTS_PER_INCH),
    )
    assert len(png) > 20_000


def test_a_single_positive_eigenvalue_without_history_can_be_drawn(found: Findings) -> None:
    lone = dataclasses.replace(
        found,
        eigenvalues=(2.0,),
        residuals=(0.0,),
        intervals=((2.0, 2.0),),
        ritz_values=(2.0,),
        ritz_weights=(1.0,),
        history=(),
    )
    assert draw(lone).startswith(b"\x89PNG")


def test_json_gives_the_numbers_back(found: Findings) -> None:
    record = json.loads(to_json(found))
    assert record["eigenvalues"] == list(found.eigenvalues)
    assert record["residuals"] == list(found.residuals)
    for (low, high), value in zip(record["intervals"], found.eigenvalues, strict=True):
        assert low <= value <= high


def test_what_is_claimed_stands_under_the_table_and_on_the_page(
    found: Findings, files: dict[str, Path]
) -> None:
    page = _Page()
    page.feed(files["report.html"].read_text())
    for claim in found.claims:
        assert claim in to_table(found)
        assert claim in page.text


def test_where_nothing_is_claimed_json_has_no_number(found: Findings) -> None:
    unknown = dataclasses.replace(found, intervals=((-math.inf, math.inf),) * 6)
    assert json.loads(to_json(unknown))["intervals"] == [[None, None]] * 6


def test_each_interval_holds_an_eigenvalue_of_the_known_spectrum(found: Findings) -> None:
    known = np.array([210.0, 95.0, 60.0, -30.0, -18.0, -11.0])
    for row in found.rows:
        low, high = row.interval
        rounding = 1e-9
        assert np.any((known >= low - rounding) & (known <= high + rounding))


def test_the_table_lists_the_largest_first_in_aligned_columns(found: Findings) -> None:
    lines = [line for line in to_table(found).splitlines() if line.endswith("]")]
    values = [float(line.split()[1]) for line in lines]
    assert values == sorted(values, reverse=True)
    assert len({len(line) for line in lines}) == 1


def test_findings_refuse_an_eigenvalue_without_its_residual(found: Findings) -> None:
    with pytest.raises(ValueError, match="residual"):
        dataclasses.replace(found, residuals=found.residuals[:-1])


def test_a_bump_is_as_high_as_its_count_and_neighbours_add_up() -> None:
    grid = np.array([0.0, 10.0])
    heights = smoothed_counts(
        np.array([0.0, 0.0, 10.0]), np.array([2.0, 3.0, 7.0]), grid, width=1.0
    )
    np.testing.assert_allclose(heights, [5.0, 7.0], rtol=1e-12)


def test_ticks_are_round_ascending_and_inside() -> None:
    ticks = round_ticks(-185.0, 206.0, 30.0)
    assert ticks == sorted(ticks)
    assert 0.0 in ticks
    assert all(-185.0 <= tick <= 206.0 for tick in ticks)
    assert len(ticks) > 4


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.421, "0.42 s"), (12.34, "12.3 s"), (245.0, "4 min 05 s")]
)
def test_durations_are_said_as_people_say_them(seconds: float, said: str) -> None:
    assert duration(seconds) == said
