"""Memory that a run's vectors take on a rank; without torch, so that the service can ask too."""

from __future__ import annotations

from hvp_operations.matrices import BLOCKS_TOGETHER, Matrix

USABLE = 0.8  # of the memory that is free: the rest is for blocks and logits


def needed_bytes(num_vectors: int, vector_bytes: float) -> int:
    """Free bytes that a rank needs to hold vectors and still have room for its work.

    Args:
        num_vectors: Number of vectors that the run holds.
        vector_bytes: Bytes of one vector on the rank.
    """
    return int(num_vectors * vector_bytes / USABLE)


def composed_vectors(composition: Matrix | None) -> int:
    """Vectors that an operator takes beside each vector it is given, and what it makes of it.

    Args:
        composition: What it is made of; None for a matrix of the model.
    """
    if composition is None:
        return 0
    in_blocks = 2 * BLOCKS_TOGETHER if composition.blocks else 0
    return 3 + bool(composition.precondition) + in_blocks
