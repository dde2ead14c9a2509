"""A job as it runs: a live table in a terminal, plain lines anywhere else; and its result."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from datetime import timedelta
from typing import final

import rich.measure
import rich.table
from hvp_operations.operation import Table
from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.text import Text

from hvp_client import Event, Progress

_UNBOUNDED = 1 << 16  # characters of a line where nobody looks on
_SHOWN = 8  # rows of what is under way
_COLOURS = {"SUCCEEDED": "green", "FAILED": "red", "CANCELLED": "yellow", "CANCELLING": "yellow"}


def show_events(events: Iterable[Event], job: str, console: Console) -> None:
    """Show a job's events until they end.

    Args:
        events: The job's events, from `Job.watch`.
        job: Name of the job, for the heading.
        console: Console to show them on.
    """
    if not console.is_terminal:
        for event in events:
            console.print(plain_line(event), highlight=False, soft_wrap=True)
        return
    screen = _Screen(job)
    with Live(screen.render(), console=console, refresh_per_second=8) as live:
        for event in events:
            screen.take(event)
            live.update(screen.render())


def plain_line(event: Event) -> str:
    """Say an event in one line.

    Args:
        event: An event of a job.

    Returns:
        The line, without its end.
    """
    progress = event.progress
    if progress is None:
        line = f"{_state(event)} attempt {event.attempt}"
        return f"{line} {event.error}" if event.error else line
    line = f"{progress.stage} {pace(progress)}"
    if progress.detail is None:
        return line
    shown, more = _few(progress.detail.table())
    cells = "; ".join(
        ", ".join(f"{name} {cell}" for name, cell in zip(shown.headings, row, strict=True))
        for row in shown.rows
    )
    return f"{line}  {cells}{f'; and {more} more' if more else ''}".rstrip()


def _few(table: Table) -> tuple[Table, int]:
    """The first rows of a table, and how many are left out."""
    shown = Table(headings=table.headings, rows=table.rows[:_SHOWN])
    return shown, len(table.rows) - len(shown.rows)


def _state(event: Event) -> str:
    return "CANCELLING" if event.cancelling else event.state


def pace(progress: Progress) -> str:
    """Say how far a run is, how fast, and how long it will take at most.

    Args:
        progress: Progress of the run.

    Returns:
        A phrase, such as `12/300 products, 0.5 s each, at most 0:02:24 left`.
    """
    if not progress.max_products:
        return "..."
    done = f"{progress.num_products}/{progress.max_products} products"
    if progress.seconds_per_product <= 0:
        return done
    left = progress.max_products - progress.num_products
    at_most = timedelta(seconds=round(left * progress.seconds_per_product))
    return f"{done}, {progress.seconds_per_product:.3g} s each, at most {at_most} left"


def drawn(table: Table) -> rich.table.Table:
    """Lay out a table for a terminal.

    Args:
        table: The table's texts.

    Returns:
        The table as rich draws it.
    """
    laid_out = rich.table.Table(
        title=table.title or None,
        caption="\n".join(table.notes) or None,
        caption_justify="left",
        box=box.HEAVY_HEAD if table.title else None,
        padding=(0, 1) if table.title else (0, 2),
        show_header=any(table.headings),
    )
    for heading in table.headings:
        laid_out.add_column(heading, justify="right")
    for row in table.rows:
        laid_out.add_row(*row)
    return laid_out


def print_table(table: Table) -> None:
    """Print a table to standard output.

    Args:
        table: The table's texts.
    """
    console = Console()
    if console.is_terminal:
        console.print(drawn(table))
        return
    # Notes are kept to a table's width, so they are lines of their own here.
    print_laid_out(drawn(replace(table, notes=())), console)
    for note in table.notes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)


def print_laid_out(table: rich.table.Table, console: Console) -> None:
    """Print a table that is laid out; where nobody looks on, whole, however wide it is.

    Args:
        table: The table as rich draws it.
        console: Console to print it on.
    """
    if not console.is_terminal:
        unbounded = console.options.update(width=_UNBOUNDED)
        needed = rich.measure.Measurement.get(console, unbounded, table).maximum
        console.width = max(console.width, needed)
    console.print(table)


@final
class _Screen:
    """The live view of a job: its state, and the progress of its run."""

    def __init__(self, job: str):
        self._job = job
        self._state = "QUEUED"
        self._attempt = 0
        self._progress: Progress | None = None

    def take(self, event: Event) -> None:
        if event.progress is not None:
            self._progress = event.progress
        else:
            self._state, self._attempt = _state(event), event.attempt

    def render(self) -> RenderableType:
        heading = Text(f"{self._job}  ")
        heading.append(self._state, _COLOURS.get(self._state, "cyan"))
        if self._attempt > 1:
            heading.append(f"  attempt {self._attempt}")
        progress = self._progress
        if progress is None:
            return heading
        bar = ProgressBar(
            total=max(1, progress.max_products), completed=progress.num_products, width=40
        )
        parts: list[RenderableType] = [heading, bar, f"{progress.stage}: {pace(progress)}"]
        if progress.detail is not None:
            shown, more = _few(progress.detail.table())
            parts.append(drawn(shown))
            if more:
                parts.append(f"  and {more} more")
        return Group(*parts)
