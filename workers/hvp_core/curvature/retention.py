"""Which block keeps what, within a budget of memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from hvp_core.autodiff.executor import Bytes
from hvp_core.autodiff.passes import Retention
from hvp_core.settings import Schedule


class BlockRetention(NamedTuple):
    """One block's way."""

    way: Retention
    cached: bool  # keep the primal half for the next product


def choose(
    schedule: Schedule, blocks: Sequence[Bytes], budget_bytes: int, num_probes: int
) -> list[BlockRetention]:
    """The way of each block.

    Every block is lean to begin with. As long as the budget lasts, blocks become fast, the last
    ones first (what they keep is soonest free again); if all are, they become cached.

    Args:
        schedule: What is wanted; only `auto` looks at the budget.
        blocks: What each would keep, over all micro-batches of a rank.
        budget_bytes: For all of them.
        num_probes: Several share their primal half.
    """
    keeping: Retention = "fast" if num_probes == 1 else "shared"
    if schedule == "lean":
        return [BlockRetention("lean", False) for _ in blocks]
    if schedule == "fast":
        return [BlockRetention(keeping, False) for _ in blocks]
    if schedule == "cached":
        return [BlockRetention("shared", True) for _ in blocks]
    found = [BlockRetention("lean", False) for _ in blocks]
    left = budget_bytes - sum(each.lean for each in blocks)
    for index in reversed(range(len(blocks))):
        each = blocks[index]
        extra = (each.fast if num_probes == 1 else each.shared) - each.lean
        if extra > left:
            return found
        left -= extra
        found[index] = BlockRetention(keeping, False)
    for index, each in enumerate(blocks):
        extra = max(each.shared, each.cached) - (each.fast if num_probes == 1 else each.shared)
        if extra > left:
            return found
        left -= extra
        found[index] = BlockRetention("shared", True)
    return found
