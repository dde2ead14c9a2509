"""The server's time: microseconds since the epoch, which is what the rows hold."""

from __future__ import annotations

import time

SECOND = 1_000_000  # microseconds


def now_us() -> int:
    """Wall-clock time in microseconds since 1970-01-01 UTC."""
    return time.time_ns() // 1000
