"""Sums and multiples of operators: the messages that name them."""

from __future__ import annotations

import math
from typing import Any, TypeGuard

import numpy as np
from hvp_operations.codec import to_message, to_values
from hvp_operations.matrices import Matrix, Term, check_matrix
from hvp_operations.operation import Facts, SpecError
from hvp_operations.partition import Partition
from hvp_operations.wording import shown
from hvp_protos.v1 import operator_pb2

from hvp_client._exceptions import InvalidArgumentError
from hvp_client._kinds import KINDS, kind_name

_Spec = operator_pb2.OperatorSpec


def matrix_of(spec: operator_pb2.OperatorSpec) -> Matrix:
    """The matrix that an operator's message names."""
    terms = tuple(
        Term(
            kind=kind_name(each.kind),
            coefficient=each.coefficient,
            sample_seed=each.sample_seed,
            num_samples=each.num_samples,
        )
        for each in spec.terms
    )
    if spec.kind != _Spec.KIND_UNSPECIFIED:
        terms = (
            Term(
                kind=kind_name(spec.kind),
                sample_seed=spec.sample_seed,
                num_samples=spec.num_samples,
            ),
        )
    return Matrix(
        terms=terms,
        damping=spec.damping,
        precondition=spec.precondition,
        shift=spec.shift,
        blocks=Partition(**to_values(spec.blocks, Partition)) if spec.HasField("blocks") else None,
    )


def with_matrix(spec: operator_pb2.OperatorSpec, matrix: Matrix) -> operator_pb2.OperatorSpec:
    """The message of another matrix of the same loss.

    Raises:
        InvalidArgumentError: `COEFFICIENT_INVALID`: a number is not finite; `TERMS_INVALID`: there
            are too many terms.
    """
    try:
        matrix = check_matrix(matrix, KINDS)
    except SpecError as error:
        raise InvalidArgumentError(
            error.message, reason=error.reason, field=error.field, metadata=error.metadata
        ) from None
    made = operator_pb2.OperatorSpec()
    made.CopyFrom(spec)
    for field in ("kind", "sample_seed", "num_samples", "terms", "damping", "shift", "blocks"):
        made.ClearField(field)
    made.precondition = matrix.precondition
    if matrix.is_plain:
        (only,) = matrix.terms
        made.kind = _Spec.Kind.Value(f"KIND_{only.kind.upper()}")
        made.sample_seed, made.num_samples = only.sample_seed, only.num_samples
        return made
    made.damping, made.shift = matrix.damping, matrix.shift
    if matrix.blocks is not None:
        to_message(matrix.blocks, made.blocks)
    made.terms.extend(
        _Spec.Term(
            coefficient=each.coefficient,
            kind=_Spec.Kind.Value(f"KIND_{each.kind.upper()}"),
            sample_seed=each.sample_seed,
            num_samples=each.num_samples,
        )
        for each in matrix.terms
    )
    return made


def facts_of(
    spec: operator_pb2.OperatorSpec, shape: tuple[int, int], names: tuple[str, ...]
) -> Facts:
    """The facts of an operator (m, n) on these parameters that an operation's rules depend on."""
    matrix = matrix_of(spec)
    return Facts(
        num_parameters=shape[1],
        kind=str(matrix),
        num_outputs=shape[0],
        is_semidefinite=None if matrix.is_plain else matrix.is_semidefinite,
        parameter_names=names,
    )


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a real number that an operator can be multiplied by."""
    is_real = isinstance(value, (int, float, np.integer, np.floating))
    return is_real and not isinstance(value, bool)


def number(value: Any, field: str) -> float:
    """A finite real number.

    Raises:
        InvalidArgumentError: `COEFFICIENT_INVALID`.
    """
    if not is_number(value) or not math.isfinite(value):
        raise InvalidArgumentError(
            f"{field} must be a finite number, not {shown(value)}",
            reason="COEFFICIENT_INVALID",
            field=field,
        )
    return float(value)
