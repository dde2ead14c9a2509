"""Which block keeps which residuals, within a budget of memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from hvp_core.autodiff.executor import Bytes
from hvp_core.autodiff.passes import Retention
from hvp_core.settings import Schedule


class BlockRetention(NamedTuple):
    """What one block keeps."""

    way: Retention
    cached: bool  # keep the primal half for the next product


def choose(
    schedule: Schedule, blocks: Sequence[Bytes], budget_bytes: int, num_probes: int
) -> list[BlockRetention]:
    """Choose what each block keeps.

    Under `auto` every block is lean to begin with. As long as the budget lasts, blocks become fast,
    the last ones first (what they keep is soonest free again). Once all blocks are fast, they
    become cached, the first ones first.

    Args:
        schedule: The schedule that was asked for; only `auto` looks at the budget.
        blocks: Memory that each block would keep, over all micro-batches of a rank.
        budget_bytes: Memory that all blocks may keep together.
        num_probes: Number of vectors that are multiplied together. Several share their primal half.
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
