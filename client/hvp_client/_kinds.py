"""Kinds of operator by their plain names; the command line needs them before numpy and grpc."""

from __future__ import annotations

from hvp_protos.v1 import operator_pb2

from hvp_client._enums import plain_name


def kind_name(kind: operator_pb2.OperatorSpec.Kind.ValueType) -> str:
    """Plain name of a kind of operator, as in `ggn`."""
    return plain_name(operator_pb2.OperatorSpec.Kind, kind, "KIND_").lower()


KINDS = [
    kind_name(kind)
    for kind in operator_pb2.OperatorSpec.Kind.values()
    # A Jacobian is no square matrix: client.jacobian.
    if kind
    not in (operator_pb2.OperatorSpec.KIND_UNSPECIFIED, operator_pb2.OperatorSpec.KIND_JACOBIAN)
]
