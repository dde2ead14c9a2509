"""Attention and its tangent in Triton kernels, for NVIDIA GPUs from Ampere on."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import final

import torch
from torch import Tensor

from hvp_core.attention.flash_first_order import FirstOrder
from hvp_core.attention.flash_launch import (
    InputPrecision,
    Launcher,
    Problem,
    Runner,
    Sides,
    capability,
    contiguous_rows,
    has_triton,
    kernels,
    launch,
    rows_first,
)
from hvp_core.attention.flash_tiles import Card, Kernel, Mode, Pass, Plan, Tile
from hvp_core.attention.rule import Attention, Output, Pattern, Point, Qkv, Span

_WIDEST = 256


@final
class Flash(Attention):
    """Tiles of S in registers, never S; no sum depends on scheduling, but for cuDNN's gradients.

    For bfloat16, float16 and float32, with products accumulated in float32; head dimensions from 1
    to 256, padded to a power of two inside the kernels. A group of query heads is summed into dK
    and dV in registers where other work keeps all of the card busy to the end, else in a buffer of
    at most one dK and dV for each query head.

    Args:
        input_precision: Arithmetic for products of float32 operands; products of 16-bit operands
            are always exact.
        tune: Time a short list of tiles the first time a kernel meets a class of shapes, instead of
            taking the committed choice. Results may then differ in rounding between machines.
        launcher: Runs a kernel; another launcher can compile without running.
        card: The device to plan for; None asks the device.
        choose: Plans to use in place of the committed ones.
        first_order: Let cuDNN compute outputs and first derivatives alone where it is faster, as
            torch's own attention does; its gradients are left out where torch is told to use
            deterministic algorithms.
    """

    together = 2

    def __init__(
        self,
        *,
        input_precision: InputPrecision = "ieee",
        tune: bool = False,
        launcher: Launcher = launch,
        card: Card | None = None,
        choose: Mapping[tuple[Kernel, Mode], Plan] | None = None,
        first_order: bool = True,
    ) -> None:
        self._first_order = FirstOrder() if first_order else None
        self._runner = Runner(input_precision, tune, launcher, card, choose or {})

    def supports(self, x: Qkv, pattern: Pattern, span: Span | None) -> str | None:
        """See Attention."""
        width = max(x.q.shape[-1], x.v.shape[-1])
        if not has_triton():
            return "needs triton, which is not installed"
        if x.q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            return f"in {str(x.q.dtype).removeprefix('torch.')} has no kernels"
        if x.k.dtype != x.q.dtype or x.v.dtype != x.q.dtype:
            return "of queries, keys and values of different types has no kernels"
        if width > _WIDEST:
            return f"with a head dimension of {width} has no kernels: at most {_WIDEST}"
        if pattern.scale <= 0 or (pattern.softcap is not None and pattern.softcap <= 0):
            return "with a scale or a cap that is not positive has no kernels"
        if x.q.device.type == "cuda":
            if capability(x.q.device) < (8, 0):
                return "on a GPU older than Ampere has no kernels"
        elif os.environ.get("TRITON_INTERPRET") != "1":
            return f"on {x.q.device.type} has no kernels"
        return None

    def forward(self, x: Qkv, pattern: Pattern, span: Span | None) -> Output:
        """(O, L). Cost: 2 tile products."""
        if self._first_order and (found := self._first_order.forward(x, pattern, span)):
            return found
        y = _new_output(x)
        self._forward("primal", [x], [y], pattern, span)
        return y

    def tangents(
        self, x: Qkv, x_dots: Sequence[Qkv], y: Output, pattern: Pattern, span: Span | None
    ) -> list[Output]:
        """(Ȯ, L̇) along each direction, given (O, L).

        Cost: 5 tile products for each; 9 for two where they share a launch.
        """
        y_dots = [_new_output(x) for _ in x_dots]
        self._forward("tangent", [x, *x_dots], [y, *y_dots], pattern, span)
        return y_dots

    def dual(
        self, x: Qkv, x_dot: Qkv, pattern: Pattern, span: Span | None
    ) -> tuple[Output, Output]:
        """((O, L), (Ȯ, L̇)). Cost: 6 tile products."""
        y, y_dot = _new_output(x), _new_output(x)
        self._forward("dual", [x, x_dot], [y, y_dot], pattern, span)
        return y, y_dot

    def backward(self, at: Point, pattern: Pattern, span: Span | None) -> Qkv:
        """(dQ, dK, dV). Cost: 7 tile products, in two kernels."""
        if self._first_order and (first := self._first_order.backward(at, pattern, span)):
            return first
        return self._backward("primal", [at], pattern, span)[0]

    def backward_tangents(
        self, at: Point, dots: Sequence[Point], pattern: Pattern, span: Span | None
    ) -> list[Qkv]:
        """(ḋQ, ḋK, ḋV) alone, along each direction.

        Cost, in two kernels: 18 tile products for each; 32 for two where they share launches.
        """
        found = self._backward("tangent", [at, *dots], pattern, span)
        return [found[probe] for probe in range(1, 1 + len(dots))]

    def backward_dual(
        self, at: Point, dot: Point, pattern: Pattern, span: Span | None
    ) -> tuple[Qkv, Qkv]:
        """((dQ, dK, dV), (ḋQ, ḋK, ḋV)). Cost: 21 tile products, in two kernels."""
        found = self._backward("dual", [at, dot], pattern, span)
        return found[0], found[1]

    # By side: 0 for the point itself, then the tangents of each probe ---------------------------

    def _forward(
        self, mode: Mode, xs: list[Qkv], ys: list[Output], pattern: Pattern, span: Span | None
    ) -> None:
        problem, num_probes = Problem.of(xs[0], pattern, span), len(xs) - 1
        reads = {side: _reads(x) for side, x in enumerate(xs)}
        writes = {side: y._asdict() for side, y in enumerate(ys)}

        def execute(plan: Plan) -> None:
            for one in plan:
                for probes in one.launches(num_probes):
                    run = partial(
                        self._runner.run, kernels().forward, one, probes, problem, reads, writes
                    )
                    self._runner.fitted(one, probes, problem, run)

        self._runner.with_plan("forward", mode, problem, num_probes, execute)

    def _backward(
        self, mode: Mode, points: list[Point], pattern: Pattern, span: Span | None
    ) -> dict[int, Qkv]:
        """The derivatives on each side that `mode` asks for."""
        problem, num_probes = Problem.of(points[0].x, pattern, span), len(points) - 1
        reads = {
            side: {**_reads(point.x), "o_bar": contiguous_rows(point.o_bar)}
            for side, point in enumerate(points)
        }
        deltas = {side: torch.empty_like(points[0].y.lse) for side in range(len(points))}
        sums: Sides = {
            side: {"o": point.y.o, "o_bar": reads[side]["o_bar"], "delta": deltas[side]}
            for side, point in enumerate(points)
        }
        for probe in range(1, len(points)):
            self._runner.row_sums(sums, [probe], problem)
        if num_probes == 0:
            self._runner.row_sums(sums, [], problem)
        given: Sides = {
            side: {"lse": point.y.lse, "delta": deltas[side]} for side, point in enumerate(points)
        }
        queries = partial(self._queries, num_probes, reads, given, problem)
        keys = partial(self._keys, num_probes, reads, given, problem)
        dqs = self._runner.with_plan("queries", mode, problem, num_probes, queries)
        others = self._runner.with_plan("keys", mode, problem, num_probes, keys)
        return {side: Qkv(dq, others["dk"][side], others["dv"][side]) for side, dq in dqs.items()}

    def _queries(
        self, num_probes: int, reads: Sides, given: Sides, p: Problem, plan: Plan
    ) -> dict[int, Tensor]:
        """DQ on each side, as far as the plan computes it."""
        found: dict[int, Tensor] = {}
        for one in plan:
            for probes in one.launches(num_probes):
                new = {
                    side: rows_first(p.b, p.heads, p.s, p.d, reads[0]["q"])
                    for side in one.makes(probes)
                }
                arguments = _merged(given, {side: {"dq": dq} for side, dq in new.items()})
                run = partial(
                    self._runner.run, kernels().backward_queries, one, probes, p, reads, arguments
                )
                self._runner.fitted(one, probes, p, run)
                found |= new
        return found

    def _keys(
        self, num_probes: int, reads: Sides, given: Sides, p: Problem, plan: Plan
    ) -> dict[str, dict[int, Tensor]]:
        """DK and dV on each side, as far as the plan computes them."""
        found: dict[str, dict[int, Tensor]] = {"dk": {}, "dv": {}}
        for one in plan:
            widths = {"dk": p.d} if one.keys else {}
            widths |= {"dv": p.e} if one.values else {}
            for probes in one.launches(num_probes):
                sides = one.makes(probes)

                def run(
                    tile: Tile,
                    one: Pass = one,
                    probes: tuple[int, ...] = probes,
                    sides: tuple[int, ...] = sides,
                    widths: dict[str, int] = widths,
                ) -> dict[str, dict[int, Tensor]]:
                    parts = self._runner.parts(p, probes, tile)
                    # All sides of a result in one buffer, for one sum over the parts.
                    stacks = {
                        name: reads[0]["k"].new_empty(
                            len(sides), p.b, p.t, p.key_heads, parts, width
                        )
                        for name, width in widths.items()
                    }
                    arguments = given
                    for name, stack in stacks.items():
                        places = zip(sides, _heads(stack.flatten(3, 4)), strict=True)
                        arguments = _merged(arguments, {side: {name: x} for side, x in places})
                    self._runner.run_keys(one, probes, p, reads, arguments, parts, tile)
                    return {
                        name: dict(zip(sides, _heads(_folded(stack)), strict=True))
                        for name, stack in stacks.items()
                    }

                for name, new in self._runner.fitted(one, probes, p, run).items():
                    found[name] |= new
        return found


def _folded(stack: Tensor) -> Tensor:
    """(n, b, t, h, parts, width) summed over parts."""
    return stack.squeeze(4) if stack.shape[4] == 1 else stack.sum(4)


def _heads(stack: Tensor) -> tuple[Tensor, ...]:
    """(b, h, t, width) each, of a stack of (b, t, h, width)."""
    return stack.transpose(2, 3).unbind()


def _merged(one: Sides, other: Sides) -> Sides:
    """The tensors of both, by side and name."""
    return {side: {**values, **other.get(side, {})} for side, values in one.items()}


def _new_output(x: Qkv) -> Output:
    b, h, s, _ = x.q.shape
    lse = torch.empty(b, h, s, dtype=torch.float32, device=x.q.device)
    return Output(rows_first(b, h, s, x.v.shape[-1], x.q), lse)


def _reads(x: Qkv) -> dict[str, Tensor]:
    return {name: contiguous_rows(each) for name, each in x._asdict().items()}
