"""How many sequences go through a block at once when nobody says."""

from __future__ import annotations

#: Tokens through a block at once: enough for full-speed GEMMs, little beside the weights.
_TOKENS = {"cpu": 512, "cuda": 8192}


def default_micro_batch(num_sequences: int, length: int, world_size: int, device: str) -> int:
    """Sequences per micro-batch: enough tokens, and work for every rank."""
    share = -(-num_sequences // world_size)
    return max(1, min(share, _TOKENS[device] // length))
