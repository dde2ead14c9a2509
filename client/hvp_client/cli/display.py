"""A job as it runs: a live table in a terminal, plain lines anywhere else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import final

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from hvp_client import EigshResult, Event, Progress, Vector

_SHOWN = 8  # pairs of a search that is under way
_COLOURS = {"SUCCEEDED": "green", "FAILED": "red", "CANCELLED": "yellow", "CANCELLING": "yellow"}


def show_events(events: Iterable[Event], job: str, console: Console) -> None:
    """Show a job's events until they end.

    Args:
        events: As from `Job.watch`.
        job: Its name, for the heading.
        console: Where to.
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
        event: A job's.

    Returns:
        The line, without its end.
    """
    if event.progress is None:
        line = f"{_state(event)} attempt {event.attempt}"
        return f"{line} {event.error}" if event.error else line
    pairs = list(zip(event.ritz_values, event.residual_estimates, strict=False))
    values = "  ".join(f"{value:.6g} (residual {residual:.1e})" for value, residual in _few(pairs))
    more = f"  and {len(pairs) - _SHOWN} more" if len(pairs) > _SHOWN else ""
    return f"{event.progress.stage} {pace(event.progress)}  {values}".rstrip() + more


def _few(pairs: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those furthest from done, in their order: they decide when a search ends."""
    worst = sorted(range(len(pairs)), key=lambda index: -pairs[index][1])[:_SHOWN]
    return [pairs[index] for index in sorted(worst)]


def _state(event: Event) -> str:
    return "CANCELLING" if event.cancelling else event.state


def pace(progress: Progress) -> str:
    """Say how far a run is, how fast, and how long it will take at most.

    Args:
        progress: A run's.

    Returns:
        A phrase.
    """
    done = f"{progress.num_products}/{progress.max_products} products"
    if progress.seconds_per_product <= 0:
        return done
    left = progress.max_products - progress.num_products
    at_most = timedelta(seconds=round(left * progress.seconds_per_product))
    return f"{done}, {progress.seconds_per_product:.3g} s each, at most {at_most} left"


def result_table(result: EigshResult[Vector]) -> Table:
    """Lay out eigenvalues with their intervals, and what is certified of them.

    Args:
        result: A job's.

    Returns:
        The table.
    """
    table = Table(
        title=f"{result.outcome} after {result.num_products} products, loss {result.loss:.6g} nats",
        caption="\n".join(
            (
                *result.claims,
                f"{_operator(result)}symmetry defect {result.symmetry_defect:.1e}",
                f"eigenvectors: {_span([vector.name for vector in result.eigenvectors])}",
            )
        ),
        caption_justify="left",
    )
    for heading in ("#", "eigenvalue", "± (certified)", "residual ‖Hy - λy‖"):
        table.add_column(heading, justify="right")
    radii = (result.intervals[:, 1] - result.intervals[:, 0]) / 2
    rows = zip(result.eigenvalues, radii, result.residuals, strict=True)
    for index, (value, radius, residual) in enumerate(rows):
        table.add_row(str(index), f"{value:.8g}", f"{radius:.1e}", f"{residual:.2e}")
    return table


def _span(names: Sequence[str]) -> str:
    """The first name whole and of the last what differs; one name alone."""
    if len(names) < 2:
        return "".join(names)
    return f"{names[0]} to -{names[-1].rpartition('-')[2]}"


def _operator(result: EigshResult[Vector]) -> str:
    """What the eigenvalues are of, as far as the server told."""
    told = (result.provenance.get(key) for key in ("operator", "dtype", "precision"))
    return "".join(f"{each}, " for each in told if each)


@final
class _Screen:
    """What is known of the job, drawn."""

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
        if self._progress is None:
            return heading
        table = Table("Ritz value", "residual estimate", box=None, padding=(0, 2))
        pairs = list(
            zip(self._progress.ritz_values, self._progress.residual_estimates, strict=False)
        )
        for value, residual in _few(pairs):
            table.add_row(f"{value:.8g}", f"{residual:.1e}")
        if len(pairs) > _SHOWN:
            table.add_row(f"and {len(pairs) - _SHOWN} more", "smaller")
        bar = ProgressBar(
            total=max(1, self._progress.max_products),
            completed=self._progress.num_products,
            width=40,
        )
        return Group(heading, bar, f"{self._progress.stage}: {pace(self._progress)}", table)
