"""How attention on a CPU is cut: pieces of heads, jobs and tiles of queries, steps of keys.

The sizes keep the tiles that are worked on in cache, while an operation on one takes long enough
that the time to call it does not count.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hvp_core.attention.rule import Pattern, Qkv, Span

LN2 = math.log(2)
# [meas] 2 threads, float32, 9 heads over 3 key heads, width 64, lengths 512 and 2048: half or twice
# any of these is slower or the same, and a key head at a time takes up to twice as long.
#: A tile has about this many rows: queries, times the group that shares a key head …
_ROWS = 192
#: … but not fewer queries than this, or keys are read for too few, nor more, or a diagonal tile
#: computes too much that is masked.
_QUERIES = (16, 64)
_KEYS = 512
#: Scores in the tiles of one batched product, of which a backward pass holds four: 8 MB in float32.
_SCORES = 1 << 19
#: Fewer scores than this in all are not worth waking threads for.
_ALONE = 1 << 18


def work_dtype(x: Tensor) -> torch.dtype:
    """The dtype of everything between inputs and outputs: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class Scratch:
    """Buffers by name, used again for every tile of a call."""

    def __init__(self, like: Tensor) -> None:
        self._held: dict[str, Tensor] = {}
        self._new = torch.empty(0, dtype=work_dtype(like), device=like.device)

    def __call__(self, name: str, *shape: int) -> Tensor:
        """A contiguous tensor of any content, good until the name is asked for again."""
        size = math.prod(shape)
        held = self._held.get(name)
        if held is None or held.numel() < size:
            held = self._held[name] = self._new.new_empty(size)
        return held[:size].view(shape)

    def pack(self, name: str, *parts: Tensor | float) -> Tensor:
        """Parts (…, w) side by side; a number is a column. Returns (heads, rows, sum of w)."""
        lead = next(part.shape[:-1] for part in parts if isinstance(part, Tensor))
        widths = [part.shape[-1] if isinstance(part, Tensor) else 1 for part in parts]
        packed = self(name, *lead, sum(widths))
        for part, column in zip(parts, packed.split(widths, -1), strict=True):
            if isinstance(part, Tensor):
                column.copy_(part)
            else:
                column.fill_(part)
        return packed.view(lead[0] * lead[1], math.prod(lead[2:]), sum(widths))


@dataclass(frozen=True)
class Tile:
    """Queries start ≤ i < stop, and the ranges of keys to go through."""

    start: int
    stop: int
    steps: list[tuple[int, int]]


@dataclass(frozen=True)
class Piece:
    """Rows of a batch that share a span, and key heads, for one batched product."""

    rows: slice
    heads: slice
    keys: slice
    shape: tuple[int, int, int]  # group, queries, keys
    offset: int  # query i is at key i + offset, counted from the span's start
    pattern: Pattern
    upper: Tensor  # (queries of a tile, the same), true on and above the diagonal

    @property
    def scale(self) -> float:
        """Scale of the cap's argument, or of the scores if there is no cap."""
        return self.pattern.scale / (self.pattern.softcap or 1)

    @property
    def factor(self) -> float:
        """Factor that keys are packed with; scores are in base 2, but a cap's argument is not."""
        return self.scale / (LN2 if self.pattern.softcap is None else 1)

    def of_queries(self, x: Tensor, tile: Tile) -> Tensor:
        """(b, h, s, w) → (rows, key heads, group, queries, w)."""
        x = x.unflatten(1, (-1, self.shape[0]))
        return x[self.rows, self.heads, :, tile.start : tile.stop]

    def of_keys(self, x: Tensor) -> Tensor:
        """(b, h/g, t, w) → (rows, key heads, keys, w)."""
        return x[self.rows, self.heads, self.keys]

    def pack_keys(self, name: str, points: list[Qkv], scratch: Scratch) -> Tensor:
        """[1, K, K̇, 1] times the factor (not the ones), or without the last two."""
        keys = [self.of_keys(point.k) for point in points]
        packed = scratch.pack(name, 1.0, *keys, *([1.0] if len(points) > 1 else []))
        packed[..., 1 : 1 + len(points) * keys[0].shape[-1]].mul_(self.factor)
        return packed

    def store(self, tile: Tile, out: Tensor, value: Tensor) -> None:
        """Copy (heads, rows, w) where it belongs in (b, h, s, w)."""
        view = self.of_queries(out, tile)
        view.copy_(value.view(view.shape))

    def tiles(self) -> Iterator[Tile]:
        """Tiles from the last queries to the first: the largest of a causal pattern come first."""
        _, queries, count = self.shape
        size = self.upper.shape[0]
        for start in reversed(range(0, queries, size)):
            stop = min(start + size, queries)
            last = min(count, stop + self.offset) if self.pattern.causal else count
            first = 0
            if self.pattern.window is not None:
                first = max(0, start + self.offset - self.pattern.window + 1)
            parts = max(0, -(-(last - first) // _KEYS))
            edges = [first + (last - first) * n // parts for n in range(parts + 1)] if parts else []
            yield Tile(start, stop, list(itertools.pairwise(edges)))

    def mask_(self, scores: Tensor, tile: Tile, start: int, value: float) -> None:
        """Fill where a query may not look; only columns that an edge crosses are touched."""
        queries, stop = tile.stop - tile.start, start + scores.shape[-1]
        by_query = scores.view(-1, self.shape[0], queries, scores.shape[-1])
        # Of the first query. Counted from there, row r's own key is column r.
        own = tile.start + self.offset
        if self.pattern.causal and stop > own + 1:
            first = max(start, own + 1)
            ahead = self.upper[:queries, first - own - 1 : stop - own - 1]
            by_query[..., first - start :].masked_fill_(ahead, value)
        if self.pattern.window is not None:
            oldest = own - self.pattern.window + 1
            last = min(stop, oldest + queries - 1)
            if start < last:
                behind = self.upper.mT[:queries, start - oldest + 1 : last - oldest + 1]
                by_query[..., : last - start].masked_fill_(behind, value)


@dataclass(frozen=True)
class Job:
    """A share of a piece's tiles, for one thread."""

    piece: Piece
    part: int
    parts: int

    def tiles(self) -> Iterator[Tile]:
        """Every `parts`-th tile, so that shares of a causal pattern take alike long."""
        return itertools.islice(self.piece.tiles(), self.part, None, self.parts)


def jobs(x: Qkv, pattern: Pattern, span: Span | None, workers: int) -> list[Job]:
    """The jobs of a call: whole pieces if they divide evenly among workers, else shares of each."""
    found = list(_pieces(x, pattern, span))
    parts = 1 if len(found) % workers == 0 else workers
    return [Job(piece, part, parts) for piece in found for part in range(parts)]


def worth_sharing(x: Qkv) -> bool:
    """Whether there is enough to do for more than one thread."""
    b, h, s, _ = x.q.shape
    return x.q.device.type == "cpu" and b * h * s * x.k.shape[2] >= _ALONE


def _pieces(x: Qkv, pattern: Pattern, span: Span | None) -> Iterator[Piece]:
    """All heads of all rows of a batch; rows with different spans come apart."""
    (b, h, s, _), (_, heads, t, _) = x.q.shape, x.k.shape
    group = h // heads
    size = min(s, max(_QUERIES[0], min(_QUERIES[1], _ROWS // group)))
    upper = torch.ones(size, size, dtype=torch.bool, device=x.q.device).triu_()
    scores = _SCORES if x.q.device.type == "cpu" else 64 * _SCORES
    room = max(1, scores // (group * size * min(t, _KEYS)))
    # In parts of one size, where that is possible.
    some_heads = -(-heads // -(-heads // room))
    some_rows = min(b, max(1, room // heads))
    spans = [(0, t)] * b
    if span is not None:
        starts, stops = span.start.clamp(min=0).tolist(), span.stop.clamp(max=t).tolist()
        spans = [(start, max(start, stop)) for start, stop in zip(starts, stops, strict=True)]
    row = 0
    while row < b:
        start, stop = spans[row]
        end = row + 1
        while end < min(b, row + some_rows) and spans[end] == spans[row]:
            end += 1
        for head in range(0, heads, some_heads):
            yield Piece(
                slice(row, end),
                slice(head, head + some_heads),
                slice(start, stop),
                (group, s, stop - start),
                t - s - start,
                pattern,
                upper,
            )
        row = end
