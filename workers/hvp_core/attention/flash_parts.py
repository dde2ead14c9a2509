"""What the Triton kernels of attention share: rows, order of programs, and who looks at what."""

from __future__ import annotations

from typing import Any, NamedTuple

from hvp_core.attention.flash_triton import tl, triton

LOG2E = tl.constexpr(1.4426950408889634)


class Rows(NamedTuple):
    """Where the rows of each head of a (b, h, n, d) tensor lie; the last stride is 1."""

    ptr: Any
    batch: int
    head: int
    row: int


@triton.jit
def load(
    x, b, h, first, count, BLOCK: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """(BLOCK, PADDED) rows from `first` on; zeros beyond WIDTH.

    Beyond the last row come rows that exist (pointers: the last again) or zeros (descriptors):
    finite either way, and masked by who uses them.
    """
    if TMA:
        value = x.load([b, h, first, 0]).reshape(BLOCK, PADDED)
    else:
        # 64 bits for where the tile begins, 32 within it: that half is per element.
        tile = (
            x.ptr + b.to(tl.int64) * x.batch + h.to(tl.int64) * x.head + first.to(tl.int64) * x.row
        )
        rows = tl.minimum(tl.arange(0, BLOCK), count - 1 - first)
        columns = tl.arange(0, PADDED)
        at = tile + (rows[:, None] * x.row + columns[None, :])
        if PADDED == WIDTH:
            value = tl.load(at)
        else:
            value = tl.load(at, mask=columns[None, :] < WIDTH, other=0.0)
    return value


@triton.jit
def store(x, value, b, h, first, count, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Write rows from `first` on, those and the columns that exist."""
    tile = x.ptr + b.to(tl.int64) * x.batch + h.to(tl.int64) * x.head + first.to(tl.int64) * x.row
    rows = tl.arange(0, BLOCK)
    columns = tl.arange(0, value.shape[1])
    keep = (rows[:, None] < count - first) & (columns[None, :] < WIDTH)
    at = tile + (rows[:, None] * x.row + columns[None, :])
    tl.store(at, value.to(x.ptr.dtype.element_ty), mask=keep)


@triton.jit
def load_rows(x, b, h, heads, first, count, BLOCK: tl.constexpr):
    """(BLOCK,) of a contiguous (b, heads, count) float32; rows that do not exist are the last."""
    head = x + (b.to(tl.int64) * heads + h) * count
    return tl.load(head + tl.minimum(first + tl.arange(0, BLOCK), count - 1))


@triton.jit
def store_rows(x, value, b, h, heads, first, count, BLOCK: tl.constexpr):
    """Write (BLOCK,) of a contiguous (b, heads, count) float32."""
    rows = first + tl.arange(0, BLOCK)
    tl.store(x + (b.to(tl.int64) * heads + h) * count + rows, value, mask=rows < count)


@triton.jit
def schedule(tiles, all_heads, chunk):
    """(tile, head) of this program: tiles in order for all heads of a chunk, then the next chunk.

    The tiles with most work come first, so that the last programs to finish are short; a chunk's
    keys and values, or queries, fit the second-level cache.
    """
    program = tl.program_id(0)
    first = program // (tiles * chunk) * chunk
    here = tl.minimum(chunk, all_heads - first)
    inside = program - first * tiles
    return inside // here, first + inside % here


@triton.jit
def scaled(tiles, factor, COUNT: tl.constexpr):
    """Each of a tuple of tiles, times a factor."""
    found = ()
    for n in tl.static_range(COUNT):
        found += (tiles[n] * factor,)
    return found


@triton.jit
def tanh(x):
    """From one exponential, with the exact limit on either side."""
    return 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2E)) + 1.0)


@triton.jit
def span(start, stop, b, t):
    """[first, last) of the keys that this row of the batch has."""
    first, last = b * 0, b * 0 + t
    if start is not None:
        first = tl.maximum(tl.load(start + b), 0)
        last = tl.minimum(tl.load(stop + b), t)
    return first, last


@triton.jit
def key_range(first, last, m0, offset, window, BM: tl.constexpr, CAUSAL: tl.constexpr):
    """Keys that some, and keys that all, of the queries m0 … m0 + BM − 1 look at."""
    some_first, some_last, all_first, all_last = first, last, first, last
    if CAUSAL:
        some_last = tl.minimum(some_last, m0 + BM + offset)
        all_last = tl.minimum(all_last, m0 + 1 + offset)
    if window is not None:
        some_first = tl.maximum(some_first, m0 + offset - window + 1)
        all_first = tl.maximum(all_first, m0 + BM + offset - window)
    return some_first, some_last, all_first, all_last


@triton.jit
def looks_at(query, key, first, last, offset, window, CAUSAL: tl.constexpr):
    """Which of these queries look at which of these keys."""
    keep = (key >= first) & (key < last)
    if CAUSAL:
        keep &= key <= query + offset
    if window is not None:
        keep &= key > query + offset - window
    return keep
