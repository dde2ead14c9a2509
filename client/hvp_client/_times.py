"""Times on the wire and in Python."""

from __future__ import annotations

from datetime import UTC, datetime

from google.protobuf.timestamp_pb2 import Timestamp


def from_timestamp(timestamp: Timestamp) -> datetime:
    """Make an aware datetime, UTC."""
    return timestamp.ToDatetime(tzinfo=UTC)
