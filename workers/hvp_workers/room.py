"""Memory that a run's vectors take on a rank; without torch, so that the service can ask too."""

from __future__ import annotations

USABLE = 0.8  # of the memory that is free: the rest is for blocks and logits


def needed_bytes(num_vectors: int, vector_bytes: float) -> int:
    """Free memory for which a rank has room for vectors beside its work.

    Args:
        num_vectors: That the run holds.
        vector_bytes: Of one vector on the rank.
    """
    return int(num_vectors * vector_bytes / USABLE)
