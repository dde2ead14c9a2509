"""Attention and its tangent in Triton kernels, for NVIDIA GPUs from Ampere on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from typing import final

import torch
from torch import Tensor

from hvp_core.attention.flash_first_order import FirstOrder
from hvp_core.attention.flash_launch import (
    InputPrecision,
    Launcher,
    Problem,
    Reads,
    Runner,
    capability,
    contiguous_rows,
    has_triton,
    kernels,
    launch,
    rows_first,
)
from hvp_core.attention.flash_tiles import Card, Kernel, Mode, Pass, Plan, Tile
from hvp_core.attention.rule import Attention, Output, Pattern, Qkv, Span

_WIDEST = 256


@final
class Flash(Attention):
    """Tiles of S in registers, never S; no sum depends on scheduling, but for cuDNN's gradients.

    For bfloat16, float16 and float32, with products accumulated in float32; head dimensions from 1
    to 256, padded to a power of two inside the kernels. A group of query heads is summed into dK
    and dV in registers where other work keeps all of the card busy to the end, else in a buffer of
    at most one dK and dV for each query head.

    Args:
        input_precision: How float32 operands are multiplied; 16-bit ones always are exactly.
        tune: Time a short list of tiles the first time a kernel meets a class of shapes, instead of
            taking the committed choice. Results may then differ in rounding between machines.
        launcher: What runs a kernel; another one can compile without running.
        card: The device to plan for; None asks the device.
        choose: Launches to use in place of the committed ones.
        first_order: Let cuDNN compute outputs and first derivatives alone where it is faster, as
            torch's own attention does; its gradients are left out where torch is told to use
            deterministic algorithms.
    """

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
        """None if it can, else why not, in words that finish "attention …"."""
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
        self._forward("primal", x, None, y, None, pattern, span)
        return y

    def tangent(self, x: Qkv, x_dot: Qkv, y: Output, pattern: Pattern, span: Span | None) -> Output:
        """(Ȯ, L̇), given (O, L). Cost: 5 tile products."""
        y_dot = _new_output(x)
        self._forward("tangent", x, x_dot, y, y_dot, pattern, span)
        return y_dot

    def dual(
        self, x: Qkv, x_dot: Qkv, pattern: Pattern, span: Span | None
    ) -> tuple[Output, Output]:
        """((O, L), (Ȯ, L̇)). Cost: 6 tile products."""
        y, y_dot = _new_output(x), _new_output(x)
        self._forward("dual", x, x_dot, y, y_dot, pattern, span)
        return y, y_dot

    def backward(
        self, x: Qkv, y: Output, o_bar: Tensor, pattern: Pattern, span: Span | None
    ) -> Qkv:
        """(dQ, dK, dV). Cost: 7 tile products, in two kernels."""
        if self._first_order and (first := self._first_order.backward(x, y, o_bar, pattern, span)):
            return first
        reads = _reads(x, None, o_bar, None)
        found = self._backward("primal", reads, y, None, Problem.of(x, pattern, span))
        return Qkv(found["dq"], found["dk"], found["dv"])

    def backward_tangent(
        self,
        x: Qkv,
        x_dot: Qkv,
        y: Output,
        y_dot: Output,
        o_bar: Tensor,
        o_bar_dot: Tensor,
        pattern: Pattern,
        span: Span | None,
    ) -> Qkv:
        """(ḋQ, ḋK, ḋV) alone. Cost: 18 tile products, in two kernels."""
        reads = _reads(x, x_dot, o_bar, o_bar_dot)
        found = self._backward("tangent", reads, y, y_dot, Problem.of(x, pattern, span))
        return Qkv(found["dq_dot"], found["dk_dot"], found["dv_dot"])

    def backward_dual(
        self,
        x: Qkv,
        x_dot: Qkv,
        y: Output,
        y_dot: Output,
        o_bar: Tensor,
        o_bar_dot: Tensor,
        pattern: Pattern,
        span: Span | None,
    ) -> tuple[Qkv, Qkv]:
        """((dQ, dK, dV), (ḋQ, ḋK, ḋV)). Cost: 21 tile products, in two kernels."""
        reads = _reads(x, x_dot, o_bar, o_bar_dot)
        found = self._backward("dual", reads, y, y_dot, Problem.of(x, pattern, span))
        first = Qkv(found["dq"], found["dk"], found["dv"])
        return first, Qkv(found["dq_dot"], found["dk_dot"], found["dv_dot"])

    def _forward(
        self,
        mode: Mode,
        x: Qkv,
        x_dot: Qkv | None,
        y: Output,
        y_dot: Output | None,
        pattern: Pattern,
        span: Span | None,
    ) -> None:
        problem = Problem.of(x, pattern, span)
        reads = _reads(x, x_dot, None, None)
        o_dot, lse_dot = y_dot or (None, None)
        given = {"o": y.o, "o_dot": o_dot, "lse": y.lse, "lse_dot": lse_dot}

        def execute(plan: Plan) -> None:
            for one in plan:
                run = partial(self._runner.run, kernels().forward, one, problem, reads, given)
                self._runner.fitted(one, problem, run)

        self._runner.with_plan("forward", mode, problem, execute)

    def _backward(
        self, mode: Mode, reads: Reads, y: Output, y_dot: Output | None, problem: Problem
    ) -> dict[str, Tensor]:
        """What `mode` asks for of dq, dk, dv and dq_dot, dk_dot, dv_dot."""
        dual = mode != "primal"
        o_dot, lse_dot = y_dot or (None, None)
        delta = torch.empty_like(y.lse)
        delta_dot = torch.empty_like(y.lse) if dual else None
        sums = {"delta": delta, "delta_dot": delta_dot}
        cotangents = {"o_bar": reads.o_bar, "o_bar_dot": reads.o_bar_dot}
        outputs = {"o": y.o, "o_dot": o_dot}
        self._runner.row_sums(outputs | cotangents | sums, problem, dual=dual)
        given = {"lse": y.lse, "lse_dot": lse_dot, **sums}
        queries = partial(self._queries, reads, given, problem)
        keys = partial(self._keys, reads, given, problem)
        return self._runner.with_plan("queries", mode, problem, queries) | self._runner.with_plan(
            "keys", mode, problem, keys
        )

    def _queries(
        self, reads: Reads, given: dict[str, Tensor | None], p: Problem, plan: Plan
    ) -> dict[str, Tensor]:
        """Dq and dq_dot, as far as the plan computes them."""
        found: dict[str, Tensor] = {}
        for one in plan:
            new = {name: rows_first(p.b, p.heads, p.s, p.d, reads.q) for name in one.outputs("dq")}
            arguments = {"dq": None, "dq_dot": None, **given, **new}
            run = partial(self._runner.run, kernels().backward_queries, one, p, reads, arguments)
            self._runner.fitted(one, p, run)
            found |= new
        return found

    def _keys(
        self, reads: Reads, given: dict[str, Tensor | None], p: Problem, plan: Plan
    ) -> dict[str, Tensor]:
        """dk, dv, dk_dot and dv_dot, as far as the plan computes them."""
        found: dict[str, Tensor] = {}
        for one in plan:

            def run(tile: Tile, one: Pass = one) -> dict[str, Tensor]:
                parts = self._runner.parts(p, one, tile)
                # A result and its tangent in one buffer, for one sum over the parts.
                stacks = {
                    tuple(names): reads.k.new_empty(len(names), p.b, p.t, p.key_heads, parts, width)
                    for names, width in ((one.outputs("dk"), p.d), (one.outputs("dv"), p.e))
                    if names
                }
                arguments = {**dict.fromkeys(("dk", "dk_dot", "dv", "dv_dot")), **given}
                for names, stack in stacks.items():
                    arguments.update(zip(names, _heads(stack.flatten(3, 4)), strict=True))
                self._runner.run_keys(one, p, reads, arguments, parts, tile)
                new: dict[str, Tensor] = {}
                for names, stack in stacks.items():
                    folded = stack.squeeze(4) if parts == 1 else stack.sum(4)
                    new.update(zip(names, _heads(folded), strict=True))
                return new

            found |= self._runner.fitted(one, p, run)
        return found


def _heads(stack: Tensor) -> tuple[Tensor, ...]:
    """(b, h, t, width) each, of a stack of (b, t, h, width)."""
    return stack.transpose(2, 3).unbind()


def _new_output(x: Qkv) -> Output:
    b, h, s, _ = x.q.shape
    lse = torch.empty(b, h, s, dtype=torch.float32, device=x.q.device)
    return Output(rows_first(b, h, s, x.v.shape[-1], x.q), lse)


def _reads(x: Qkv, x_dot: Qkv | None, o_bar: Tensor | None, o_bar_dot: Tensor | None) -> Reads:
    tangents = x_dot or (None, None, None)
    optional = (
        None if one is None else contiguous_rows(one) for one in (*tangents, o_bar, o_bar_dot)
    )
    return Reads(*map(contiguous_rows, x), *optional)
