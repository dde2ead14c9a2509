"""`make bench`: what a product costs on a real model, beside the gradient and reverse over reverse.

SmolLM2-135M, float32, this machine's CPU, one process. The contestants take turns, so that a
noisy machine slows them alike; ratios are medians of paired runs. Memory is the peak resident set
during a call, above what was resident before it.

    python -m benchmarks.products [--tokens 256] [--rounds 5] [--output benchmarks/results]
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from hvp_client.demo.checkpoint import cache_dir, ensure_checkpoint, find_gguf
from hvp_core.checkpoint import build_empty, load_shard, locate
from hvp_core.collective import Alone
from hvp_core.data import read_token_batch
from hvp_core.decoder import DecoderChain
from hvp_core.layout import Layout
from hvp_core.space import Space
from hvp_core.walk import Curvature
from safetensors.torch import save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM


@final
@dataclass
class Contestant:
    """One way to compute something, and what was measured of it."""

    name: str
    run: Callable[[], Any]
    seconds: list[float]
    peak_bytes: int = 0


def status(field: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def measured(contestant: Contestant) -> float:
    """Run once; note time and the peak resident set above the one before."""
    ctypes.CDLL(None).malloc_trim(0)  # what the last contestant freed is not this one's to use
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = status("VmRSS")
    began = time.perf_counter()
    result = contestant.run()
    seconds = time.perf_counter() - began
    contestant.peak_bytes = max(contestant.peak_bytes, status("VmHWM") - before)
    del result
    return seconds


def curvature_of(directory: Path, batch: Path) -> Curvature:
    """The product engine of one rank, as a worker builds it."""
    model = build_empty(directory, torch.float32)
    chain = DecoderChain(model, torch.float32, torch.device("cpu"))
    layout = Layout(chain.shapes, [block.parameters for block in chain.blocks], 1)
    space = Space(layout, Alone(), torch.float32, torch.device("cpu"))
    return Curvature(
        chain, space, load_shard(space, locate(model, directory)), read_token_batch(batch), 1
    )


def contestants(directory: Path, ids: torch.Tensor, batch: Path) -> tuple[list[Contestant], float]:
    """All of them on the same weights and tokens, and how far apart two answers are."""
    curvature = curvature_of(directory, batch)
    space = curvature.space
    probe = space.random(1, "rademacher")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    parameters = dict(model.named_parameters())
    flat = space.to_flat(probe)
    parts = flat.split([p.numel() for p in parameters.values()])
    tangents = [part.view_as(p) for part, p in zip(parts, parameters.values(), strict=True)]

    def plain_gradient() -> Any:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        return torch.autograd.grad(loss, list(parameters.values()))

    def reverse_over_reverse() -> Any:
        with sdpa_kernel(SDPBackend.MATH):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            gradient = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
            return torch.autograd.grad(gradient, list(parameters.values()), tangents)

    ours = space.to_flat(curvature.hvp([probe])[0])
    theirs = torch.cat([part.reshape(-1) for part in reverse_over_reverse()])
    difference = float(torch.linalg.vector_norm(ours - theirs) / torch.linalg.vector_norm(theirs))
    del ours, theirs
    return [
        Contestant("gradient, whole model, autograd", plain_gradient, []),
        Contestant("gradient, block by block", curvature.gradient, []),
        Contestant("HVP, block dual", lambda: curvature.hvp([probe]), []),
        Contestant("HVP, reverse over reverse", reverse_over_reverse, []),
    ], difference


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    directory = ensure_checkpoint(find_gguf(), cache_dir())
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(49152, (1, arguments.tokens), generator=generator)
    with tempfile.TemporaryDirectory() as folder:
        batch = Path(folder) / "batch.safetensors"
        save_file({"input_ids": ids}, batch)
        field, difference = contestants(directory, ids, batch)
    for contestant in field:
        measured(contestant)
        contestant.peak_bytes = 0
    for _ in range(arguments.rounds):
        for contestant in field:
            contestant.seconds.append(measured(contestant))
    base = field[0].seconds
    rows: list[dict[str, Any]] = []
    for contestant in field:
        ratios = [a / b for a, b in zip(contestant.seconds, base, strict=True)]
        rows.append(
            {
                "name": contestant.name,
                "median_seconds": statistics.median(contestant.seconds),
                "ratio_to_gradient": statistics.median(ratios),
                "peak_bytes_over_start": contestant.peak_bytes,
                "seconds": contestant.seconds,
            }
        )
    print(f"SmolLM2-135M float32, 1 x {arguments.tokens} tokens, {torch.get_num_threads()} threads")
    print(f"{'':34s}{'median s':>9s}{'x gradient':>12s}{'adds GB':>9s}")
    for row in rows:
        print(
            f"{row['name']:34s}{row['median_seconds']:9.2f}{row['ratio_to_gradient']:12.2f}"
            f"{row['peak_bytes_over_start'] / 1e9:9.2f}"
        )
    print(f"block dual against reverse over reverse: relative difference {difference:.1e}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / f"products-cpu-{arguments.tokens}.json"
    record = {
        "model": "SmolLM2-135M",
        "tokens": arguments.tokens,
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "difference_to_reverse_over_reverse": difference,
        "rows": rows,
    }
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
