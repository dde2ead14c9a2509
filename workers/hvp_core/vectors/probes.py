"""Random vectors by seed: the same vector for any number of ranks.

Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC
2011) with the seed as key and the canonical flat index, four to a counter, as counter.
"""

from __future__ import annotations

import math
from typing import Literal

import torch

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
_PIECE = 1 << 14  # counters at once; their tensors stay in the second cache: 3 times memory's speed
_PIECE_ON_GPU = 1 << 20  # where each piece is some hundred launches


def philox4x32(counter: torch.Tensor, key: int) -> torch.Tensor:
    """Ten rounds of Philox4x32.

    Args:
        counter: int64 (4, m), each entry a word in [0, 2**32).
        key: 64-bit key.

    Returns:
        int64 (4, m), words in [0, 2**32).
    """
    # Words 0 and 2 are multiplied, 1 and 3 are not.
    moved, kept = counter[0::2].clone(), counter[1::2].clone()
    spare = torch.empty_like(moved)
    multipliers = torch.tensor(_MULTIPLIERS, device=counter.device).view(2, 1)
    k0, k1 = key & _MASK, (key >> 32) & _MASK
    for _ in range(10):
        # The 64-bit product wraps into int64's sign; shift and mask recover the unsigned halves.
        moved.mul_(multipliers)
        torch.bitwise_right_shift(moved, 32, out=spare).bitwise_and_(_MASK)
        kept[0].bitwise_xor_(spare[1]).bitwise_xor_(k0)
        kept[1].bitwise_xor_(spare[0]).bitwise_xor_(k1)
        torch.bitwise_and(moved[1], _MASK, out=spare[0])
        torch.bitwise_and(moved[0], _MASK, out=spare[1])
        moved, kept, spare = kept, spare, moved
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return torch.stack((moved[0], kept[0], moved[1], kept[1]))


def _words(start: int, stop: int, seed: int, device: torch.device) -> torch.Tensor:
    """Philox words of counters [start, stop): int64 (4 * (stop - start),) in flat order."""
    index = torch.arange(start, stop, device=device)
    counter = torch.stack((index & _MASK, index >> 32, index * 0, index * 0))
    return philox4x32(counter, seed).T.reshape(-1)


def fill(
    out: torch.Tensor, flat_start: int, seed: int, distribution: Literal["rademacher", "gaussian"]
) -> None:
    """Write elements flat_start, flat_start + 1, ... of the seeded vector into `out` (m,).

    Gaussians come from pairs of words by Box and Muller, so they end at 6.7 standard deviations.

    Args:
        out: Float tensor (m,), written in place.
        flat_start: Canonical flat index of its first element.
        seed: 64-bit key.
        distribution: Law of the independent elements.
    """
    flat_stop = flat_start + out.numel()
    first, last = flat_start // 4, -(-flat_stop // 4)
    piece = _PIECE if out.device.type == "cpu" else _PIECE_ON_GPU
    for start in range(first, last, piece):
        stop = min(start + piece, last)
        words = _words(start, stop, seed, out.device)
        if distribution == "rademacher":
            values = (1 - 2 * (words >> 31)).to(out.dtype)
        else:
            uniform = (words.double() + 0.5) / 2**32
            radius = torch.sqrt(-2 * torch.log(uniform[0::2]))
            angle = 2 * math.pi * uniform[1::2]
            values = torch.stack((radius * angle.cos(), radius * angle.sin()), 1).view(-1)
        low, high = max(4 * start, flat_start), min(4 * stop, flat_stop)
        out[low - flat_start : high - flat_start] = values[low - 4 * start : high - 4 * start]
