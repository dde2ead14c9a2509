"""Vectors as messages."""

from __future__ import annotations

from hvp_protos.v1 import vector_pb2

from hvp_service.calls.messages import timestamp
from hvp_service.vectors.rows import Vector


def vector_message(vector: Vector) -> vector_pb2.Vector:
    """Make the message of a vector."""
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
        parameters=vector.selection.globs,
        module=vector.activation.module if vector.activation else "",
        of_input=vector.activation is not None and vector.activation.side == "input",
    )
