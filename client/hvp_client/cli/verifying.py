"""`hvp verify`: checks of a model's curvature on a server."""

from __future__ import annotations

import json
from collections.abc import Sequence

import typer
from rich.console import Console

from hvp_client import Client
from hvp_client.cli.asking import brought, read_unless_named
from hvp_client.cli.display import drawn
from hvp_client.cli.failures import EXIT_FAILURE, failures_reported


def verify_checkpoint(
    address: str,
    checkpoint: str,
    ids: str,
    *,
    dtype: str,
    precision: str | None,
    parameters: Sequence[str] | None,
    seed: int,
    as_json: bool,
) -> None:
    """Upload what the server lacks, check, and print the figures.

    Args:
        address: Address of the server.
        checkpoint: Name of a checkpoint, or a folder to upload.
        ids: Name of a batch, or a file to upload.
        dtype: Dtype of vectors.
        precision: Precision of the operands of matrix products; None lets the server choose.
        parameters: Patterns of parameters' names; None for all.
        seed: Seed of the random directions.
        as_json: Print JSON.

    Raises:
        typer.Exit: With code 1: a check failed.
    """
    tensors = read_unless_named(ids)
    with failures_reported(), Client(address) as client:
        found, batch = brought(client, checkpoint, ids, tensors)
        with Console(stderr=True).status("checking; some minutes for a large model"):
            verdict = client.verify(found, batch, dtype, precision, parameters, seed)
    if as_json:
        print(json.dumps(verdict.to_json(), indent=2))
    else:
        Console().print(drawn(verdict.table()))
    if not verdict.passed:
        raise typer.Exit(EXIT_FAILURE)
