"""Attention with its dual rule, tile by tile, in plain torch: the route on a CPU.

Time goes where it must, into matrix products, because of six choices:

- A piece is the key heads whose tiles one batched product computes; the queries that share a key
  head are rows of the same tile, so keys and values are never repeated.
- Operands are packed once, side by side: Ṡ = [Q̇, Q]·[K, K̇]ᵀ is one product with twice the
  contraction, and [dV, its part of ḋV] = Pᵀ·[dO, ḋO] one product with twice the width.
- A row's statistic is one more column: [−L, Q]·[1, K]ᵀ = S − L, and Ṡ − L̇, dP − D, ḋP − Ḋ
  likewise. The shift costs 1/d of a product instead of a pass over the tile.
- Tiles stay in cache, in buffers used again for each of them. Masks touch only the columns of a
  tile that an edge crosses; tiles beyond an edge are never computed.
- Threads take whole tiles and meet once, instead of sharing each operation.
- Scores of tiles are in base 2, because torch's exp2 takes half the time of its exp: s and ṡ are
  S and Ṡ over ln 2, and ln 2 comes back as a factor of products that have one anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Lock
from typing import NamedTuple, final

import torch
from torch import Tensor

from hvp_core.attention import team
from hvp_core.attention.pieces import (
    LN2,
    Job,
    Piece,
    Scratch,
    Tile,
    jobs,
    work_dtype,
    worth_sharing,
)
from hvp_core.attention.rule import Attention, Output, Pattern, Qkv, Span


@final
class Tiled(Attention):
    """Every dimension, stride, device and floating dtype; sums in float32, or in float64 for it."""

    def supports(self, x: Qkv, pattern: Pattern, span: Span | None) -> str | None:
        """None for floating-point tensors."""
        return None if x.q.is_floating_point() else f"is not differentiable in {x.q.dtype}"

    def forward(self, x: Qkv, pattern: Pattern, span: Span | None) -> Output:
        """(O, L) in one sweep: 2 tile products."""
        return _forward([x], pattern, span)[0]

    def tangent(self, x: Qkv, x_dot: Qkv, y: Output, pattern: Pattern, span: Span | None) -> Output:
        """(Ȯ, L̇), given (O, L), in one sweep: 5 tile products."""
        return _tangent(x, x_dot, y, pattern, span)

    def dual(
        self, x: Qkv, x_dot: Qkv, pattern: Pattern, span: Span | None
    ) -> tuple[Output, Output]:
        """((O, L), (Ȯ, L̇)) in one sweep: 6 tile products."""
        y, y_dot = _forward([x, x_dot], pattern, span)
        return y, y_dot

    def backward(
        self, x: Qkv, y: Output, o_bar: Tensor, pattern: Pattern, span: Span | None
    ) -> Qkv:
        """(dQ, dK, dV) in one sweep: 5 tile products."""
        return _backward([_Point(x, y, o_bar)], pattern, span, primal=True)[0]

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
        """(ḋQ, ḋK, ḋV) alone in one sweep: 12 tile products."""
        points = [_Point(x, y, o_bar), _Point(x_dot, y_dot, o_bar_dot)]
        return _backward(points, pattern, span, primal=False)[0]

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
        """((dQ, dK, dV), (ḋQ, ḋK, ḋV)) in one sweep: 15 tile products."""
        points = [_Point(x, y, o_bar), _Point(x_dot, y_dot, o_bar_dot)]
        first, second = _backward(points, pattern, span, primal=True)
        return first, second


class _Point(NamedTuple):
    """Where a backward pass is taken, or the direction along which it moves."""

    x: Qkv
    y: Output
    o_bar: Tensor


@torch.no_grad()
def _forward(points: list[Qkv], pattern: Pattern, span: Span | None) -> list[Output]:
    """O and L of points[0] and, if there is a points[1], their tangents along it."""
    x, e = points[0], points[0].v.shape[-1]
    outputs = [_output(x) for _ in points]

    def work(job: Job, scratch: Scratch) -> None:
        piece = job.piece
        keys = piece.pack_keys(points, scratch)
        values = scratch.pack("v", *(piece.of_keys(point.v) for point in points))
        for tile in job.tiles():
            rows, rows_dot = _pack_queries(points, (0.0, 0.0), piece, tile, scratch)
            o = scratch("o", *rows.shape[:2], values.shape[-1]).zero_()
            top = rows.new_full((*rows.shape[:2], 1), torch.finfo(rows.dtype).min)
            total, slope = torch.zeros_like(top), torch.zeros_like(top)
            for start, stop in tile.steps:
                p, s_dot, _ = _scores(rows, rows_dot, keys[:, start:stop], pattern, scratch)
                v = values[:, start:stop]
                piece.mask_(p, tile, start, -torch.inf)
                # A row of −∞ keeps its finite top: 2^(−∞ − top) = 0, where −∞ + ∞ is no number.
                peak = torch.maximum(p.amax(-1, keepdim=True), top)
                decay = (top - peak).exp2_()
                top = peak
                p.sub_(top).exp2_()
                total.mul_(decay).add_(p.sum(-1, keepdim=True))
                if start > tile.steps[0][0]:
                    o.mul_(decay)
                o.baddbmm_(p, v)
                if s_dot is not None:
                    s_dot.mul_(p)
                    slope.mul_(decay).add_(s_dot.sum(-1, keepdim=True))
                    o[..., e:].baddbmm_(s_dot, v[..., :e], alpha=LN2)
            top.add_(total.log2()).mul_(LN2)
            total.masked_fill_(total == 0, 1)
            o.div_(total)
            if len(points) > 1:
                o[..., e:].addcmul_(slope.div_(total).mul_(LN2), o[..., :e], value=-1)
            for y, part, lse in zip(outputs, o.split(e, -1), (top, slope), strict=False):
                piece.store(tile, y.o, part)
                piece.store(tile, y.lse.unsqueeze(-1), lse)

    _run(x, pattern, span, work)
    return outputs


@torch.no_grad()
def _tangent(x: Qkv, x_dot: Qkv, y: Output, pattern: Pattern, span: Span | None) -> Output:
    """With L given, P is known at once."""
    y_dot, e = _output(x), x.v.shape[-1]
    shift = _shift(y.lse)

    def work(job: Job, scratch: Scratch) -> None:
        piece = job.piece
        keys = piece.pack_keys([x, x_dot], scratch)
        values = scratch.pack("v", piece.of_keys(x.v), piece.of_keys(x_dot.v))
        for tile in job.tiles():
            shifts = (piece.of_queries(shift, tile), 0.0)
            rows, rows_dot = _pack_queries([x, x_dot], shifts, piece, tile, scratch)
            o_dot = scratch("o_dot", *rows.shape[:2], e).zero_()
            slope = rows.new_zeros((*rows.shape[:2], 1))
            for start, stop in tile.steps:
                p, s_dot, _ = _scores(rows, rows_dot, keys[:, start:stop], pattern, scratch)
                assert s_dot is not None
                piece.mask_(p.exp2_(), tile, start, 0.0)
                slope.add_(s_dot.mul_(p).sum(-1, keepdim=True))
                v = values[:, start:stop]
                o_dot.baddbmm_(p, v[..., e:]).baddbmm_(s_dot, v[..., :e], alpha=LN2)
            slope.mul_(LN2)
            o_dot.addcmul_(slope, scratch.pack("o", piece.of_queries(y.o, tile)), value=-1)
            piece.store(tile, y_dot.o, o_dot)
            piece.store(tile, y_dot.lse.unsqueeze(-1), slope)

    _run(x, pattern, span, work)
    return y_dot


@torch.no_grad()
def _backward(
    points: list[_Point], pattern: Pattern, span: Span | None, *, primal: bool
) -> list[Qkv]:
    """The derivatives at points[0] if `primal`, and their tangents if there is a points[1]."""
    x, d, e = points[0].x, points[0].x.q.shape[-1], points[0].x.v.shape[-1]
    inputs = [point.x for point in points]
    outputs = [_gradients(x, span) for _ in points[0 if primal else 1 :]]
    # Columns of [1, K, K̇, 1], [−L, Q, Q̇] and of [−D, dO, ḋO] that meet dS, its transpose and Pᵀ.
    of_d = slice(1 if primal else 1 + d, 1 + len(points) * d)
    of_e = slice(1 if primal else 1 + e, 1 + len(points) * e)
    shifts = [_shift(points[0].y.lse), *(point.y.lse.unsqueeze(-1) / -LN2 for point in points[1:])]
    shares = _Shares()

    def work(job: Job, scratch: Scratch) -> None:
        piece = job.piece
        keys = piece.pack_keys(inputs, scratch)
        values = scratch.pack("v", 1.0, *(piece.of_keys(v) for _, _, v in inputs), 1.0)
        own = scratch if job.parts == 1 else Scratch(x.q)
        dk_all = own("dk", *keys.shape[:2], len(outputs) * d).zero_()
        dv_all = own("dv", *keys.shape[:2], len(outputs) * e).zero_()
        for tile in job.tiles():
            columns = [piece.of_queries(shift, tile) for shift in shifts]
            rows, rows_dot = _pack_queries(inputs, columns, piece, tile, scratch)
            bars, bars_dot = _pack_bars(points, piece, tile, scratch)
            dq = scratch("dq", *rows.shape[:2], len(outputs) * d).zero_()
            for start, stop in tile.steps:
                k, v = keys[:, start:stop], values[:, start:stop]
                dk, dv = dk_all[:, start:stop], dv_all[:, start:stop]
                p, s_dot, cap = _scores(rows, rows_dot, k, pattern, scratch)
                piece.mask_(p.exp2_(), tile, start, 0.0)
                dv.baddbmm_(p.mT, bars[..., of_e])
                ds = torch.bmm(bars[..., : 1 + e], v[..., : 1 + e].mT, out=scratch("ds", *p.shape))
                ds_dot = None
                if s_dot is not None and bars_dot is not None:
                    ds_dot = scratch("ds_dot", *p.shape)
                    torch.bmm(bars_dot, v[..., 1:].mT, out=ds_dot)
                    ds_dot.addcmul_(s_dot, ds, value=LN2).mul_(p)
                    dv[..., -e:].baddbmm_(s_dot.mul_(p).mT, bars[..., 1 : 1 + e], alpha=LN2)
                ds.mul_(p)
                if cap is not None:
                    cap.pull_back_(ds, ds_dot)
                dq.baddbmm_(ds, k[..., of_d])
                dk.baddbmm_(ds.mT, rows[..., of_d])
                if ds_dot is not None:
                    dq[..., -d:].baddbmm_(ds_dot, k[..., 1 : 1 + d])
                    dk[..., -d:].baddbmm_(ds_dot.mT, rows[..., 1 : 1 + d])
            dq.mul_(piece.scale / piece.factor)
            for x_bar, part in zip(outputs, dq.split(d, -1), strict=True):
                piece.store(tile, x_bar.q, part)
        total = shares.add(job, dk_all, dv_all)
        if total is None:
            return
        dk_all, dv_all = total
        dk_all.mul_(piece.scale)
        for x_bar, dk, dv in zip(outputs, dk_all.split(d, -1), dv_all.split(e, -1), strict=True):
            piece.of_keys(x_bar.k).copy_(dk.view(piece.of_keys(x_bar.k).shape))
            piece.of_keys(x_bar.v).copy_(dv.view(piece.of_keys(x_bar.v).shape))

    _run(x, pattern, span, work)
    return outputs


def _run(x: Qkv, pattern: Pattern, span: Span | None, work: Callable[[Job, Scratch], None]) -> None:
    workers = team.size() if worth_sharing(x) else 1
    found = jobs(x, pattern, span, workers)
    team.run(found, work, lambda: Scratch(x.q), workers)


class _Shares:
    """Sums over the keys' side of a piece, to which several jobs contribute."""

    def __init__(self) -> None:
        self._held: dict[int, dict[int, tuple[Tensor, Tensor]]] = {}
        self._lock = Lock()

    def add(self, job: Job, dk: Tensor, dv: Tensor) -> tuple[Tensor, Tensor] | None:
        """The piece's total for the job that completes it, in the order of the jobs' numbers."""
        with self._lock:
            held = self._held.setdefault(id(job.piece), {})
            held[job.part] = dk, dv
            if len(held) < job.parts:
                return None
        dk, dv = held[0]
        for part in range(1, job.parts):
            dk.add_(held[part][0])
            dv.add_(held[part][1])
        return dk, dv


class _Cap(NamedTuple):
    """Of s = c·tanh(u): s' and, with a tangent, tanh(u)·u̇, so that ṡ' = −2 tanh(u)·u̇·s'."""

    slope: Tensor
    bend: Tensor | None

    def pull_back_(self, ds: Tensor, ds_dot: Tensor | None) -> None:
        """DU = dS·s' and its tangent ḋS·s' + dS·ṡ'."""
        if ds_dot is not None and self.bend is not None:
            ds_dot.addcmul_(self.bend, ds, value=-2).mul_(self.slope)
        ds.mul_(self.slope)


def _scores(
    rows: Tensor, rows_dot: Tensor | None, k: Tensor, pattern: Pattern, scratch: Scratch
) -> tuple[Tensor, Tensor | None, _Cap | None]:
    """S and Ṡ of a tile over ln 2, each with the rows' shift added.

    Args:
        rows: [shift, Q].
        rows_dot: [Q̇, Q, shift of Ṡ].
        k: [1, K, K̇, 1], or without the last two.
        pattern: For its cap.
        scratch: Holds the results until the next tile.
    """
    width = 1 + ((k.shape[-1] - 2) // 2 if rows_dot is not None else k.shape[-1] - 1)
    shape = (*rows.shape[:2], k.shape[1])
    q, first = rows[..., :width], k[..., :width]
    if pattern.softcap is None:
        s = torch.bmm(q, first.mT, out=scratch("s", *shape))
        if rows_dot is None:
            return s, None, None
        return s, torch.bmm(rows_dot, k[..., 1:].mT, out=scratch("s_dot", *shape)), None
    # The shift comes after the cap, so its column stays out of the product.
    s = torch.bmm(q[..., 1:], first[..., 1:].mT, out=scratch("s", *shape)).tanh_()
    slope = torch.mul(s, s, out=scratch("slope", *shape)).sub_(1).mul_(-pattern.softcap)
    bend = s_dot = None
    if rows_dot is not None:
        s_dot = torch.bmm(rows_dot[..., :-1], k[..., 1:-1].mT, out=scratch("s_dot", *shape))
        bend = torch.mul(s, s_dot, out=scratch("bend", *shape))
        torch.addcmul(rows_dot[..., -1:], s_dot, slope, value=1 / LN2, out=s_dot)
    s.mul_(pattern.softcap / LN2).add_(rows[..., :1])
    return s, s_dot, _Cap(slope, bend)


def _pack_queries(
    points: list[Qkv],
    shifts: Sequence[Tensor | float],
    piece: Piece,
    tile: Tile,
    scratch: Scratch,
) -> tuple[Tensor, Tensor | None]:
    """[shift, Q, Q̇], which also multiplies dSᵀ, and [Q̇, Q, shift of Ṡ]."""
    parts = [piece.of_queries(point.q, tile) for point in points]
    rows = scratch.pack("q", shifts[0], *parts)
    if len(points) == 1:
        return rows, None
    return rows, scratch.pack("q_dot", parts[1], parts[0], shifts[1])


def _pack_bars(
    points: list[_Point], piece: Piece, tile: Tile, scratch: Scratch
) -> tuple[Tensor, Tensor | None]:
    """[−D, dO, ḋO] and [ḋO, dO, −Ḋ] of a tile."""
    bars = [piece.of_queries(point.o_bar, tile) for point in points]
    rows = scratch.pack("bars", 0.0, *bars)
    outs = scratch.pack("outs", *(piece.of_queries(point.y.o, tile) for point in points))
    e = bars[0].shape[-1]
    bar, out = rows[..., 1 : 1 + e], outs[..., :e]
    product = torch.mul(bar, out, out=scratch("product", *out.shape))
    rows[..., 0] = -product.sum(-1)
    if len(points) == 1:
        return rows, None
    product.zero_().addcmul_(rows[..., 1 + e :], out).addcmul_(bar, outs[..., e:])
    rows_dot = scratch.pack("bars_dot", bars[1], bars[0], 0.0)
    rows_dot[..., -1] = -product.sum(-1)
    return rows, rows_dot


def _shift(lse: Tensor) -> Tensor:
    """−L over ln 2 as a column; 0 for rows that look nowhere, whose scores are masked anyway."""
    return (lse / -LN2).masked_fill_(lse == -torch.inf, 0).unsqueeze(-1)


def _output(x: Qkv) -> Output:
    (b, h, s, _), e = x.q.shape, x.v.shape[-1]
    lse = torch.empty(b, h, s, dtype=work_dtype(x.q), device=x.q.device)
    return Output(x.q.new_empty(b, s, h, e).transpose(1, 2), lse)


def _gradients(x: Qkv, span: Span | None) -> Qkv:
    """Results shaped as x, in (b, s, h, d) memory; zero where a span leaves keys out."""
    q, k, v = (part.new_empty(part.transpose(1, 2).shape).transpose(1, 2) for part in x)
    return Qkv(q, k, v) if span is None else Qkv(q, k.zero_(), v.zero_())
