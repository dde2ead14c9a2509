"""The tiles that each kernel runs with: measured choices, and alternatives if they do not fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal, final

Kernel = Literal["forward", "keys", "queries"]
Mode = Literal["primal", "tangent", "dual"]


@final
@dataclass(frozen=True)
class Tile:
    """Sizes of the tiles of one launch, and how they are loaded.

    Attributes:
        queries: Rows of S in a tile.
        keys: Columns of S in a tile.
        warps: Number of warps, of 32 threads each, in a program.
        stages: Tiles in flight between memory and use; 1 loads when needed.
        descriptors: Load by the tensor memory accelerator (Hopper, strides of 16 bytes).
        registers: The most registers for a thread; None leaves the number to the compiler.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    descriptors: bool = False
    registers: int | None = None

    def smaller(self) -> Tile | None:
        """The next tile to try when this one needs more memory than the card has."""
        if self.stages > 1:
            return replace(self, stages=self.stages - 1)
        if max(self.queries, self.keys) <= 16:
            return None
        if self.queries >= self.keys:
            return replace(self, queries=self.queries // 2)
        return replace(self, keys=self.keys // 2)


@final
@dataclass(frozen=True)
class Pass:
    """A kind of launch: what it computes, and its tiles.

    Attributes:
        tile: Sizes of the tiles.
        mode: First derivatives, their tangents, or both.
        keys: dK kernels only: compute dK.
        values: dK kernels only: compute dV.
        probes: Number of probes whose tangents one launch computes.
    """

    tile: Tile
    mode: Mode
    keys: bool = True
    values: bool = True
    probes: int = 1

    def launches(self, num_probes: int) -> Iterator[tuple[int, ...]]:
        """The probes of each launch, numbered from 1; a primal pass has one launch, of none."""
        if self.mode == "primal":
            yield ()
            return
        for first in range(1, num_probes + 1, self.probes):
            yield tuple(range(first, min(first + self.probes, num_probes + 1)))

    def makes(self, probes: tuple[int, ...]) -> tuple[int, ...]:
        """The sides that a launch computes: 0 for first derivatives, then its probes' numbers."""
        return probes if self.mode == "tangent" else (0, *probes)


@final
@dataclass(frozen=True)
class Card:
    """The facts about a device that the choice of tiles depends on.

    Attributes:
        hopper: The device has Hopper's matrix instructions and tensor memory accelerator.
        processors: Number of programs that run side by side, at least.
    """

    hopper: bool
    processors: int


#: The launches that together make one result.
Plan = tuple[Pass, ...]


def bucket(width: int) -> int:
    """The width of the padded head: a power of two from 16."""
    return max(16, 1 << (width - 1).bit_length())


# (kernel, mode, at most this padded width) -> launches.
#
# [meas] H100, bfloat16, causal, S = 2048 for width 64 and 8192 for width 128. Descriptors are taken
# where they gain more than 4 %, or save spills: the host makes them anew for each launch.
#   forward dual 64: 0.132 ms (0.129 with descriptors).
#   forward dual 128: 5.87 ms (6.46 without descriptors).
#   keys dual 64: 0.261 ms (0.259 with descriptors, 0.274 with 64×64 tiles and 56 spills).
#   keys primal 64: 0.106 ms (0.111 with 32×64 tiles).
#   keys tangent 64: 0.212 ms (0.216 without descriptors, 0.255 with 32×64 tiles).
#   queries dual 64: 0.156 ms (0.204 with 1 stage, 0.151 with descriptors).
#   queries dual 128: 9.74 ms (15.92 with 64 keys and 1 stage: 148 spills; 9.65 with descriptors).
#   keys primal 128: 4.02 ms.
#   keys tangent 128: 11.8 ms (6 % more with descriptors).
#   keys dual 128: 15.8 ms as these two passes of 4 and 10 tile products; 6 % more as dV's and dK's
#   of 6 and 9; a third more as one of 12, for whose four accumulators there are no registers.
# Not measured, chosen for what the compiler reports (no spills, every product on whole warpgroups)
# and for their likeness to the above: primal and tangent of `forward` and `queries`.
_HOPPER: dict[tuple[Kernel, Mode, int], Plan] = {
    ("forward", "primal", 128): (Pass(Tile(128, 64, 8, 3), "primal"),),
    ("forward", "tangent", 128): (Pass(Tile(128, 64, 8, 2, descriptors=True), "tangent"),),
    ("forward", "dual", 128): (Pass(Tile(128, 64, 8, 2, descriptors=True), "dual"),),
    ("keys", "primal", 64): (Pass(Tile(64, 64, 4, 2), "primal"),),
    ("keys", "tangent", 64): (Pass(Tile(64, 64, 4, 2, descriptors=True), "tangent"),),
    ("keys", "primal", 128): (Pass(Tile(64, 64, 4, 2, descriptors=True), "primal"),),
    ("keys", "tangent", 128): (Pass(Tile(32, 128, 8, 2), "tangent"),),
    ("keys", "dual", 128): (
        Pass(Tile(64, 64, 4, 2, descriptors=True), "primal"),
        Pass(Tile(32, 128, 8, 2), "tangent"),
    ),
    ("queries", "primal", 64): (Pass(Tile(64, 64, 4, 2), "primal"),),
    ("queries", "tangent", 64): (Pass(Tile(64, 64, 4, 2), "tangent"),),
    ("queries", "dual", 64): (Pass(Tile(64, 64, 4, 2), "dual"),),
    ("queries", "primal", 128): (Pass(Tile(128, 64, 8, 2), "primal"),),
    ("queries", "tangent", 128): (Pass(Tile(128, 32, 8, 2), "tangent"),),
    ("queries", "dual", 128): (Pass(Tile(128, 32, 8, 2), "dual"),),
}
# Tangents of two probes in one launch, on Hopper in 16 bits: what has no tangent in it is formed
# once for both. Not measured; chosen for what the compiler reports. The forward kernel has 9 tile
# products instead of 10, no spills, and as many warps to a processor as for one probe. The others
# (18 instead of 20 for dK and dV, 14 instead of 16 for dQ) have registers for it only with tiles of
# 32 keys or queries, which cost 20 % where they were measured: they are left to tuning. Wider heads
# have no registers for it at all.
_PAIRS: dict[tuple[Kernel, int], Tile] = {("forward", 64): Tile(128, 64, 8, 2)}
_OTHER_PAIRS: dict[tuple[Kernel, int], tuple[Tile, ...]] = {
    ("forward", 64): (Tile(64, 64, 4, 2, descriptors=True), Tile(128, 64, 8, 2, descriptors=True)),
    ("keys", 64): (Tile(32, 128, 8, 2, descriptors=True), Tile(32, 64, 4, 2)),
    ("queries", 64): (Tile(128, 32, 8, 2), Tile(64, 32, 4, 2, descriptors=True)),
}
# (kernel, at most this padded width) -> tile. Widths beyond 256 are not supported.
_ANY: dict[tuple[Kernel, int], Tile] = {
    ("forward", 64): Tile(64, 64, 4, 2),
    ("forward", 128): Tile(64, 32, 4, 2),
    ("forward", 256): Tile(32, 32, 4, 1),
    ("keys", 64): Tile(32, 64, 4, 2),
    ("keys", 128): Tile(32, 32, 4, 2),
    ("keys", 256): Tile(16, 32, 4, 1),
    ("queries", 64): Tile(64, 32, 4, 2),
    ("queries", 128): Tile(32, 32, 4, 2),
    ("queries", 256): Tile(32, 16, 4, 1),
}
# What tuning tries besides the choice above, on Hopper: (queries, keys, warps, stages).
_OTHERS: dict[tuple[Kernel, int], tuple[tuple[int, int, int, int], ...]] = {
    ("forward", 64): ((64, 64, 4, 2), (128, 128, 8, 3)),
    ("forward", 128): ((128, 64, 8, 2), (128, 32, 8, 2), (64, 32, 4, 2)),
    ("keys", 64): ((32, 64, 4, 2), (64, 64, 4, 2), (64, 128, 8, 2)),
    ("keys", 128): ((32, 128, 8, 2), (64, 64, 4, 2)),
    ("queries", 64): ((64, 64, 4, 2), (128, 64, 8, 3)),
    ("queries", 128): ((128, 32, 8, 2), (64, 32, 4, 2)),
}
# tf32 operands take twice the memory of 16-bit ones.
_ROUNDED: dict[int, Tile] = {
    64: Tile(32, 32, 4, 2),
    128: Tile(32, 32, 4, 1),
    256: Tile(16, 16, 4, 1),
}
# Exact float32 products keep their operands in registers, which are what is short.
_EXACT = Tile(16, 16, 4, 1)


@cache
def plans(
    kernel: Kernel,
    mode: Mode,
    width: int,
    card: Card,
    *,
    wide: bool,
    exact: bool,
    several: bool = False,
) -> tuple[Plan, ...]:
    """The committed choice, then what tuning may try instead.

    Args:
        kernel: Name of the kernel.
        mode: Derivatives to compute.
        width: The padded head dimension, the greater of the two.
        card: The device.
        wide: Elements have four bytes.
        exact: float32 products are not rounded to tf32.
        several: There are tangents of more than one probe.
    """
    step = next(limit for limit in (64, 128, 256) if width <= limit)
    if wide:
        tile = _EXACT if exact else _ROUNDED[step]
        if kernel == "keys" and exact:
            return ((Pass(tile, mode, keys=False), Pass(tile, mode, values=False)),)
        return ((Pass(tile, mode),),)
    first: Plan = (Pass(_ANY[kernel, step], mode),)
    if not card.hopper or step == 256:
        return (first,)
    found = [_HOPPER.get((kernel, mode, step), first)]
    if several:
        if (kernel, step) in _PAIRS:
            found.insert(0, (Pass(_PAIRS[kernel, step], mode, probes=2),))
        found += [(Pass(tile, mode, probes=2),) for tile in _OTHER_PAIRS.get((kernel, step), ())]
    for choice in _OTHERS[kernel, step]:
        for tile in (Tile(*choice), Tile(*choice, descriptors=True)):
            found.append((Pass(tile, mode),))
            if kernel == "keys" and step == 128:
                # Four accumulators of this width leave no registers: two passes of two.
                found[-1] = (Pass(tile, mode, keys=False), Pass(tile, mode, values=False))
                if mode == "dual":
                    found.append((Pass(tile, "primal"), Pass(tile, "tangent")))
    return tuple(found)
