"""Memory that a run's vectors take on a rank; without torch, so that the service can ask too."""

from __future__ import annotations

USABLE = 0.8  # of the memory that is free: the rest is for blocks and logits


def needed_bytes(num_vectors: int, vector_bytes: float) -> int:
    """Free bytes that a rank needs to hold vectors and still have room for its work.

    Args:
        num_vectors: Number of vectors that the run holds.
        vector_bytes: Bytes of one vector on the rank.
    """
    return int(num_vectors * vector_bytes / USABLE)
