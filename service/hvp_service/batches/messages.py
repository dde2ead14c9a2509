"""Data batches as messages."""

from __future__ import annotations

from hvp_protos.v1 import data_batch_pb2

from hvp_service.batches.store import DataBatch
from hvp_service.blobs.messages import digest_message
from hvp_service.calls.messages import timestamp


def batch_message(batch: DataBatch) -> data_batch_pb2.DataBatch:
    """A data batch."""
    statistics = batch.statistics
    return data_batch_pb2.DataBatch(
        name=str(batch.name),
        digest=digest_message(batch.digest),
        num_sequences=statistics.num_sequences,
        sequence_length=statistics.sequence_length,
        num_targets=statistics.num_targets,
        max_token_id=statistics.max_token_id,
        has_attention_mask=statistics.has_attention_mask,
        create_time=timestamp(batch.create_time),
    )
