"""The number of sequences that go through a block at once by default."""

from __future__ import annotations

#: Tokens through a block at once: enough for full-speed GEMMs, little beside the weights.
_TOKENS = {"cpu": 512, "cuda": 8192}


def default_micro_batch(num_sequences: int, length: int, world_size: int, device: str) -> int:
    """Sequences per micro-batch: enough tokens for full speed, and work for every rank.

    Args:
        num_sequences: Number of sequences of the batch.
        length: Number of positions of each.
        world_size: Number of ranks.
        device: `cpu` or `cuda`.
    """
    share = -(-num_sequences // world_size)
    return max(1, min(share, _TOKENS[device] // length))
