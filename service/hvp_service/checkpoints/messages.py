"""Checkpoints as messages."""

from __future__ import annotations

from hvp_protos.v1 import checkpoint_pb2
from hvp_workers.backend import ParameterTensor

from hvp_service.batches.messages import schema_message
from hvp_service.blobs.messages import digest_message
from hvp_service.calls.labels import etag_of
from hvp_service.calls.messages import timestamp
from hvp_service.checkpoints.store import Checkpoint


def parameter_message(tensor: ParameterTensor) -> checkpoint_pb2.ParameterTensor:
    """Make the message of a parameter and its place in a vector."""
    return checkpoint_pb2.ParameterTensor(
        name=tensor.name, shape=tensor.shape, offset=tensor.offset
    )


def checkpoint_message(
    checkpoint: Checkpoint, *, parameters: bool = True
) -> checkpoint_pb2.Checkpoint:
    """Make the message of a checkpoint; in lists it has no parameters."""
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
            parameter_message(tensor) for tensor in (description.parameters if parameters else ())
        ],
        labels=checkpoint.labels,
        etag=etag_of(checkpoint.labels),
        task=description.task,
        batch_schema=schema_message(description.batch_schema),
    )
