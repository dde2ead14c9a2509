"""Attention with its dual rule, tile by tile, in plain torch: the route on a CPU.

Time goes into matrix products, where it must go, because of seven choices:

- A piece is the key heads whose tiles one batched product computes; the queries that share a key
  head are rows of the same tile, so keys and values are never repeated.
- Operands are packed once, side by side: Ṡ = [Q̇, Q]·[K, K̇]ᵀ is one product with twice the
  contraction, and [dV, its part of ḋV] = Pᵀ·[dO, ḋO] one product with twice the width.
- A row's statistic is one more column: [−L, Q]·[1, K]ᵀ = S − L, and Ṡ − L̇, dP − D, ḋP − Ḋ
  likewise. The shift costs 1/d of a product instead of a pass over the tile.
- What has no tangent in it (P, dP, dS) is formed once for all probes whose tangents are asked for.
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
from hvp_core.attention.rule import Attention, Output, Pattern, Point, Qkv, Span


@final
class Tiled(Attention):
    """Supports every dimension, stride, device and floating dtype.

    Sums are in float32; in float64 for float64 inputs.
    """

    together = 4  # what is left to share beyond that is a twelfth of the work

    def supports(self, x: Qkv, pattern: Pattern, span: Span | None) -> str | None:
        """None for floating-point tensors."""
        return None if x.q.is_floating_point() else f"is not differentiable in {x.q.dtype}"

    def forward(self, x: Qkv, pattern: Pattern, span: Span | None) -> Output:
        """(O, L) in one sweep: 2 tile products."""
        return _forward([x], pattern, span)[0]

    def tangents(
        self, x: Qkv, x_dots: Sequence[Qkv], y: Output, pattern: Pattern, span: Span | None
    ) -> list[Output]:
        """(Ȯ, L̇) along each direction, given (O, L), in one sweep: 1 tile product, 4 for each."""
        return _tangents(x, x_dots, y, pattern, span)

    def dual(
        self, x: Qkv, x_dot: Qkv, pattern: Pattern, span: Span | None
    ) -> tuple[Output, Output]:
        """((O, L), (Ȯ, L̇)) in one sweep: 6 tile products."""
        y, y_dot = _forward([x, x_dot], pattern, span)
        return y, y_dot

    def backward(self, at: Point, pattern: Pattern, span: Span | None) -> Qkv:
        """(dQ, dK, dV) in one sweep: 5 tile products."""
        return _backward(at, [], pattern, span, primal=True)[0]

    def backward_tangents(
        self, at: Point, dots: Sequence[Point], pattern: Pattern, span: Span | None
    ) -> list[Qkv]:
        """(ḋQ, ḋK, ḋV) alone, along each direction, in one sweep: 2 tile products, 10 for each."""
        return _backward(at, dots, pattern, span, primal=False)

    def backward_dual(
        self, at: Point, dot: Point, pattern: Pattern, span: Span | None
    ) -> tuple[Qkv, Qkv]:
        """((dQ, dK, dV), (ḋQ, ḋK, ḋV)) in one sweep: 15 tile products."""
        first, second = _backward(at, [dot], pattern, span, primal=True)
        return first, second


@torch.no_grad()
def _forward(points: list[Qkv], pattern: Pattern, span: Span | None) -> list[Output]:
    """O and L of points[0] and, if there is a points[1], their tangents along it."""
    x, d, e = points[0], points[0].q.shape[-1], points[0].v.shape[-1]
    outputs = [_output(x) for _ in points]

    def work(job: Job, scratch: Scratch) -> None:
        piece = job.piece
        keys = piece.pack_keys("k", points, scratch)
        values = scratch.pack("v", *(piece.of_keys(point.v) for point in points))
        for tile in job.tiles():
            rows = _pack_queries("q", 0.0, points, piece, tile, scratch)
            along = [_pack_dots("q_dot", dot, x, 0.0, piece, tile, scratch) for dot in points[1:]]
            o = scratch("o", *rows.shape[:2], values.shape[-1]).zero_()
            top = rows.new_full((*rows.shape[:2], 1), torch.finfo(rows.dtype).min)
            total, slope = torch.zeros_like(top), torch.zeros_like(top)
            for start, stop in tile.steps:
                k, v = keys[:, start:stop], values[:, start:stop]
                p, cap = _scores(rows[..., : 1 + d], k[..., : 1 + d], pattern, scratch)
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
                for rows_dot in along:
                    s_dot = _scores_dot(rows_dot, k, cap, scratch).mul_(p)
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
def _tangents(
    x: Qkv, x_dots: Sequence[Qkv], y: Output, pattern: Pattern, span: Span | None
) -> list[Output]:
    """Ȯ and L̇ along each direction; with L given, P is known at once."""
    y_dots, d, e = [_output(x) for _ in x_dots], x.q.shape[-1], x.v.shape[-1]
    shift = _shift(y.lse)

    def work(job: Job, scratch: Scratch) -> None:
        piece = job.piece
        keys = [piece.pack_keys(f"k{n}", [x, dot], scratch) for n, dot in enumerate(x_dots)]
        values = scratch.pack("v", *(piece.of_keys(each.v) for each in (x, *x_dots)))
        for tile in job.tiles():
            rows = _pack_queries("q", piece.of_queries(shift, tile), [x], piece, tile, scratch)
            along = [
                _pack_dots(f"q_dot{n}", dot, x, 0.0, piece, tile, scratch)
                for n, dot in enumerate(x_dots)
            ]
            o_dots = scratch("o_dot", *rows.shape[:2], len(x_dots) * e).zero_()
            slopes = [rows.new_zeros((*rows.shape[:2], 1)) for _ in x_dots]
            for start, stop in tile.steps:
                p, cap = _scores(rows, keys[0][:, start:stop, : 1 + d], pattern, scratch)
                piece.mask_(p.exp2_(), tile, start, 0.0)
                v = values[:, start:stop]
                o_dots.baddbmm_(p, v[..., e:])
                for n, slope in enumerate(slopes):
                    s_dot = _scores_dot(along[n], keys[n][:, start:stop], cap, scratch)
                    slope.add_(s_dot.mul_(p).sum(-1, keepdim=True))
                    o_dots[..., n * e : (n + 1) * e].baddbmm_(s_dot, v[..., :e], alpha=LN2)
            o = scratch.pack("o", piece.of_queries(y.o, tile))
            for y_dot, o_dot, slope in zip(y_dots, o_dots.split(e, -1), slopes, strict=True):
                o_dot.addcmul_(slope.mul_(LN2), o, value=-1)
                piece.store(tile, y_dot.o, o_dot)
                piece.store(tile, y_dot.lse.unsqueeze(-1), slope)

    _run(x, pattern, span, work)
    return y_dots


@torch.no_grad()
def _backward(
    at: Point, dots: Sequence[Point], pattern: Pattern, span: Span | None, *, primal: bool
) -> list[Qkv]:
    """The derivatives at a point if `primal`, and then their tangents along each direction."""
    assert not (primal and len(dots) > 1)
    x, d, e = at.x, at.x.q.shape[-1], at.x.v.shape[-1]
    outputs = [_gradients(x, span) for _ in range(primal + len(dots))]
    # The point by itself, or packed beside each direction.
    pairs = [[at, dot] for dot in dots] or [[at]]
    # What meets dS and its transpose: columns of [1, K, K̇, 1] and [−L, Q, Q̇]; and what meets Pᵀ:
    # columns of [−D, dO, ḋO]. Then the columns of the results they go to.
    first, last = 0 if primal else 1, len(pairs[0])
    of_d, of_e = slice(1 + first * d, 1 + last * d), slice(1 + first * e, 1 + last * e)
    to_d = [slice(n * d, (n + last - first) * d) for n in range(len(pairs))]
    to_e = [slice(n * e, (n + last - first) * e) for n in range(len(pairs))]
    shift, shift_dots = _shift(at.y.lse), [dot.y.lse.unsqueeze(-1) / -LN2 for dot in dots]
    shares = _Shares()

    def work(job: Job, scratch: Scratch) -> None:
        piece = job.piece
        keys, values = [], []
        for n, pair in enumerate(pairs):
            keys.append(piece.pack_keys(f"k{n}", [point.x for point in pair], scratch))
            vs = (piece.of_keys(point.x.v) for point in pair)
            values.append(scratch.pack(f"v{n}", 1.0, *vs, 1.0))
        own = scratch if job.parts == 1 else Scratch(x.q)
        dk_all = own("dk", *keys[0].shape[:2], len(outputs) * d).zero_()
        dv_all = own("dv", *keys[0].shape[:2], len(outputs) * e).zero_()
        for tile in job.tiles():
            rows, bars, along = [], [], []
            for n, pair in enumerate(pairs):
                column, inputs = piece.of_queries(shift, tile), [point.x for point in pair]
                rows.append(_pack_queries(f"q{n}", column, inputs, piece, tile, scratch))
                bars.append(_pack_bars(n, pair, piece, tile, scratch))
            for n, (dot, shift_dot) in enumerate(zip(dots, shift_dots, strict=True)):
                column = piece.of_queries(shift_dot, tile)
                along.append(_pack_dots(f"q_dot{n}", dot.x, x, column, piece, tile, scratch))
            dq_all = scratch("dq", *rows[0].shape[:2], len(outputs) * d).zero_()
            for start, stop in tile.steps:
                k, v = keys[0][:, start:stop], values[0][:, start:stop]
                p, cap = _scores(rows[0][..., : 1 + d], k[..., : 1 + d], pattern, scratch)
                piece.mask_(p.exp2_(), tile, start, 0.0)
                ds = scratch("ds", *p.shape)
                torch.bmm(bars[0][0][..., : 1 + e], v[..., : 1 + e].mT, out=ds).mul_(p)
                # What a cap leaves of dS; its tangent needs the whole.
                du = ds if cap is None else torch.mul(ds, cap.slope, out=scratch("du", *p.shape))
                for n in range(len(pairs)):
                    k, v = keys[n][:, start:stop], values[n][:, start:stop]
                    dq = dq_all[..., to_d[n]]
                    dk, dv = dk_all[:, start:stop, to_d[n]], dv_all[:, start:stop, to_e[n]]
                    q, (bar, bar_dot) = rows[n], bars[n]
                    dv.baddbmm_(p.mT, bar[..., of_e])
                    dq.baddbmm_(du, k[..., of_d])
                    dk.baddbmm_(du.mT, q[..., of_d])
                    if bar_dot is None:
                        continue
                    s_dot = _scores_dot(along[n], k, cap, scratch)
                    ds_dot = scratch("ds_dot", *p.shape)
                    torch.bmm(bar_dot, v[..., 1:].mT, out=ds_dot)
                    ds_dot.mul_(p).addcmul_(s_dot, ds, value=LN2)
                    dv[..., -e:].baddbmm_(s_dot.mul_(p).mT, bar[..., 1 : 1 + e], alpha=LN2)
                    if cap is not None:
                        cap.pull_back_(ds, ds_dot)
                    dq[..., -d:].baddbmm_(ds_dot, k[..., 1 : 1 + d])
                    dk[..., -d:].baddbmm_(ds_dot.mT, q[..., 1 : 1 + d])
            dq_all.mul_(piece.scale / piece.factor)
            for x_bar, part in zip(outputs, dq_all.split(d, -1), strict=True):
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
    """A cap s = c·tanh(u): tanh(u), s' and, with a tangent, tanh(u)·u̇; ṡ' = −2 tanh(u)·u̇·s'."""

    tanh: Tensor
    slope: Tensor
    bend: Tensor

    def pull_back_(self, ds: Tensor, ds_dot: Tensor) -> None:
        """The tangent ḋS·s' + dS·ṡ' of dU = dS·s'."""
        ds_dot.addcmul_(self.bend, ds, value=-2).mul_(self.slope)


def _scores(
    rows: Tensor, k: Tensor, pattern: Pattern, scratch: Scratch
) -> tuple[Tensor, _Cap | None]:
    """S of a tile over ln 2, with the rows' shift added.

    Args:
        rows: [shift, Q].
        k: [1, K].
        pattern: For its cap.
        scratch: Holds the results until the next tile.
    """
    s = scratch("s", *rows.shape[:2], k.shape[1])
    if pattern.softcap is None:
        return torch.bmm(rows, k.mT, out=s), None
    # The shift comes after the cap, so its column stays out of the product.
    tanh, slope, bend = (scratch(name, *s.shape) for name in ("tanh", "slope", "bend"))
    torch.bmm(rows[..., 1:], k[..., 1:].mT, out=tanh).tanh_()
    torch.mul(tanh, tanh, out=slope).sub_(1).mul_(-pattern.softcap)
    torch.mul(tanh, pattern.softcap / LN2, out=s).add_(rows[..., :1])
    return s, _Cap(tanh, slope, bend)


def _scores_dot(rows_dot: Tensor, k: Tensor, cap: _Cap | None, scratch: Scratch) -> Tensor:
    """Ṡ of a tile over ln 2, with the rows' shift added; leaves the cap its bend.

    Args:
        rows_dot: [Q̇, Q, shift].
        k: [1, K, K̇, 1].
        cap: The cap of the scores, as `_scores` gave it.
        scratch: Holds the results until the next direction.
    """
    s_dot = scratch("s_dot", *rows_dot.shape[:2], k.shape[1])
    if cap is None:
        return torch.bmm(rows_dot, k[..., 1:].mT, out=s_dot)
    torch.bmm(rows_dot[..., :-1], k[..., 1:-1].mT, out=s_dot)
    torch.mul(cap.tanh, s_dot, out=cap.bend)
    return torch.addcmul(rows_dot[..., -1:], s_dot, cap.slope, value=1 / LN2, out=s_dot)


def _pack_queries(
    name: str,
    shift: Tensor | float,
    points: Sequence[Qkv],
    piece: Piece,
    tile: Tile,
    scratch: Scratch,
) -> Tensor:
    """[shift, Q, Q̇], or without the last; also multiplies dSᵀ."""
    return scratch.pack(name, shift, *(piece.of_queries(point.q, tile) for point in points))


def _pack_dots(
    name: str,
    x_dot: Qkv,
    x: Qkv,
    shift: Tensor | float,
    piece: Piece,
    tile: Tile,
    scratch: Scratch,
) -> Tensor:
    """[Q̇, Q, shift of Ṡ]."""
    return scratch.pack(name, piece.of_queries(x_dot.q, tile), piece.of_queries(x.q, tile), shift)


def _pack_bars(
    number: int, points: list[Point], piece: Piece, tile: Tile, scratch: Scratch
) -> tuple[Tensor, Tensor | None]:
    """[−D, dO, ḋO] and [ḋO, dO, −Ḋ] of a tile."""
    bars = [piece.of_queries(point.o_bar, tile) for point in points]
    rows = scratch.pack(f"bars{number}", 0.0, *bars)
    outs = scratch.pack("outs", *(piece.of_queries(point.y.o, tile) for point in points))
    e = bars[0].shape[-1]
    bar, out = rows[..., 1 : 1 + e], outs[..., :e]
    product = torch.mul(bar, out, out=scratch("product", *out.shape))
    rows[..., 0] = -product.sum(-1)
    if len(points) == 1:
        return rows, None
    product.zero_().addcmul_(rows[..., 1 + e :], out).addcmul_(bar, outs[..., e:])
    rows_dot = scratch.pack(f"bars_dot{number}", bars[1], bars[0], 0.0)
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
