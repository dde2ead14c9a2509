"""`hvp upload`."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from hvp_client import Checkpoint, Client
from hvp_client.cli.failures import failures_reported


def upload_checkpoint(address: str, directory: Path, *, as_json: bool) -> None:
    """Upload a folder and print the checkpoint that it is; a pipe gets the name alone.

    Args:
        address: Address of the server.
        directory: Folder of config.json and safetensors.
        as_json: Print a JSON object.
    """
    with failures_reported(), Client(address) as client:
        checkpoint = upload_with_bar(client, directory)
    if as_json:
        print(
            json.dumps(
                {
                    "name": checkpoint.name,
                    "architecture": checkpoint.architecture,
                    "num_parameters": checkpoint.num_parameters,
                    "stored_dtype": checkpoint.stored_dtype,
                    "size_bytes": checkpoint.size_bytes,
                    "ignored_files": checkpoint.ignored_files,
                }
            )
        )
        return
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    if checkpoint.ignored_files:
        console.print(
            f"no part of the model, left out: {escape(', '.join(checkpoint.ignored_files))}"
        )
    console.print(
        f"{checkpoint.architecture}: {checkpoint.num_parameters:,} parameters, "
        f"{checkpoint.stored_dtype}, {checkpoint.size_bytes / 1e6:,.1f} MB"
    )
    print(checkpoint.name)


def upload_with_bar(client: Client, directory: Path) -> Checkpoint:
    """Upload a folder, with a progress bar where there is a terminal.

    Args:
        client: The client that uploads.
        directory: Folder of config.json and safetensors.

    Returns:
        The checkpoint.
    """
    console = Console(stderr=True)
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(
        "uploading", *columns, console=console, disable=not console.is_terminal, transient=True
    ) as bar:
        task = bar.add_task("upload", total=None)
        return client.upload_checkpoint(
            directory, lambda done, total: bar.update(task, completed=done, total=total)
        )
