"""`hvp jobs` and `hvp cancel`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hvp_client import AsyncClient, AsyncJob, Client
from hvp_client._selections import in_words
from hvp_client.cli.display import print_laid_out
from hvp_client.cli.failures import failures_reported


def job_name(text: str) -> str:
    """Complete an id to the name of a job.

    Args:
        text: Name or id of a job.

    Returns:
        The job's name, `projects/{project}/jobs/{id}`.
    """
    return text if "/" in text else f"projects/default/jobs/{text}"


_WIDE = 120  # characters that the widest rows take


def list_jobs(address: str, *, states: Sequence[str] | None, as_json: bool) -> None:
    """Print jobs, the newest first.

    Args:
        address: Address of the server.
        states: States of the jobs to print; None for all.
        as_json: Print a JSON array.
    """
    with failures_reported():
        jobs = asyncio.run(_jobs(address, states))
    if as_json:
        print(json.dumps([_record(job) for job in jobs], indent=2))
        return
    console = Console(stderr=not jobs)
    if not jobs:
        console.print(f"no jobs {' or '.join(states)}" if states else "no jobs", highlight=False)
        return
    rows = [_row(job) for job in jobs]
    wide = not console.is_terminal or console.width >= _WIDE
    # A name that is cut is of no use: in a narrow terminal what a job does has a line of its own.
    table = Table("job", "state", "products", "created", *(["work"] if wide else []), box=None)
    for cells in rows:
        table.add_row(*(cells if wide else cells[:-1]))
        if not wide:
            table.add_row(f"  {cells[-1]}")
    print_laid_out(table, console)


def _row(job: AsyncJob[Any]) -> tuple[str, ...]:
    record = _record(job)
    return (
        job.name.rpartition("/")[2],
        "CANCELLING" if job.cancelling else job.state,
        f"{record['num_products']}/{record['max_products']}" if record["max_products"] else "",
        f"{job.create_time.astimezone():%m-%d %H:%M}",
        escape(_work(record)),  # a pattern may have brackets
    )


def _work(record: Mapping[str, Any]) -> str:
    """A job's question, in a line."""
    if not record["headline"]:
        return "?"  # a job of another version's, of which the server shows what it can
    again = f", attempt {record['attempt']}" if record["attempt"] > 1 else ""
    of = f"{record['operator']} {record['dtype']}{in_words(record['parameters'])}"
    return f"{record['headline']} of {of}{again}"


async def _jobs(address: str, states: Sequence[str] | None) -> list[AsyncJob[Any]]:
    async with AsyncClient(address) as client:
        return await client.jobs(states)


def _record(job: AsyncJob[Any]) -> dict[str, Any]:
    progress = job.progress
    return {
        "name": job.name,
        "state": job.state,
        "cancelling": job.cancelling,
        "attempt": job.attempt,
        "headline": job.headline,
        **job.spec,
        "num_products": progress.num_products if progress else 0,
        "max_products": progress.max_products if progress else 0,
        "create_time": job.create_time.isoformat(),
        "end_time": job.end_time.isoformat() if job.end_time else None,
        "error": str(job.error) if job.error else None,
    }


def cancel_job(address: str, job: str) -> None:
    """Ask a job to stop and print the state it is in.

    Args:
        address: Address of the server.
        job: Name or id of the job.
    """
    with failures_reported(), Client(address) as client:
        handle = client.job(job_name(job))
        handle.cancel()
        print("CANCELLING" if handle.cancelling else handle.state)
