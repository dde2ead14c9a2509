"""Attention kernels on a GPU: errors against float64, then times, beside torch's first order.

Rates count the tile products that the equations need (forward 6, dK and dV 12, dQ 9 for both
orders), of 2·b·h·s²·d/2 operations each for causal attention: work that a plan does twice does not
count twice.

    python -m benchmarks.attention --output DIR [--tune] [--skip-errors]
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from hvp_core.attention.flash import Flash
from hvp_core.attention.flash_launch import launch
from hvp_core.attention.flash_tiles import Card, Kernel, Mode, Pass, Plan, Tile
from hvp_core.attention.rule import Output, Pattern, Qkv
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from tests.core.flash_cases import Case, errors, found_values

Choice = dict[tuple[Kernel, Mode], Plan]
Launch = tuple[Any, tuple[int], dict[str, Any], dict[str, Any]]

PRODUCTS: dict[tuple[Kernel, Mode], int] = {
    ("forward", "primal"): 2,
    ("forward", "tangent"): 5,
    ("forward", "dual"): 6,
    ("keys", "primal"): 4,
    ("keys", "tangent"): 10,
    ("keys", "dual"): 12,
    ("queries", "primal"): 3,
    ("queries", "tangent"): 8,
    ("queries", "dual"): 9,
}
NAMES: dict[Kernel, str] = {
    "forward": "forward",
    "keys": "backward_keys",
    "queries": "backward_queries",
}


@final
@dataclass(frozen=True)
class Shape:
    """A causal problem in bfloat16, laid out as projections leave it: (b, s, h, d)."""

    b: int
    heads: int
    key_heads: int
    s: int
    d: int

    def __str__(self) -> str:
        return f"{self.b}x{self.heads}/{self.key_heads} hd{self.d} S{self.s}"

    @property
    def product(self) -> float:
        """Operations of one tile product."""
        return self.b * self.heads * self.s**2 * self.d

    def draw(self, device: str) -> tuple[Qkv, Qkv, Tensor, Tensor]:
        """(Q, K, V), their tangents, dO and ḋO."""

        def one(h: int) -> Tensor:
            shape = (self.b, self.s, h, self.d)
            x = torch.empty(shape, dtype=torch.bfloat16, device=device)
            return (x if device == "meta" else x.normal_()).transpose(1, 2)

        counts = (self.heads, self.key_heads, self.key_heads)
        x, x_dot = (Qkv(*map(one, counts)) for _ in range(2))
        return x, x_dot, one(self.heads), one(self.heads)


SHAPES = (Shape(1, 32, 4, 2048, 64), Shape(2, 32, 8, 8192, 128), Shape(1, 32, 32, 2048, 128))

CASES = {
    "causal": Case(heads=4, key_heads=2, s=260, t=260, d=64, e=64),
    "causal 128": Case(heads=4, key_heads=2, s=384, t=384, d=128, e=128),
    "full": Case(heads=2, key_heads=1, s=200, t=300, d=64, e=64, causal=False),
    "window": Case(heads=2, key_heads=2, s=300, t=333, d=64, e=64, window=70),
    "everything": Case(
        b=2, heads=4, key_heads=2, s=200, t=260, d=80, e=64, window=150, softcap=5.0,
        spans=((30, 260), (0, 200)),
    ),
    "rows without a key": Case(
        b=2, heads=2, s=150, t=150, d=64, e=64, spans=((150, 150), (40, 99))
    ),
    "width 256": Case(s=150, t=150, d=256, e=256),
    "biased keys": Case(s=300, t=300, d=64, e=64, common=2.0),
}  # fmt: skip
PRECISIONS: list[tuple[torch.dtype, str, list[str]]] = [
    (torch.bfloat16, "ieee", list(CASES)),
    (torch.float16, "ieee", ["causal", "causal 128", "everything"]),
    (torch.float32, "ieee", ["causal", "everything"]),
    (torch.float32, "tf32x3", ["causal"]),
    (torch.float32, "tf32", ["causal", "causal 128"]),
]


def tiles(*choices: Sequence[Any]) -> Iterator[Tile]:
    """All combinations."""
    return (Tile(*choice) for choice in itertools.product(*choices))


def sweep(kernel: Kernel, mode: Mode, width: int) -> list[Plan]:
    """What --tune tries.

    Left out is what a compiler report already condemns at width 128: 64 keys and 8 warps, where
    both warpgroups do the same products one after the other, and tiles beyond the shared memory.
    """
    both = (False, True)
    if kernel != "keys":
        found = list(tiles((64,), (32, 64), (4,), (1, 2), both))
        found += list(tiles((128,), (32, 64), (8,), (1, 2), both))
        if width == 64 or kernel == "forward":
            found += list(tiles((128,), (64, 128), (8,), (3,), both))
        if width == 64:
            found += list(tiles((128,), (32, 64), (4,), (2,), both))
        return [(Pass(tile, mode),) for tile in found]
    fused: list[Plan] = []
    if width == 64:
        found = list(tiles((32, 64), (64,), (4,), (1, 2), both))
        found += list(tiles((32, 64), (128,), (8,), (1, 2), both))
        fused = [(Pass(tile, mode),) for tile in found]
        found = found[8:]
    else:
        fused = [(Pass(tile, mode),) for tile in tiles((32,), (32,), (4,), (1, 2), both)]
        found = list(tiles((32, 64), (128,), (8,), (1, 2), both))
        found += list(tiles((64,), (64,), (4,), (1, 2), (True,)))
    halves: list[Plan] = []
    for tile in found:
        halves += [(Pass(tile, mode, keys=False),), (Pass(tile, mode, values=False),)]
        if mode == "dual":
            halves += [(Pass(tile, "primal"),), (Pass(tile, "tangent"),)]
    return fused + halves


def text(plan: Plan) -> str:
    def one(part: Pass) -> str:
        tile = part.tile
        what = "" if part.keys and part.values else " dK" if part.keys else " dV"
        limits = f" maxnreg {tile.registers}" if tile.registers else ""
        tma = " tma" if tile.descriptors else ""
        cut = f"({tile.queries},{tile.keys},{tile.warps}w,{tile.stages}st{tma}{limits})"
        return f"{part.mode}{what} {cut}"

    return " + ".join(map(one, plan))


def call(flash: Flash, kernel: Kernel, mode: Mode, shape: Shape, device: str) -> None:
    """Ask for a method that launches this kernel in this mode."""
    x, x_dot, o_bar, o_bar_dot = shape.draw(device)
    pattern = Pattern(scale=shape.d**-0.5, causal=True)
    lse = torch.zeros(x.q.shape[:3], dtype=torch.float32, device=device)
    # Logarithms of sums of the size that these inputs have: a time should not depend on infinities.
    lse += torch.arange(1, shape.s + 1, device=device).log() + 0.5
    y, y_dot = Output(o_bar, lse), Output(o_bar_dot, torch.zeros_like(lse))
    if kernel == "forward" and mode == "primal":
        flash.forward(x, pattern, None)
    elif kernel == "forward" and mode == "tangent":
        flash.tangent(x, x_dot, y, pattern, None)
    elif kernel == "forward":
        flash.dual(x, x_dot, pattern, None)
    elif mode == "primal":
        flash.backward(x, y, o_bar, pattern, None)
    elif mode == "tangent":
        flash.backward_tangent(x, x_dot, y, y_dot, o_bar, o_bar_dot, pattern, None)
    else:
        flash.backward_dual(x, x_dot, y, y_dot, o_bar, o_bar_dot, pattern, None)


def launches(
    kernel: Kernel, mode: Mode, shape: Shape, plan: Plan | None, card: Card, device: str
) -> list[Launch]:
    """The launches of a plan (None: the committed one), not yet made."""
    found: list[Launch] = []
    choice: Choice = {} if plan is None else {(kernel, mode): plan}
    flash = Flash(launcher=lambda *one: found.append(one), card=card, choose=choice)
    call(flash, kernel, mode, shape, device)
    return [one for one in found if one[0].__name__ == NAMES[kernel]]


# Compiling in other processes: results lie in Triton's cache on disk.


class _Target:
    """Stands for the driver where nothing runs: no process holds memory of the card."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def _enter(capability: int) -> None:
    from triton.runtime import driver

    torch.set_num_threads(1)
    driver.set_active(_Target(capability))


def _compile(*one: Any) -> None:
    kernel, grid, arguments, options = one
    kernel.warmup(grid=grid, **arguments, **options)


def compile_plan(kernel: Kernel, mode: Mode, shape: Shape, plan: Plan | None, card: Card) -> None:
    for one in launches(kernel, mode, shape, plan, card, "meta"):
        _compile(*one)


def compile_case(name: str, dtype: torch.dtype, precision: Any, card: Card) -> None:
    case = CASES[name]
    flash = Flash(input_precision=precision, launcher=_compile, card=card)
    found_values(flash, case, *case.draw(dtype, "meta"))


def compile_all(jobs: list[tuple[Callable[..., None], tuple[Any, ...]]], capability: int) -> None:
    began = time.perf_counter()
    failed = 0
    context = multiprocessing.get_context("spawn")
    workers = max(1, (os.cpu_count() or 2) - 1)
    with ProcessPoolExecutor(workers, context, _enter, (capability,)) as pool:
        futures = [pool.submit(run, *given) for run, given in jobs]
        for future in as_completed(futures):
            if error := future.exception():
                failed += 1
                if failed <= 5:
                    print(f"  did not compile: {str(error)[:300]}", flush=True)
    print(f"# compiled {len(jobs)} jobs in {time.perf_counter() - began:.0f} s, {failed} failed")


# Measuring.


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
    rate = PRODUCTS[kernel, mode] * shape.product / ms / 1e9
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
    rest = (y, y_dot, o_bar, o_bar_dot, pattern, None)
    calls: dict[str, tuple[int, Callable[[], object]]] = {
        "forward": (2, lambda: flash.forward(x, pattern, None)),
        "tangent": (5, lambda: flash.tangent(x, x_dot, y, pattern, None)),
        "dual": (6, lambda: flash.dual(x, x_dot, pattern, None)),
        "backward": (7, lambda: flash.backward(x, y, o_bar, pattern, None)),
        "backward_tangent": (18, lambda: flash.backward_tangent(x, x_dot, *rest)),
        "backward_dual": (21, lambda: flash.backward_dual(x, x_dot, *rest)),
    }
    for name, (products, run) in calls.items():
        ms = measure(run)
        print(f"  {name:17} {ms:9.3f} ms {products * shape.product / ms / 1e9:6.0f} TFLOP/s")


def report_host(card: Card) -> None:
    """Host time of a call: what a product without a CUDA graph pays for each attention."""
    x, x_dot, o_bar, o_bar_dot = Shape(1, 32, 4, 64, 64).draw("cuda")
    pattern, flash = Pattern(scale=0.125, causal=True), Flash(card=card)
    y, y_dot = flash.dual(x, x_dot, pattern, None)
    rest = (y, y_dot, o_bar, o_bar_dot, pattern, None)
    calls: dict[str, Callable[[], object]] = {
        "dual": lambda: flash.dual(x, x_dot, pattern, None),
        "backward_dual": lambda: flash.backward_dual(x, x_dot, *rest),
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
    parser.add_argument("--modes", nargs="+", default=["dual"], help="of the sweep")
    parser.add_argument("--seconds", type=float, default=280, help="when to stop a sweep")
    options = parser.parse_args()
    began = time.perf_counter()
    options.output.mkdir(parents=True, exist_ok=True)
    major, minor = torch.cuda.get_device_capability()
    properties = torch.cuda.get_device_properties(0)
    card = Card(hopper=major == 9, processors=properties.multi_processor_count)
    print(f"# {properties.name}, torch {torch.__version__}, python {sys.version.split()[0]}")
    print(f"# {card}")

    jobs: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
    if not options.skip_errors:
        for dtype, precision, names in PRECISIONS:
            jobs += [(compile_case, (name, dtype, precision, card)) for name in names]
    sweeps = [
        (kernel, mode, shape, sweep(kernel, mode, shape.d))
        for shape in SHAPES[:2]
        for kernel in NAMES
        for mode in options.modes
        if options.tune
    ]
    jobs += [(compile_plan, (*key, shape, None, card)) for shape in SHAPES for key in PRODUCTS]
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
    for shape in SHAPES:
        print(f"# {shape}")
        report_torch(shape)
        for kernel, mode in PRODUCTS:
            try:
                rows.append(time_plan(kernel, mode, shape, None, card))
            except Exception as error:  # a benchmark reports and goes on
                print(f"  {kernel:8} {mode:8} {type(error).__name__}: {str(error)[:200]}")
                continue
            print(f"  {kernel:8} {mode:8}{rows[-1]}", flush=True)
        report_whole(shape, card)
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
