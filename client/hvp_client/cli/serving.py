"""`hvp serve`."""

from __future__ import annotations

from collections.abc import Sequence

import typer

from hvp_client.cli.failures import usage_error


def run_server(arguments: Sequence[str]) -> None:
    """Run the server in this thread until it is told to end.

    Args:
        arguments: Command-line arguments of `python -m hvp_service.app.server`.

    Raises:
        typer.Exit: With the server's exit code; 2 when its packages are not installed.
    """
    try:
        from hvp_service.app.server import main
    except ModuleNotFoundError as error:
        usage_error(
            f"the server's packages are not installed ({error.name} is missing); "
            "run `pip install 'hvp[service]'`"
        )
    raise typer.Exit(main(arguments))
