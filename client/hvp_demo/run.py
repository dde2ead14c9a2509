"""The demo from end to end: checkpoint, server, uploads, products, spectrum, report."""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from hvp_client import Client, Event, Operator
from hvp_client.cli.display import show_events
from hvp_client.cli.uploading import upload_with_bar
from hvp_operations.eigsh import EigshProgress
from rich.console import Console

from hvp_demo.checkpoint import MODEL_NAME, cache_dir, ensure_checkpoint, find_gguf
from hvp_demo.findings import Findings, Snapshot, to_table
from hvp_demo.report import duration, write_report
from hvp_demo.server import running_server
from hvp_demo.text import python_reference, token_batch

_SEED_V = 1
_SEED_U = 2
# The demo is to end within ten minutes on two cores; everything but the spectrum takes up to three.
_SPECTRUM_S = 390.0
_ENOUGH_PRODUCTS = 48
_VERIFYING = 2.5  # times a product's time: verifying products are in float64


@final
@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of the demo: what it computes, and where the results go.

    Attributes:
        output: Folder of the results.
        num_sequences: Rows of the batch.
        sequence_length: Tokens in a row.
        k: Eigenpairs, half from each end.
        tol: Stop when each residual is at most this fraction of the largest eigenvalue's size.
        max_products: Bound on products, those of the true residuals included; None takes what a
            few minutes allow.
        num_lanczos_vectors: Rows of the Krylov basis; None lets the server choose by memory.
        num_workers: Number of ranks.
        device: Device that the ranks compute on, `cpu` or `cuda`.
    """

    output: Path
    num_sequences: int
    sequence_length: int
    k: int
    tol: float
    max_products: int | None
    num_lanczos_vectors: int | None
    num_workers: int
    device: str


def run_demo(settings: Settings, console: Console) -> list[Path]:
    """Run everything and write the report.

    Args:
        settings: Settings of the demo.
        console: Console on which progress is shown.

    Returns:
        The files written.

    Raises:
        CheckpointUnavailableError: The package with the weights is missing.
        ServerFailedError: The server did not start.
        HvpError: The server refused or failed.
    """
    settings.output.mkdir(parents=True, exist_ok=True)
    stages = _Stages(console)
    with stages.timed("checkpoint") as say:
        directory = ensure_checkpoint(find_gguf(), cache_dir())
        say(f"{MODEL_NAME}, expanded from 4-bit GGUF to {directory}")
    with stages.timed("text") as say:
        tokens = token_batch(
            directory,
            python_reference(),
            num_sequences=settings.num_sequences,
            sequence_length=settings.sequence_length,
        )
        say(f"{tokens['input_ids'].size} tokens of the Python language reference")
    with ExitStack() as stack:
        with stages.timed("server start") as say:
            server = running_server(
                settings.output, num_workers=settings.num_workers, device=settings.device
            )
            address = stack.enter_context(server)
            say(f"{settings.num_workers} Ray workers behind {address}")
        client = stack.enter_context(Client(address))
        findings = _explore(client, directory, tokens, settings, stages)
    files = write_report(findings, settings.output)
    console.print()
    console.print(to_table(findings), highlight=False, soft_wrap=True)
    return files


def affordable(product_s: float, k: int) -> int:
    """Products to spend on k eigenpairs where one takes `product_s` seconds.

    Few enough for the demo to end in time, and never fewer than the ends of a spectrum need to
    begin to settle.
    """
    least = 2 * k + 8  # k of them are for the true residuals
    search_s = _SPECTRUM_S - k * _VERIFYING * product_s
    return max(least, min(_ENOUGH_PRODUCTS, k + int(search_s / product_s)))


def _explore(
    client: Client, directory: Path, tokens: dict[str, Any], settings: Settings, stages: _Stages
) -> Findings:
    with stages.timed("upload", spinner=False) as say:
        checkpoint = upload_with_bar(client, directory)
        batch = client.upload_batch(tokens)
        say(f"{checkpoint.size_bytes / 1e6:.0f} MB over gRPC, {checkpoint.num_parameters:,} params")
    H = client.operator(checkpoint, batch)
    with stages.timed("loss") as say:  # the first use of the model: the ranks load their shards
        loss = H.loss()
        say(f"{loss:.4f} nats per token")
    with stages.timed("gradient") as say:
        gradient = H.gradient()
        gradient_norm = gradient.norm()
        gradient.delete()
        say(f"norm {gradient_norm:.4f}")
    with stages.timed("H @ v") as say:
        probes = _probe(H)
        pair = f"u·Hv = {probes.u_dot_hv:.4f}, v·Hu = {probes.v_dot_hu:.4f}"
        say(f"{probes.product_s:.1f} s each; {pair}, apart by {probes.gap:.0e} of ‖Hv‖‖u‖")
    history: list[Snapshot] = []
    with stages.timed("eigsh", spinner=False) as say:
        job = H.eigsh(
            settings.k,
            "BE",
            tol=settings.tol,
            max_products=settings.max_products or affordable(probes.product_s, settings.k),
            num_lanczos_vectors=settings.num_lanczos_vectors,
        )
        try:
            show_events(_recorded(job.watch(), history), job.name, stages.console)
            result = job.result()
        except BaseException:
            job.cancel()  # or the server would finish the product and start another one
            raise
        say(f"{result.num_products} products, {result.outcome}")
    return Findings(
        model=MODEL_NAME,
        num_parameters=H.shape[0],
        num_sequences=settings.num_sequences,
        sequence_length=settings.sequence_length,
        num_ranks=settings.num_workers,
        dtype=str(H.dtype),
        loss=loss,
        gradient_norm=gradient_norm,
        probe_seed=_SEED_V,
        probe_norm=probes.probe_norm,
        product_norm=probes.product_norm,
        product_s=probes.product_s,
        u_dot_hv=probes.u_dot_hv,
        v_dot_hu=probes.v_dot_hu,
        eigenvalues=tuple(result.eigenvalues.tolist()),
        residuals=tuple(result.residuals.tolist()),
        intervals=tuple((low, high) for low, high in result.intervals.tolist()),
        claims=result.claims,
        num_products=result.num_products,
        num_completeness_products=result.completeness.num_products,
        outcome=result.outcome,
        symmetry_defect=result.symmetry_defect,
        ritz_values=tuple(result.ritz_values.tolist()),
        ritz_weights=tuple(result.ritz_weights.tolist()),
        history=tuple(history),
        stage_s=dict(stages.seconds),
        provenance={
            **result.provenance,
            "checkpoint": checkpoint.name,
            "data batch": batch.name,
            "input_ids sha256": hashlib.sha256(tokens["input_ids"].tobytes()).hexdigest(),
            "text": f"pydoc_data.topics of Python {platform.python_version()}",
            "micro_batch_size": str(H.micro_batch_size),
        },
    )


@final
@dataclass(frozen=True, kw_only=True)
class _Probes:
    """Figures from products with two independent Rademacher probes u and v."""

    probe_norm: float
    product_norm: float
    product_s: float
    u_dot_hv: float
    v_dot_hu: float

    @property
    def gap(self) -> float:
        """|u·Hv − v·Hu| over ‖Hv‖‖u‖; the probes have equal norms."""
        return abs(self.u_dot_hv - self.v_dot_hu) / (self.product_norm * self.probe_norm)


def _probe(H: Operator) -> _Probes:
    v, u = (H.random_vector(seed=seed) for seed in (_SEED_V, _SEED_U))
    hu = H @ u  # the first product finds out how to differentiate each kind of block
    began = time.perf_counter()
    hv = H @ v
    product_s = time.perf_counter() - began
    probes = _Probes(
        probe_norm=v.norm(),
        product_norm=hv.norm(),
        product_s=product_s,
        u_dot_hv=u.dot(hv),
        v_dot_hu=v.dot(hu),
    )
    for vector in (v, u, hv, hu):
        vector.delete()  # room for the Krylov basis
    return probes


def _recorded(events: Iterable[Event], history: list[Snapshot]) -> Iterator[Event]:
    for event in events:
        if event.type == "state" and event.state == "RUNNING":
            history.clear()  # a new attempt begins with its first product
        progress = event.progress
        if progress is not None and progress.stage in ("iterating", "completeness"):
            detail = progress.detail
            assert isinstance(detail, EigshProgress)
            history.append(
                Snapshot(
                    num_products=progress.num_products,
                    ritz_values=detail.ritz_values,
                    residual_estimates=detail.residual_estimates,
                )
            )
        yield event


@final
class _Stages:
    """Times the parts of the demo and prints a line when each has ended."""

    def __init__(self, console: Console):
        self.console = console
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, name: str, *, spinner: bool = True) -> Iterator[Callable[[str], None]]:
        """Time the block; it may say a phrase. A block that draws itself wants no spinner."""
        lines: list[str] = []
        began = time.perf_counter()
        with self.console.status(name) if spinner else nullcontext():
            yield lines.append
        self.seconds[name] = time.perf_counter() - began
        self.console.print(
            f"[bold green]✓[/] [bold]{name:<13}[/]"
            f"{duration(self.seconds[name]):>12}   {'; '.join(lines)}",
            highlight=False,
            soft_wrap=True,
        )
