"""What the attention benchmark runs: shapes, cases, plans; and their compiling in parallel."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, final

import torch
from hvp_core.attention.flash import Flash
from hvp_core.attention.flash_tiles import Card, Kernel, Mode, Pass, Plan, Tile, plans
from hvp_core.attention.rule import Output, Pattern, Point, Qkv
from torch import Tensor

from tests.core.flash_cases import Case, compiled, shared_bytes, target

Choice = dict[tuple[Kernel, Mode], Plan]
Job = tuple[Callable[..., None], tuple[Any, ...]]
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


SHAPES = (
    Shape(1, 32, 4, 2048, 64),
    Shape(2, 32, 8, 8192, 128),
    Shape(1, 32, 4, 8192, 64),
    Shape(1, 32, 32, 2048, 128),
)

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


def sweep(kernel: Kernel, mode: Mode, width: int) -> list[Plan]:
    """What --tune tries: 2 stages of tiles whose accumulators can fit the registers."""
    wide = {"forward": ((64, 32, 4), (128, 64, 8)), "queries": ((64, 32, 4), (128, 32, 8))}
    cuts = [(64, 64, 4), (128, 64, 8)] if width == 64 else [*wide.get(kernel, ())]
    if width == 64 and kernel == "forward":
        cuts += [(64, 128, 4), (128, 64, 4), (128, 128, 8)]
    if mode == "primal":
        cuts += [(128, 128, 8)] if kernel == "forward" else [(128, 64, 8)]
    if kernel == "keys":
        cuts = [(32, 128, 8), (64, 128, 8), (64, 64, 4)]
        cuts += [(32, 64, 4)] if width == 64 else []
    found = [Tile(m, n, warps, 2, tma) for m, n, warps in cuts for tma in (False, True)]
    if kernel == "forward" and mode == "primal":
        found.append(Tile(128, 64, 8, 3))
    whole: list[Plan] = [(Pass(tile, mode),) for tile in found]
    if mode == "tangent":
        card = Card(hopper=True, processors=1)
        offered = plans(kernel, mode, width, card, wide=False, exact=True, several=True)
        whole += [plan for plan in offered if plan[0].probes > 1]
    if kernel != "keys" or mode != "dual":
        return whole
    # Four accumulators of width 128 are more than the registers.
    some = whole if width == 64 else []
    for tile in found:
        some += [(Pass(tile, mode, keys=False),), (Pass(tile, mode, values=False),)]
        some += [(Pass(tile, "primal"),), (Pass(tile, "tangent"),)]
    return some


def needed(kernel: Kernel, mode: Mode, plan: Plan | None) -> int:
    """Tile products of a plan that computes everything, or of the one part that there is."""
    if probes_of(plan) > 1:
        shared, own = {"forward": (1, 4), "keys": (2, 8), "queries": (2, 6)}[kernel]
        return shared + own * probes_of(plan)
    if plan is None or len(plan) > 1 or kernel != "keys":
        return PRODUCTS[kernel, mode]
    (one,) = plan
    scores, gradient = {"primal": (1, 1), "tangent": (3, 2), "dual": (3, 3)}[one.mode]
    return scores + one.values * gradient + one.keys * (scores + gradient)


def probes_of(plan: Plan | None) -> int:
    """How many tangents it computes at once."""
    return max([one.probes for one in plan or ()], default=1)


def text(plan: Plan) -> str:
    def one(part: Pass) -> str:
        tile = part.tile
        what = "" if part.keys and part.values else " dK" if part.keys else " dV"
        limits = f" maxnreg {tile.registers}" if tile.registers else ""
        tma = " tma" if tile.descriptors else ""
        cut = f"({tile.queries},{tile.keys},{tile.warps}w,{tile.stages}st{tma}{limits})"
        several = f" of {part.probes}" if part.probes > 1 else ""
        return f"{part.mode}{several}{what} {cut}"

    return " + ".join(map(one, plan))


def call(flash: Flash, kernel: Kernel, mode: Mode, probes: int, shape: Shape, device: str) -> None:
    """Ask for a method that launches this kernel in this mode."""
    x, x_dot, o_bar, o_bar_dot = shape.draw(device)
    pattern = Pattern(scale=shape.d**-0.5, causal=True)
    lse = torch.zeros(x.q.shape[:3], dtype=torch.float32, device=device)
    # Logarithms of sums of the size that these inputs have: a time should not depend on infinities.
    lse += torch.arange(1, shape.s + 1, device=device).log() + 0.5
    y, y_dot = Output(o_bar, lse), Output(o_bar_dot, torch.zeros_like(lse))
    at, dot = Point(x, y, o_bar), Point(x_dot, y_dot, o_bar_dot)
    if kernel == "forward" and mode == "primal":
        flash.forward(x, pattern, None)
    elif kernel == "forward" and mode == "tangent":
        flash.tangents(x, [x_dot] * probes, y, pattern, None)
    elif kernel == "forward":
        flash.dual(x, x_dot, pattern, None)
    elif mode == "primal":
        flash.backward(at, pattern, None)
    elif mode == "tangent":
        flash.backward_tangents(at, [dot] * probes, pattern, None)
    else:
        flash.backward_dual(at, dot, pattern, None)


def launches(
    kernel: Kernel, mode: Mode, shape: Shape, plan: Plan | None, card: Card, device: str
) -> list[Launch]:
    """The launches of a plan (None: the committed one), not yet made."""
    found: list[Launch] = []
    choice: Choice = {} if plan is None else {(kernel, mode): plan}
    keep = found.append
    flash = Flash(launcher=lambda *one: keep(one), card=card, choose=choice, first_order=False)
    with suppress(KeyError):  # part of a plan leaves some results missing
        call(flash, kernel, mode, probes_of(plan), shape, device)
    return [one for one in found if one[0].__name__ == NAMES[kernel]]


# Compiling in other processes: results lie in Triton's cache on disk.


def compile_plan(kernel: Kernel, mode: Mode, shape: Shape, plan: Plan | None, card: Card) -> None:
    for one in launches(kernel, mode, shape, plan, card, "meta"):
        compiled(*one)


def compile_case(name: str, dtype: torch.dtype, precision: Any, card: Card) -> None:
    shared_bytes(CASES[name], dtype, precision, card)


def compile_all(jobs: list[Job], capability: int) -> None:
    began = time.perf_counter()
    failed = 0
    context = multiprocessing.get_context("spawn")
    workers = max(1, (os.cpu_count() or 2) - 1)
    with ProcessPoolExecutor(workers, context, target, (capability,)) as pool:
        futures = [pool.submit(run, *given) for run, given in jobs]
        for future in as_completed(futures):
            if error := future.exception():
                failed += 1
                if failed <= 5:
                    print(
                        f"  did not compile: {type(error).__name__} {str(error)[:300]}", flush=True
                    )
    print(f"# compiled {len(jobs)} jobs in {time.perf_counter() - began:.0f} s, {failed} failed")
