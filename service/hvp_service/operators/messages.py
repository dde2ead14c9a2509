"""Operators as messages, and messages as operators."""

from __future__ import annotations

from hvp_operations.codec import to_message, to_values
from hvp_operations.matrices import Term
from hvp_operations.partition import Partition
from hvp_protos.v1 import operator_pb2

from hvp_service.calls.messages import enum_name, enum_value
from hvp_service.operators.kinds import plain_kind
from hvp_service.operators.resolver import OperatorRef

#: Kinds of the matrices that a sum may have.
SYMMETRIC = [
    plain_kind(kind)
    for kind in operator_pb2.OperatorSpec.Kind.keys()  # noqa: SIM118 (it is no dict)
    if kind not in ("KIND_UNSPECIFIED", "KIND_JACOBIAN")
]


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
        terms=tuple(
            Term(
                kind=plain_kind(enum_name(operator_pb2.OperatorSpec.Kind, each.kind)),
                coefficient=each.coefficient,
                sample_seed=each.sample_seed,
                num_samples=each.num_samples,
            )
            for each in message.terms
        ),
        damping=message.damping,
        precondition=message.precondition,
        shift=message.shift,
        output_module=message.output_module,
        input_module=message.input_module,
        own_input=message.own_input,
        deterministic=message.deterministic,
        blocks=Partition(**to_values(message.blocks, Partition))
        if message.HasField("blocks")
        else None,
    )


def operator_message(ref: OperatorRef) -> operator_pb2.OperatorSpec:
    """Make the message of an operator."""
    message = operator_pb2.OperatorSpec(
        checkpoint=ref.checkpoint,
        data_batch=ref.data_batch,
        kind=enum_value(operator_pb2.OperatorSpec.Kind, ref.kind),
        dtype=ref.dtype,
        micro_batch_size=ref.micro_batch_size,
        precision=ref.precision,
        parameters=ref.parameters,
        sample_seed=ref.sample_seed,
        num_samples=ref.num_samples,
        terms=[
            operator_pb2.OperatorSpec.Term(
                kind=enum_value(operator_pb2.OperatorSpec.Kind, f"KIND_{each.kind.upper()}"),
                coefficient=each.coefficient,
                sample_seed=each.sample_seed,
                num_samples=each.num_samples,
            )
            for each in ref.terms
        ],
        damping=ref.damping,
        precondition=ref.precondition,
        shift=ref.shift,
        output_module=ref.output_module,
        input_module=ref.input_module,
        own_input=ref.own_input,
        deterministic=ref.deterministic,
    )
    if ref.blocks is not None:
        to_message(ref.blocks, message.blocks)
    return message
