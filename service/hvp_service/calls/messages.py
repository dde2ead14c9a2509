"""Values as messages and messages as values."""

from __future__ import annotations

from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp
from hvp_batches.schema import BatchSchema
from hvp_protos.v1 import blob_pb2, checkpoint_pb2, data_batch_pb2, operator_pb2, vector_pb2

from hvp_service.app.config import ServerConfig
from hvp_service.batches.store import DataBatch
from hvp_service.blobs.store import Blob, Digest
from hvp_service.calls.labels import etag_of
from hvp_service.calls.paging import PageRequest
from hvp_service.checkpoints.store import Checkpoint
from hvp_service.operators.resolver import OperatorRef
from hvp_service.uploads.rows import Upload
from hvp_service.vectors.rows import Vector


def timestamp(time_us: int | None) -> Timestamp | None:
    """Microseconds since the epoch."""
    if time_us is None:
        return None
    message = Timestamp()
    message.FromMicroseconds(time_us)
    return message


def enum_name(enum: Any, value: int) -> str:
    """Name of an enum value; of the zero value for a number that this version does not know."""
    names = {number: name for name, number in enum.items()}
    return str(names.get(value, names[0]))


def enum_value(enum: Any, name: str) -> Any:
    """Number of an enum value; zero for a name that this version does not know."""
    return dict(enum.items()).get(name, 0)


def page_request(request: Any) -> PageRequest:
    """Of any List request."""
    return PageRequest(size=request.page_size, token=request.page_token)


def digest_value(message: blob_pb2.Digest) -> Digest:
    """A digest, unchecked."""
    return Digest(sha256=message.sha256, size_bytes=message.size_bytes)


def digest_message(digest: Digest) -> blob_pb2.Digest:
    """A digest."""
    return blob_pb2.Digest(sha256=digest.sha256, size_bytes=digest.size_bytes)


def blob_message(blob: Blob) -> blob_pb2.Blob:
    """A blob."""
    return blob_pb2.Blob(
        name=blob.name,
        digest=digest_message(blob.digest),
        create_time=timestamp(blob.create_time),
    )


def upload_message(upload: Upload, config: ServerConfig) -> blob_pb2.UploadSession:
    """An upload session and the server's limits for it."""
    return blob_pb2.UploadSession(
        name=str(upload.name),
        committed_size=upload.committed_size,
        max_chunk_bytes=config.max_chunk_bytes,
        commit_interval_bytes=config.commit_interval_bytes,
        blob=None if upload.blob is None else blob_message(upload.blob),
        expire_time=timestamp(upload.expire_time),
        writer_epoch=upload.writer_epoch,
    )


def checkpoint_message(
    checkpoint: Checkpoint, *, parameters: bool = True
) -> checkpoint_pb2.Checkpoint:
    """A checkpoint, for lists without its parameters."""
    description = checkpoint.description
    return checkpoint_pb2.Checkpoint(
        name=str(checkpoint.name),
        state=checkpoint_pb2.Checkpoint.STATE_ACTIVE,
        files=[
            checkpoint_pb2.CheckpointFile(path=file.path, digest=digest_message(file.digest))
            for file in checkpoint.files
        ],
        architecture=description.architecture,
        num_parameters=description.num_parameters,
        vocab_size=description.vocab_size,
        stored_dtype=description.stored_dtype,
        size_bytes=checkpoint.size_bytes,
        create_time=timestamp(checkpoint.create_time),
        parameters=[
            checkpoint_pb2.ParameterTensor(
                name=tensor.name, shape=tensor.shape, offset=tensor.offset
            )
            for tensor in (description.parameters if parameters else ())
        ],
        labels=checkpoint.labels,
        etag=etag_of(checkpoint.labels),
        task=description.task,
        batch_schema=schema_message(description.batch_schema),
    )


def schema_message(schema: BatchSchema) -> data_batch_pb2.BatchSchema:
    """What a batch for a model holds."""
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
    """The kind of a field's elements."""
    return enum_value(data_batch_pb2.BatchField.Kind, f"KIND_{kind.upper()}")


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
        fields=[
            data_batch_pb2.BatchFieldContents(
                name=each.name, kind=kind_value(each.kind), shape=each.shape
            )
            for each in statistics.fields
        ],
    )


def vector_message(vector: Vector) -> vector_pb2.Vector:
    """A vector."""
    return vector_pb2.Vector(
        name=str(vector.name),
        checkpoint=str(vector.checkpoint),
        dtype=vector.dtype,
        num_elements=vector.num_elements,
        durable=vector.durable,
        create_time=timestamp(vector.create_time),
        session="" if vector.session is None else str(vector.session),
        expire_time=timestamp(vector.lifetime.expire_time),
        data_batch="" if vector.batch is None else str(vector.batch),
        shape=vector.shape,
    )


def operator_value(message: operator_pb2.OperatorSpec) -> OperatorRef:
    """An operator, unchecked."""
    return OperatorRef(
        checkpoint=message.checkpoint,
        data_batch=message.data_batch,
        kind=enum_name(operator_pb2.OperatorSpec.Kind, message.kind),
        dtype=message.dtype,
        micro_batch_size=message.micro_batch_size,
        precision=message.precision,
    )


def operator_message(ref: OperatorRef) -> operator_pb2.OperatorSpec:
    """An operator."""
    return operator_pb2.OperatorSpec(
        checkpoint=ref.checkpoint,
        data_batch=ref.data_batch,
        kind=enum_value(operator_pb2.OperatorSpec.Kind, ref.kind),
        dtype=ref.dtype,
        micro_batch_size=ref.micro_batch_size,
        precision=ref.precision,
    )
