"""Which block keeps which residuals, within a budget of memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from hvp_core.autodiff.executor import Bytes
from hvp_core.autodiff.passes import Retention
from hvp_core.errors import CurvatureError
from hvp_core.settings import Schedule

#: Most bytes that blocks keep of one deterministic product on a rank, by kind of device; with more
#: to keep they are lean. A constant, and no share of the memory that happens to be there.
PINNED_BYTES = {"cpu": 1 << 30, "cuda": 16 << 30}


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


def pinned(
    schedule: Schedule, blocks: Sequence[Bytes], budget_bytes: int, most_bytes: int
) -> list[BlockRetention]:
    """Choose what each block keeps where free memory may not change a bit.

    All blocks are shared, or all are lean, by what they would keep and nothing else. Shared ones
    make the primal half by itself; whether it is kept for the next product or made again, by the
    same subprograms, does not change it. So this alone goes by the budget.

    Args:
        schedule: The schedule that was asked for.
        blocks: Memory that each block would keep, over all micro-batches of a rank.
        budget_bytes: Memory that all blocks may keep together.
        most_bytes: What shared blocks may keep; with more to keep all are lean.

    Raises:
        CurvatureError: DETERMINISTIC_MEMORY: shared blocks do not fit the budget.
    """
    needed = sum(each.shared for each in blocks)
    if schedule == "lean" or needed > most_bytes:
        return [BlockRetention("lean", False) for _ in blocks]
    if needed > budget_bytes:
        raise no_memory_for(
            "what blocks keep of a product", needed, budget_bytes, "or start with --schedule lean"
        )
    found, left = [BlockRetention("shared", False) for _ in blocks], budget_bytes - needed
    for index, each in enumerate(blocks if schedule != "fast" else ()):
        left -= max(each.shared, each.cached) - each.shared
        if left < 0:
            break
        found[index] = BlockRetention("shared", True)
    return found


def no_memory_for(what: str, needed: int, available: int, advice: str) -> CurvatureError:
    """The refusal of a deterministic computation for which there is no memory.

    Args:
        what: What needs the memory.
        needed: Bytes that it takes on a rank.
        available: Bytes that a rank has for it.
        advice: What helps beside more memory.
    """
    return CurvatureError(
        "DETERMINISTIC_MEMORY",
        f"{what} takes {needed} bytes on a rank and {available} are available; with less the bits "
        f"would be others. Free memory, use more workers, {advice}",
        {"needed_bytes": str(needed), "available_bytes": str(available)},
    )
