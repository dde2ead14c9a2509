"""`make bench`: measure, print a table, write JSON and a plot, and compare with what is committed.

    python -m benchmarks [--shape NAME ...] [--device cpu|cuda] [--precision fp32|tf32|bf16]
                         [--only PATTERN ...] [--rounds N] [--profile PATTERN ...] [--output FOLDER]
    python -m benchmarks compare OLD.json NEW.json [--tolerance 0.1]
    python -m benchmarks plot RESULT.json

Exits with 1 where one of our products has become slower, or larger, beyond the tolerance, in ratios
to the gradient; seconds of two runs are never compared.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from benchmarks import baselines, jax_llama, ours, peers, plot, record
from benchmarks.contest import Contest, Contestant, Row
from benchmarks.counts import Product
from benchmarks.meter import meter_for
from benchmarks.problem import Problem
from benchmarks.shapes import DEFAULTS, SHAPES, Precision, Shape

COMMITTED = Path(__file__).parent / "results"


def say(line: str) -> None:
    print(line, flush=True)


def field(device: torch.device) -> list[Contestant]:
    """All contestants but the gradients that times are divided by."""
    return [
        *ours.variants(device),
        baselines.reverse_over_reverse(),
        *peers.peers(),
        *jax_llama.contestants(),
    ]


def matches(key: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(key, pattern) for pattern in patterns)


def measure(shape: Shape, options: argparse.Namespace, others: Sequence[Contestant] = ()) -> bool:
    """One shape: whether nothing has become worse than what is committed."""
    device = torch.device(options.device)
    say(f"{shape.name}, {options.precision}, {device}")
    problem = Problem(shape, device, options.precision, not options.no_compile)
    wanted = [
        contestant
        for contestant in (others or field(device))
        if not options.only or matches(contestant.key, options.only)
    ]
    exact: dict[Product, Tensor] = {}
    sentence = "nothing (--no-reference)"
    if not options.no_reference:
        products = dict.fromkeys(["gradient", *(each.product for each in wanted)])
        exact, sentence = ours.references(problem, products, say)
    head = record.heading(problem, options.rounds, sentence)
    name = record.file_name(head)
    path = options.output / name
    committed = record.load(COMMITTED / name)

    def save(rows: Sequence[Row]) -> None:
        record.save(path, head, rows)

    contest = Contest(
        problem,
        meter_for(device),
        references=exact,
        rounds=options.rounds,
        say=say,
        save=save,
        profiled=lambda key: matches(key, options.profile),
    )
    contest.run(baselines.gradients(), wanted)
    result = record.load(path)
    assert result
    if committed:
        record.carry(result, committed)
    say(record.table(result))
    plot.draw(result, path.with_suffix(".png"))
    say(f"written to {path} and {path.with_suffix('.png').name}")
    return not committed or report_changes(committed, result, options.tolerance)


def report_changes(old: dict[str, Any], new: dict[str, Any], tolerance: float) -> bool:
    """Print how ours have changed; whether all is well."""
    changes = record.changes(old, new)
    say(f"against {old['date']}, in ratios to the gradient; more than {tolerance:+.0%} is worse")
    for change in changes:
        worse = "  WORSE" if change.worse(tolerance) else ""
        say(f"  {change}{worse}")
    return not any(change.worse(tolerance) for change in changes)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cuda = torch.cuda.is_available()
    parser.add_argument("--shape", action="append", choices=list(SHAPES))
    parser.add_argument("--device", default="cuda" if cuda else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", choices=get_args(Precision))
    parser.add_argument("--rounds", type=int)
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="contestants by key, such as 'hvp-*'; the gradients always run",
    )
    parser.add_argument(
        "--profile",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="list the kernels of these (CUDA)",
    )
    parser.add_argument("--output", type=Path, default=Path("bench-output"))
    parser.add_argument("--tolerance", type=float, default=0.1)
    parser.add_argument("--no-compile", action="store_true", help="leave compilers out")
    parser.add_argument("--no-reference", action="store_true", help="compute no errors")
    options = parser.parse_args(arguments)
    options.shape = options.shape or DEFAULTS[options.device]
    options.precision = options.precision or ("bf16" if options.device == "cuda" else "fp32")
    options.rounds = options.rounds or (11 if options.device == "cuda" else 3)
    keys = [each.key for each in (*baselines.gradients(), *field(torch.device(options.device)))]
    for pattern in (*options.only, *options.profile):
        if not any(matches(key, [pattern]) for key in keys):
            parser.error(f"no contestant is called {pattern!r}; there are {', '.join(keys)}")
    if options.device == "cpu" and options.precision != "fp32":
        parser.error("a CPU runs fp32")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments[:1] == ["compare"]:
        parser = argparse.ArgumentParser(prog="python -m benchmarks compare")
        parser.add_argument("old", type=Path)
        parser.add_argument("new", type=Path)
        parser.add_argument("--tolerance", type=float, default=0.1)
        options = parser.parse_args(arguments[1:])
        old, new = (record.load(path) for path in (options.old, options.new))
        if old is None or new is None:
            parser.error("no such result")
        return 0 if report_changes(old, new, options.tolerance) else 1
    if arguments[:1] == ["plot"]:
        for path in map(Path, arguments[1:]):
            result = record.load(path)
            if result:
                plot.draw(result, path.with_suffix(".png"))
        return 0
    options = parse(arguments)
    if len(options.shape) > 1:
        # Each in a process of its own: what a library never gives back is not the next one's loss.
        command = [sys.executable, "-m", "benchmarks", *_without_shapes(arguments), "--shape"]
        codes = [subprocess.run([*command, name]).returncode for name in options.shape]  # noqa: S603
        return max(codes)
    return 0 if measure(SHAPES[options.shape[0]], options) else 1


def _without_shapes(arguments: Sequence[str]) -> list[str]:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--shape", action="append")
    return parser.parse_known_args(arguments)[1]


if __name__ == "__main__":
    sys.exit(main())
