"""Data batches as messages."""

from __future__ import annotations

from typing import Any

from hvp_batches.schema import BatchSchema
from hvp_protos.v1 import data_batch_pb2

from hvp_service.batches.store import DataBatch
from hvp_service.blobs.messages import digest_message
from hvp_service.calls.messages import enum_value, timestamp


def batch_message(batch: DataBatch) -> data_batch_pb2.DataBatch:
    """Make the message of a data batch."""
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
        fields=[
            data_batch_pb2.BatchFieldContents(
                name=each.name, kind=kind_value(each.kind), shape=each.shape
            )
            for each in statistics.fields
        ],
    )


def schema_message(schema: BatchSchema) -> data_batch_pb2.BatchSchema:
    """Make the message of a model's batch schema."""
    return data_batch_pb2.BatchSchema(
        fields=[
            data_batch_pb2.BatchField(
                name=each.name,
                kind=kind_value(each.kind),
                dims=each.dims,
                required=each.required,
                minimum=each.minimum,
                maximum=each.maximum,
                ignored=each.ignored,
            )
            for each in schema.fields
        ],
        outputs=schema.outputs,
        unit=enum_value(data_batch_pb2.BatchSchema.Unit, f"UNIT_{schema.unit.upper()}"),
        targets=schema.targets,
        longest=schema.longest,
    )


def kind_value(kind: str) -> Any:
    """The enum value of the kind of a field's elements."""
    return enum_value(data_batch_pb2.BatchField.Kind, f"KIND_{kind.upper()}")
