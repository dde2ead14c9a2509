"""Attention kernels on a GPU: errors against float64, then times, beside torch's first order.

Rates count the tile products that the equations need (forward 6, dK and dV 12, dQ 9 for both
orders), of 2·b·h·s²·d/2 operations each for causal attention: work that a plan does twice does not
count twice.

    python -m benchmarks.attention --output DIR [--tune] [--skip-errors]
        [--kernels keys] [--modes dual tangent] [--shape hd128] [--sweep-only]
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from hvp_core.attention.flash import Flash
from hvp_core.attention.flash_launch import launch
from hvp_core.attention.flash_tiles import Card, Kernel, Mode, Plan
from hvp_core.attention.rule import Pattern, Point
from torch.nn.functional import scaled_dot_product_attention as sdpa

from benchmarks.attention_plans import (
    CASES,
    NAMES,
    PRECISIONS,
    PRODUCTS,
    SHAPES,
    Job,
    Shape,
    compile_all,
    compile_case,
    compile_plan,
    launches,
    needed,
    sweep,
    text,
)
from tests.core.flash_cases import errors


def measure(run: Callable[[], Any]) -> float:
    """Median milliseconds."""
    from triton.testing import do_bench

    return float(do_bench(run, warmup=10, rep=60, return_mode="median"))


@final
@dataclass
class Row:
    """One measurement of one plan."""

    shape: str
    kernel: Kernel
    mode: Mode
    plan: str
    ms: float
    tflops: float
    built: str

    def __str__(self) -> str:
        return f"{self.ms:9.3f} ms {self.tflops:6.0f} TFLOP/s  {self.plan}  [{self.built}]"


def time_plan(kernel: Kernel, mode: Mode, shape: Shape, plan: Plan | None, card: Card) -> Row:
    ms, built, shown = 0.0, [], []
    for one in launches(kernel, mode, shape, plan, card, "cuda"):
        compiled = one[0][one[1]](**one[2], **one[3])
        torch.cuda.synchronize()
        built.append(
            f"{compiled.n_regs} regs {compiled.n_spills} spills {compiled.metadata.shared} B"
            + (f" parts {one[2]['parts']}" if "parts" in one[2] else "")
        )
        arguments = one[2]
        shown.append(
            f"({arguments['BM']},{arguments['BN']},{one[3]['num_warps']}w,{one[3]['num_stages']}st"
            + (" tma)" if arguments["TMA"] else ")")
        )
        ms += measure(lambda one=one: launch(*one))  # type: ignore[misc]
    rate = needed(kernel, mode, plan) * shape.product / ms / 1e9
    name = " + ".join(shown) if plan is None else text(plan)
    return Row(str(shape), kernel, mode, name, ms, rate, "; ".join(built))


def report_errors() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for dtype, precision, names in PRECISIONS:
        for name in names:
            try:
                found = errors(CASES[name], dtype, "cuda", precision)  # type: ignore[arg-type]
            except Exception as error:  # a benchmark reports and goes on
                print(f"  {dtype} {precision} {name}: {type(error).__name__} {str(error)[:300]}")
                continue
            rows.append({"dtype": str(dtype), "precision": precision, "case": name, **found})
            fused = " ".join(f"{k[6:]} {v:.0e}" for k, v in found.items() if k[:6] == "fused ")
            alone = max(v for k, v in found.items() if k[:6] == "alone ")
            label = f"{str(dtype)[6:]} {precision} {name}"
            print(
                f"  {label:34} {fused} | separate methods ≤ {alone:.0e}"
                f" | L {found['lse']:.0e} L̇ {found['lse_dot']:.0e}",
                flush=True,
            )
    return rows


def report_torch(shape: Shape) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    x, _, o_bar, _ = shape.draw("cuda")
    q, k, v = (one.clone().requires_grad_() for one in x)
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        try:
            with sdpa_kernel(backend):
                out = sdpa(q, k, v, is_causal=True, enable_gqa=True)
                with torch.no_grad():
                    forward = measure(lambda: sdpa(q, k, v, is_causal=True, enable_gqa=True))
            backward = measure(
                lambda out=out: torch.autograd.grad(  # type: ignore[misc]
                    out, (q, k, v), o_bar, retain_graph=True
                )
            )
        except RuntimeError as error:
            print(f"  torch {backend.name}: {str(error)[:100]}")
            continue
        print(
            f"  torch {backend.name:16} forward {forward:.3f} ms"
            f" {2 * shape.product / forward / 1e9:.0f} TFLOP/s,"
            f" backward {backward:.3f} ms {5 * shape.product / backward / 1e9:.0f} TFLOP/s",
            flush=True,
        )


def report_whole(shape: Shape, card: Card) -> None:
    """Whole methods with everything around the kernels: row sums, folds, allocations."""
    x, x_dot, o_bar, o_bar_dot = shape.draw("cuda")
    pattern, flash = Pattern(scale=shape.d**-0.5, causal=True), Flash(card=card)
    y, y_dot = flash.dual(x, x_dot, pattern, None)
    at, dot = Point(x, y, o_bar), Point(x_dot, y_dot, o_bar_dot)
    calls: dict[str, tuple[int, Callable[[], object]]] = {
        "forward": (2, lambda: flash.forward(x, pattern, None)),
        "tangent": (5, lambda: flash.tangents(x, [x_dot], y, pattern, None)),
        "tangents of 2": (9, lambda: flash.tangents(x, [x_dot] * 2, y, pattern, None)),
        "dual": (6, lambda: flash.dual(x, x_dot, pattern, None)),
        "backward": (7, lambda: flash.backward(at, pattern, None)),
        "backward_tangent": (18, lambda: flash.backward_tangents(at, [dot], pattern, None)),
        "… of 2": (32, lambda: flash.backward_tangents(at, [dot] * 2, pattern, None)),
        "backward_dual": (21, lambda: flash.backward_dual(at, dot, pattern, None)),
    }
    for name, (products, run) in calls.items():
        ms = measure(run)
        print(f"  {name:17} {ms:9.3f} ms {products * shape.product / ms / 1e9:6.0f} TFLOP/s")


def report_host(card: Card) -> None:
    """Host time of a call: what a product without a CUDA graph pays for each attention."""
    x, x_dot, o_bar, o_bar_dot = Shape(1, 32, 4, 64, 64).draw("cuda")
    pattern, flash = Pattern(scale=0.125, causal=True), Flash(card=card)
    y, y_dot = flash.dual(x, x_dot, pattern, None)
    at, dot = Point(x, y, o_bar), Point(x_dot, y_dot, o_bar_dot)
    calls: dict[str, Callable[[], object]] = {
        "dual": lambda: flash.dual(x, x_dot, pattern, None),
        "backward_dual": lambda: flash.backward_dual(at, dot, pattern, None),
    }
    for name, run in calls.items():
        run()
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(100):
            run()
        seconds = (time.perf_counter() - began) / 100
        torch.cuda.synchronize()
        print(f"# {name} takes {seconds * 1e6:.0f} µs on the host")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--skip-errors", action="store_true")
    parser.add_argument("--kernels", nargs="+", default=list(NAMES), choices=list(NAMES))
    parser.add_argument("--modes", nargs="+", default=["dual"], help="of the sweep")
    parser.add_argument("--shape", default="", help="only shapes whose name has this")
    parser.add_argument("--sweep-only", action="store_true", help="nothing but the sweep")
    parser.add_argument("--seconds", type=float, default=280, help="when to stop a sweep")
    options = parser.parse_args()
    began = time.perf_counter()
    options.output.mkdir(parents=True, exist_ok=True)
    major, minor = torch.cuda.get_device_capability()
    properties = torch.cuda.get_device_properties(0)
    card = Card(hopper=major == 9, processors=properties.multi_processor_count)
    print(f"# {properties.name}, torch {torch.__version__}, python {sys.version.split()[0]}")
    print(f"# {card}")

    shapes = [shape for shape in SHAPES if options.shape in str(shape)]
    committed = [
        (kernel, mode)
        for kernel, mode in PRODUCTS
        if kernel in options.kernels and not options.sweep_only
    ]
    jobs: list[Job] = []
    if not options.skip_errors:
        for dtype, precision, names in PRECISIONS:
            jobs += [(compile_case, (name, dtype, precision, card)) for name in names]
    sweeps = [
        (kernel, mode, shape, sweep(kernel, mode, shape.d))
        for shape in shapes
        if shape in SHAPES[:2]
        for kernel in options.kernels
        for mode in options.modes
        if options.tune
    ]
    jobs += [(compile_plan, (*key, shape, None, card)) for shape in shapes for key in committed]
    jobs += [
        (compile_plan, (kernel, mode, shape, plan, card))
        for kernel, mode, shape, plans in sweeps
        for plan in plans
    ]
    compile_all(jobs, major * 10 + minor)

    result: dict[str, Any] = {"device": properties.name, "rows": []}
    if not options.skip_errors:
        print("# relative errors against float64")
        result["errors"] = report_errors()
    rows: list[Row] = []
    for shape in shapes if committed else ():
        print(f"# {shape}")
        report_torch(shape)
        for kernel, mode in committed:
            try:
                rows.append(time_plan(kernel, mode, shape, None, card))
            except Exception as error:  # a benchmark reports and goes on
                print(f"  {kernel:8} {mode:8} {type(error).__name__}: {str(error)[:200]}")
                continue
            print(f"  {kernel:8} {mode:8}{rows[-1]}", flush=True)
        report_whole(shape, card)
    if committed:
        report_host(card)
    for kernel, mode, shape, plans in sweeps:
        tried: list[Row] = []
        for number, plan in enumerate(plans):
            if time.perf_counter() - began > options.seconds:
                print(f"  out of time after {number} of {len(plans)}")
                break
            try:
                tried.append(time_plan(kernel, mode, shape, plan, card))
            except Exception as error:  # most often: does not fit the card
                result.setdefault("failed", []).append([text(plan), str(error)[:200]])
        rows += tried
        groups = itertools.groupby(sorted(tried, key=part_of), key=part_of)
        for part, members in groups:
            print(f"# sweep {shape} {kernel} {mode}: {part}")
            for row in sorted(members, key=lambda row: row.ms)[:6]:
                print(f"  {row}", flush=True)
    result["rows"] = [dataclasses.asdict(row) for row in rows]
    (options.output / "attention.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"# done in {time.perf_counter() - began:.0f} s")


def part_of(row: Row) -> str:
    """What a plan computes, without its tiles: rows to compare with each other."""
    return row.plan.split(" (")[0]


if __name__ == "__main__":
    main()
