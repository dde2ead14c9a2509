"""Operators as messages, and messages as operators."""

from __future__ import annotations

from hvp_protos.v1 import operator_pb2

from hvp_service.calls.messages import enum_name, enum_value
from hvp_service.operators.resolver import OperatorRef


def operator_value(message: operator_pb2.OperatorSpec) -> OperatorRef:
    """Read an operator from its message, unchecked."""
    return OperatorRef(
        checkpoint=message.checkpoint,
        data_batch=message.data_batch,
        kind=enum_name(operator_pb2.OperatorSpec.Kind, message.kind),
        dtype=message.dtype,
        micro_batch_size=message.micro_batch_size,
        precision=message.precision,
        parameters=tuple(message.parameters),
        sample_seed=message.sample_seed,
        num_samples=message.num_samples,
    )


def operator_message(ref: OperatorRef) -> operator_pb2.OperatorSpec:
    """Make the message of an operator."""
    return operator_pb2.OperatorSpec(
        checkpoint=ref.checkpoint,
        data_batch=ref.data_batch,
        kind=enum_value(operator_pb2.OperatorSpec.Kind, ref.kind),
        dtype=ref.dtype,
        micro_batch_size=ref.micro_batch_size,
        precision=ref.precision,
        parameters=ref.parameters,
        sample_seed=ref.sample_seed,
        num_samples=ref.num_samples,
    )
