"""The benchmark measures, reports failures as rows, and sees when something has become worse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import baselines, record
from benchmarks.__main__ import main, measure, parse
from benchmarks.contest import Contestant, Entry
from benchmarks.peers import load, peers
from benchmarks.problem import Problem, asymmetry, relative_error
from benchmarks.shapes import SHAPES

TINY = ["--shape", "tiny", "--device", "cpu", "--no-compile", "--rounds", "2"]


def rows_of(folder: Path) -> dict[str, dict[str, Any]]:
    (path,) = folder.glob("*.json")
    result = record.load(path)
    assert result
    return {row["key"]: row for row in result["rows"]}


@pytest.mark.slow
def test_a_run_leaves_a_result_with_every_quantity_and_a_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = ["gradient-ours", "hvp-fast"]
    assert main([*TINY, "--output", str(tmp_path), "--only", "reverse-*", *ours]) == 0
    rows = rows_of(tmp_path)
    for key in ours:
        assert rows[key]["status"] == "measured", rows[key]["reason"]
        assert rows[key]["error"] < 1e-5
    product, gradient = rows["reverse-over-reverse"], rows["gradient-eager"]
    assert product["status"] == gradient["status"] == "measured"
    assert len(product["seconds"]) == 2
    assert product["ratios"]["gradient-eager"] > 0
    assert gradient["ratios"]["gradient-eager"] == 1
    assert product["tflops"] > 0
    assert product["added_bytes"] >= 0
    # float32 against float64, and ten times that for what accumulates
    assert 0 < product["error"] < 1e-5
    assert product["asymmetry"] < 1e-6
    assert rows["gradient-compiled"]["status"] == "skipped"
    assert list(tmp_path.glob("*.png"))
    assert "reverse over reverse: Hv" in capsys.readouterr().out


def test_a_contestant_that_fails_is_a_row_with_the_reason_in_one_line(tmp_path: Path) -> None:
    def no_such_kernel(problem: Problem) -> Entry:
        raise RuntimeError("no such kernel\nand a long explanation")

    def out_of_memory_later(problem: Problem) -> Entry:
        runs: list[int] = []

        def run() -> Tensor:
            runs.append(1)
            if len(runs) > 3:
                raise torch.OutOfMemoryError("too much")
            return problem.probe(0)

        return Entry(run=run, product=lambda index: run())

    broken = [
        Contestant(key="opening", name="one", product="hvp", open=no_such_kernel),
        Contestant(key="running", name="two", product="hvp", open=out_of_memory_later),
    ]
    options = parse([*TINY, "--output", str(tmp_path), "--no-reference"])
    measure(SHAPES["tiny"], options, [*broken, baselines.reverse_over_reverse()])
    rows = rows_of(tmp_path)
    assert rows["opening"]["status"] == rows["running"]["status"] == "failed"
    assert rows["opening"]["reason"] == "RuntimeError: no such kernel"
    assert rows["running"]["reason"] == "OutOfMemoryError: too much"
    assert rows["running"]["median_s"] is None
    assert rows["reverse-over-reverse"]["status"] == "measured"


def test_a_library_that_is_not_here_is_said_to_be_missing(tmp_path: Path) -> None:
    def needs_it(problem: Problem) -> Entry:
        load("no_such_library", "no-such-library")
        raise AssertionError

    absent = Contestant(key="absent", name="absent: Hv", product="hvp", open=needs_it)
    options = parse([*TINY, "--output", str(tmp_path), "--no-reference"])
    measure(SHAPES["tiny"], options, [absent])
    assert rows_of(tmp_path)["absent"]["status"] == "not installed"


def test_what_was_measured_of_a_missing_library_or_another_version_stays_visible() -> None:
    peer = {"key": "peer", "name": "peer: Hv", "library": "peer", "status": "measured"}
    committed = {"date": "2026-01-01", "rows": [{**peer, "version": "1.0"}]}
    missing: dict[str, Any] = {"rows": [{**peer, "version": "", "status": "not installed"}]}
    newer: dict[str, Any] = {"rows": [{**peer, "version": "2.0"}]}
    same: dict[str, Any] = {"rows": [{**peer, "version": "1.0"}]}
    for result in (missing, newer, same):
        record.carry(result, committed)
    assert [row["version"] for row in missing["rows"]] == ["1.0"]
    assert [row["version"] for row in newer["rows"]] == ["2.0", "1.0"]
    assert record.display_name(newer["rows"][1]) == "peer 1.0: Hv (2026-01-01)"
    assert len(same["rows"]) == 1


@pytest.mark.parametrize(
    ("ratio", "status", "code"),
    [(3.2, "measured", 0), (3.5, "measured", 1), (2.5, "measured", 0), (None, "failed", 1)],
)
def test_a_product_that_has_become_slower_beyond_the_tolerance_is_an_error(
    tmp_path: Path, ratio: float | None, status: str, code: int
) -> None:
    def result(ratio: float | None, status: str) -> str:
        row = {
            "key": "hvp-fast",
            "name": "ours",
            "library": "hvp",
            "status": status,
            "added_bytes": 1,
            "ratios": {"gradient-compiled": ratio} if ratio else {},
        }
        head = {"format": record.FORMAT, "date": "2026-01-01", "device": {"kind": "cpu"}}
        path = tmp_path / f"{ratio}.json"
        path.write_text(json.dumps({**head, "rows": [row]}))
        return str(path)

    assert main(["compare", result(3.1, "measured"), result(ratio, status)]) == code


def test_the_count_of_a_gradient_is_what_torch_counts() -> None:
    shape = SHAPES["tiny"]
    problem = Problem(shape, torch.device("cpu"), "fp32", compiled=False)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        torch.autograd.grad(problem.loss(), problem.parameters)
    # The formula computes whole squares, not halves, and keeps P: 6 products of tiles, not 7.
    half = shape.tokens**2 * 64 * shape.rows * 2
    assert counter.get_total_flops() == problem.flops("gradient") - 7 * half + 12 * half


def test_every_peer_has_a_key_of_its_own() -> None:
    keys = [each.key for each in peers()]
    assert len(set(keys)) == len(keys)


def test_errors_and_asymmetries_are_relative() -> None:
    exact = torch.tensor([3.0, 4.0])
    assert relative_error(exact + torch.tensor([0.0, 0.5]), exact) == pytest.approx(0.1)
    u, v = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    matrix = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
    found = asymmetry(u, matrix @ u, v, matrix @ v)
    assert found == pytest.approx(2 / 5**0.5)
