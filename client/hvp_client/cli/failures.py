"""Failures of commands: one red line on stderr and an exit code, never a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer
from rich.console import Console
from rich.markup import escape

EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130  # as shells have it: 128 + SIGINT


@contextmanager
def failures_reported() -> Iterator[None]:
    """Turn errors of the SDK into a message and an exit code.

    Raises:
        typer.Exit: With code 1 for a refusal or failure, 130 for an interruption.
    """
    # Here and not above: `hvp serve` reports failures too, and must not load gRPC before its ranks
    # have been started.
    from hvp_client import HvpError, InternalError, JobCancelledError, JobFailedError

    try:
        yield
    except HvpError as error:
        _print(f"[red]{escape(error.reason)}:[/] {escape(error.message)}")
        job = error.metadata.get("job", "")
        if isinstance(error, (JobFailedError, JobCancelledError)) and job:
            _print(f"  job: {escape(job)}")
        for name, value in error.metadata.items():
            if name != "job":
                _print(f"  {escape(name)}: {escape(value)}")
        if isinstance(error, InternalError) and error.request_id:
            _print(f"  a bug of the server: report request {escape(error.request_id)}")
        raise typer.Exit(EXIT_FAILURE) from None
    except KeyboardInterrupt:
        raise typer.Exit(EXIT_INTERRUPTED) from None


def usage_error(message: str) -> NoReturn:
    """Refuse what was typed.

    Args:
        message: What is wrong and what to type instead.

    Raises:
        typer.Exit: With code 2.
    """
    _print(f"[red]usage:[/] {escape(message)}")
    raise typer.Exit(EXIT_USAGE)


def _print(line: str) -> None:
    # What a server hands on of a file may hold signs that a terminal obeys.
    line = "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in line)
    Console(stderr=True, soft_wrap=True, highlight=False).print(line)
