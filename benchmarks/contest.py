"""Contestants take turns; one that fails becomes a row that says why.

A heat is a set of contestants that are in memory together and run in turn, the gradients first, for
so many rounds; a ratio is the median over rounds of time over the gradient's time in that round. So
a machine that slows down slows all alike. On a CPU all are one heat. On a GPU each has a heat of
its own with the gradients: what CUDA graphs and caches hold would not fit together.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, final

import torch
from torch import Tensor

from benchmarks.counts import Product
from benchmarks.meter import Kernel, Meter, Sample, kernels
from benchmarks.problem import Problem, asymmetry, relative_error

#: Gradients that times are divided by.
BASES = ("gradient-eager", "gradient-compiled", "gradient-graph")

Status = Literal["measured", "failed", "not installed", "skipped", "unfinished"]


class NotInstalledError(Exception):
    """A contestant's library is not here."""


class SkippedError(Exception):
    """This run leaves the contestant out; the message says why."""


@final
@dataclass(frozen=True, kw_only=True)
class Entry:
    """A contestant that is ready to run.

    Attributes:
        run: What is timed: the product with probe 0, or with `Contestant.probes` of them.
        product: The product with a probe by index, flat in canonical order. A gradient takes none.
        own_weights: Bytes of its own copy of the weights; 0 for the shared model's.
        notes: What it says of itself afterwards.
        memory: Bytes above the weights, where torch cannot see them.
    """

    run: Callable[[], Any]
    product: Callable[[int], Tensor]
    own_weights: int = 0
    notes: Callable[[], dict[str, str]] = dict
    memory: Callable[[], int] | None = None


@final
@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One way to compute something.

    Attributes:
        key: What `--only` and comparisons over time go by.
        name: What the table says.
        product: What is computed.
        open: Builds it. Raises what it likes.
        library: The distribution it comes from; "hvp" for ours.
        version: Of that.
        probes: Products in one run.
        cached: It keeps something from one run to the next.
    """

    key: str
    name: str
    product: Product
    open: Callable[[Problem], Entry]
    library: str = "torch"
    version: str = torch.__version__
    probes: int = 1
    cached: bool = False


@final
@dataclass(kw_only=True)
class Row:
    """What was measured of a contestant."""

    contestant: Contestant
    status: Status = "unfinished"
    reason: str = ""
    seconds: list[float] = field(default_factory=list)
    ratios: dict[str, list[float]] = field(default_factory=dict)
    added_bytes: int | None = None
    peak_bytes: int | None = None
    flops: float = 0.0
    error: float | None = None
    asymmetry: float | None = None
    ready_s: float | None = None
    notes: dict[str, str] = field(default_factory=dict)
    kernels: list[Kernel] = field(default_factory=list)

    @property
    def median_s(self) -> float | None:
        """Of one product."""
        return statistics.median(self.seconds) if self.seconds else None

    def fail(self, error: BaseException) -> None:
        """Take the reason's first line and forget what was measured."""
        kinds: list[tuple[type[BaseException], Status]] = [
            (NotInstalledError, "not installed"),
            (SkippedError, "skipped"),
        ]
        self.status = next((to for kind, to in kinds if isinstance(error, kind)), "failed")
        first = (str(error).strip() or "no message").splitlines()[0][:200]
        self.reason = first if self.status != "failed" else f"{type(error).__name__}: {first}"
        self.seconds.clear()
        self.ratios.clear()


@final
class _Runner:
    """A contestant within one heat."""

    def __init__(self, row: Row, entry: Entry, held_bytes: int):
        self.row = row
        self.entry = entry
        self.held_bytes = held_bytes  # by it alone, between its runs
        self.samples: list[Sample] = []


@final
class Contest:
    """Runs heats and keeps the rows.

    Args:
        problem: To be solved.
        meter: Of its device.
        references: Product -> what it should be, flat, where that is known.
        rounds: In each heat.
        say: Is told of progress.
        save: Is called whenever a row has changed.
        profiled: Whether the kernels of a contestant are listed, by its key.
    """

    def __init__(
        self,
        problem: Problem,
        meter: Meter,
        *,
        references: dict[Product, Tensor],
        rounds: int,
        say: Callable[[str], None],
        save: Callable[[Sequence[Row]], None],
        profiled: Callable[[str], bool],
    ):
        self.rows: list[Row] = []
        self._problem = problem
        self._meter = meter
        self._references = references
        self._rounds = rounds
        self._say = say
        self._save = save
        self._profiled = profiled

    def run(self, bases: Sequence[Contestant], others: Sequence[Contestant]) -> list[Row]:
        """Measure the gradients, and the others beside them."""
        self.rows = [Row(contestant=contestant) for contestant in (*bases, *others)]
        first, rest = self.rows[: len(bases)], self.rows[len(bases) :]
        standing = [runner for row in first if (runner := self._open(row))]
        together = self._problem.device.type == "cpu"
        heats = [rest] if together else [[row] for row in rest] or [[]]
        for heat in heats:
            opened = [runner for row in heat if (runner := self._open(row))]
            if opened or not any(runner.samples for runner in standing):
                self._turns([*standing, *opened])
            standing = [runner for runner in standing if runner.row.status == "measured"]
            while opened:
                self._close(opened.pop())
            self._problem.memo.clear()
        while standing:
            self._close(standing.pop())
        self._save(self.rows)
        return self.rows

    def _open(self, row: Row) -> _Runner | None:
        """Build a contestant, warm it up and check its answer."""
        contestant = row.contestant
        self._save(self.rows)
        began = time.perf_counter()
        try:
            before = self._meter.held()
            entry = contestant.open(self._problem)
            self._check(row, entry)
            if self._problem.device.type == "cuda" or contestant.probes > 1:
                entry.run()
            row.ready_s = time.perf_counter() - began
            held = self._meter.held() - before
        except Exception as error:  # any library may fail in any way: that is a result
            self._fail(row, error)
            return None
        row.flops = self._problem.flops(contestant.product, contestant.probes, contestant.cached)
        self._say(f"  {contestant.name}: ready after {row.ready_s:.1f} s")
        return _Runner(row, entry, held)

    def _fail(self, row: Row, error: Exception) -> None:
        row.fail(error)
        error.__traceback__ = None  # its frames hold tensors
        self._say(f"  {row.contestant.name}: {row.status}: {row.reason}")
        self._save(self.rows)

    def _check(self, row: Row, entry: Entry) -> None:
        """Error and asymmetry; what is checked is not a contestant's first product."""
        product = row.contestant.product
        other = None if product == "gradient" else entry.product(1)
        found = entry.product(0)
        if product in self._references:
            row.error = relative_error(found, self._references[product])
        if other is not None:
            u, v = self._problem.probe(1), self._problem.probe(0)
            row.asymmetry = asymmetry(u, other, v, found)

    def _turns(self, runners: list[_Runner]) -> None:
        for number in range(self._rounds):
            times: dict[str, float] = {}
            for runner in list(runners):
                row = runner.row
                try:
                    sample = self._meter.sample(runner.entry.run)
                except Exception as error:  # as above
                    runners.remove(runner)
                    if row.status == "measured":  # a gradient, for want of room beside this heat
                        error.__traceback__ = None
                    else:
                        self._fail(row, error)
                    continue
                runner.samples.append(sample)
                times[row.contestant.key] = sample.seconds / row.contestant.probes
            for runner in runners:
                _note(runner.row, times)
            if self._problem.device.type == "cpu":
                listed = ", ".join(f"{key} {seconds:.2f}" for key, seconds in times.items())
                self._say(f"  round {number + 1} of {self._rounds}, seconds: {listed}")
        for runner in runners:
            self._finish(runner)

    def _finish(self, runner: _Runner) -> None:
        row, entry = runner.row, runner.entry
        first = row.status == "unfinished"
        cuda = self._problem.device.type == "cuda"
        row.status = "measured"
        transient = max(sample.peak_bytes - sample.start_bytes for sample in runner.samples)
        if entry.memory:
            row.added_bytes = entry.memory()
            row.peak_bytes = row.added_bytes + entry.own_weights
        elif cuda:
            shared = 0 if entry.own_weights else self._problem.weights_bytes
            row.peak_bytes = shared + runner.held_bytes + transient
            row.added_bytes = row.peak_bytes - (entry.own_weights or shared)
        else:
            row.added_bytes = transient
        row.notes = entry.notes()
        if first and cuda and self._profiled(row.contestant.key):
            row.kernels = kernels(entry.run)
        self._save(self.rows)

    def _close(self, runner: _Runner) -> None:
        """Let go of everything; on a CPU, what that frees of a cache counts as its memory."""
        row = runner.row
        count = row.contestant.cached and self._problem.device.type == "cpu"
        before = self._meter.held() if count else 0
        del runner.entry
        after = self._meter.held()
        if count and row.added_bytes is not None:
            row.added_bytes += max(0, before - after)
        if self._problem.device.type == "cuda" and row.median_s is not None:
            self._say(f"  {row.contestant.name}: {1e3 * row.median_s:.1f} ms")


def _note(row: Row, times: dict[str, float]) -> None:
    key = row.contestant.key
    row.seconds.append(times[key])
    for base in BASES:
        if base in times:
            row.ratios.setdefault(base, []).append(times[key] / times[base])
