"""Memory that a run's vectors take on a rank; without torch, so that the service can ask too."""

from __future__ import annotations

from hvp_operations.operation import Cost

USABLE = 0.8  # of the memory that is free: the rest is for blocks and logits


def least_bytes(cost: Cost, vector_bytes: float) -> int:
    """Free memory without which a rank does not begin.

    Args:
        cost: What the run takes.
        vector_bytes: Of one vector on the rank.
    """
    return int(cost.least_vectors * vector_bytes / USABLE)
