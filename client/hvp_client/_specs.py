"""Messages of operators and questions, checked here before they travel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from hvp_operations.checking import checked, typed
from hvp_operations.codec import to_message, to_values
from hvp_operations.matrices import MOST_SAMPLES, check_samples
from hvp_operations.operation import SpecError
from hvp_operations.registry import operations
from hvp_operations.wording import shown
from hvp_protos.v1 import job_pb2, operator_pb2

from hvp_client._algebra import facts_of
from hvp_client._batches import Batch
from hvp_client._checkpoints import Checkpoint
from hvp_client._exceptions import (
    FailedPreconditionError,
    InvalidArgumentError,
    UnimplementedError,
)
from hvp_client._kinds import KINDS, kind_name
from hvp_client._names import name_of
from hvp_client._selections import as_globs


def operator_spec(
    checkpoint: Checkpoint | str,
    batch: Batch | str,
    kind: str,
    dtype: Any,
    micro_batch_size: int | None,
    precision: str | None,
    parameters: Any,
    sample_seed: int | None = None,
    num_samples: int | None = None,
    *,
    deterministic: bool = False,
) -> operator_pb2.OperatorSpec:
    """Make the message of an operator; the server checks dtype and precision.

    Args:
        checkpoint: A checkpoint or its name.
        batch: A batch or its name.
        kind: As `kind_name` gives it.
        dtype: A string, a numpy dtype or a torch dtype; None means float32.
        micro_batch_size: None lets the server choose.
        precision: None lets the server choose.
        parameters: Patterns of names; None for all.
        sample_seed: Seed of the labels of a Fisher matrix; None means 0.
        num_samples: Labels that are drawn for each target; None means 1.
        deterministic: Whether it is to give the same bits each time.

    Returns:
        The message.

    Raises:
        InvalidArgumentError: `KIND_UNSPECIFIED`, `MICRO_BATCH_INVALID`, `PARAMETERS_INVALID`,
            `SEED_INVALID`, `NUM_SAMPLES_INVALID` or `DETERMINISTIC_INVALID`.
    """
    if not isinstance(deterministic, bool):
        raise InvalidArgumentError(
            f"deterministic is True or False, not {shown(deterministic)}",
            reason="DETERMINISTIC_INVALID",
            field="deterministic",
        )
    try:
        wire_kind = operator_pb2.OperatorSpec.Kind.Value(f"KIND_{str(kind).upper()}")
    except ValueError:
        raise InvalidArgumentError(
            f"no operator kind {shown(kind)}; there are {', '.join(KINDS)}",
            reason="KIND_UNSPECIFIED",
            field="kind",
        ) from None
    if micro_batch_size is not None and micro_batch_size < 1:
        raise InvalidArgumentError(
            f"micro_batch_size must be at least 1, not {micro_batch_size}; None lets the server "
            "choose",
            reason="MICRO_BATCH_INVALID",
            field="micro_batch_size",
        )
    seed = 0 if sample_seed is None else check_seed(sample_seed, "sample_seed")
    samples = _samples(kind_name(wire_kind), seed, num_samples)
    return operator_pb2.OperatorSpec(
        checkpoint=name_of(checkpoint, "checkpoint"),
        data_batch=name_of(batch, "batch"),
        kind=wire_kind,
        dtype=_dtype_name(dtype),
        micro_batch_size=micro_batch_size or 0,
        precision="" if precision is None else str(precision),
        parameters=as_globs(parameters),
        sample_seed=seed,
        num_samples=samples,
        deterministic=deterministic,
    )


def name_activations(spec: operator_pb2.OperatorSpec, output: str, by: str) -> None:
    """Say in the message of a Jacobian which activations it is of, and taken by.

    Args:
        spec: The message; changed.
        output: `logits`, or the name of a submodule.
        by: `parameters`, the name of a submodule, or `input` for the output's own input.

    Raises:
        InvalidArgumentError: `MODULES_INVALID`: one of them is no text.
    """
    for field, given in (("output", output), ("input", by)):
        if not isinstance(given, str) or not given:
            raise InvalidArgumentError(
                f"{field} is the name of a submodule, not {shown(given)}",
                reason="MODULES_INVALID",
                field=field,
            )
    spec.output_module = "" if output == "logits" else output
    spec.input_module = "" if by in ("parameters", "input") else by
    spec.own_input = by == "input"


def job_spec(
    operation: str,
    operator: operator_pb2.OperatorSpec,
    shape: tuple[int, int],
    names: tuple[str, ...],
    values: Mapping[str, Any],
) -> job_pb2.JobSpec:
    """Make the message of a question about an operator.

    Args:
        operation: Name of the operation.
        operator: The operator that the question is about.
        shape: (m, n) of the operator.
        names: Names of its parameters, in canonical order.
        values: The operation's own arguments, by name.

    Returns:
        The message.

    Raises:
        InvalidArgumentError: `OPERATION_UNKNOWN`, or one of the operation's own reasons; `field` is
            the argument at fault.
    """
    if operation not in operations():
        raise InvalidArgumentError(
            f"no operation {shown(operation)}; there are {', '.join(operations())}",
            reason="OPERATION_UNKNOWN",
            field="operation",
        )
    try:
        spec = checked(operations()[operation], values, facts_of(operator, shape, names))
    except SpecError as error:
        raise _refused(error) from None
    message = job_pb2.JobSpec()
    part = getattr(message, operation)
    part.operator.CopyFrom(operator)
    to_message(spec, part)
    return message


def extended_spec(
    earlier: job_pb2.JobSpec, name: str, changes: Mapping[str, Any]
) -> job_pb2.JobSpec:
    """Make the message of a question that goes on from a job's result.

    Args:
        earlier: The job's own question.
        name: Name of the job, for errors.
        changes: Values that differ, by field.

    Returns:
        The message; the server fills in the vectors to begin with.

    Raises:
        InvalidArgumentError: `EXTENSION_MISMATCH`: the extension may not change a field; a reason
            of the operation's for a value of the wrong type.
        FailedPreconditionError: `EXTENSION_UNSUPPORTED`: jobs of this operation cannot be extended.
        UnimplementedError: `RESULT_UNREADABLE`: the operation is new to this client.
    """
    declared = operations().get(earlier.WhichOneof("spec") or "")
    if declared is None:
        raise UnimplementedError(
            f"{name} asks what this client does not know; install the server's version of it",
            reason="RESULT_UNREADABLE",
        )
    extension = declared.extension
    if extension is None:
        raise FailedPreconditionError(
            f"a job of {declared.name} cannot be extended; ask anew",
            reason="EXTENSION_UNSUPPORTED",
        )
    if unknown := sorted(changes.keys() - set(extension.fields)):
        raise InvalidArgumentError(
            f"an extension of {declared.name} cannot change {shown(unknown[0])}; it can change "
            f"{', '.join(extension.fields)}",
            reason="EXTENSION_MISMATCH",
            field=unknown[0],
        )
    before = getattr(earlier, declared.name)
    values = to_values(before, declared.spec)
    values |= {each.field: () for each in declared.inputs if each.taken_from}
    if extension.new_seed:
        values["seed"] = (values["seed"] + 1) % 2**64
    try:
        spec = typed(declared, {**values, **changes})
    except SpecError as error:
        raise InvalidArgumentError(
            error.message, reason=error.reason, field=error.field, metadata=error.metadata
        ) from None
    message = job_pb2.JobSpec()
    part = getattr(message, declared.name)
    part.operator.CopyFrom(before.operator)
    to_message(spec, part)
    return message


def check_seed(seed: int, field: str = "seed") -> int:
    """Refuse a seed that is no unsigned 64-bit integer, with `SEED_INVALID`."""
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**64:
        raise InvalidArgumentError(
            f"{field} must be an integer from 0 to 2**64 - 1, not {shown(seed)}",
            reason="SEED_INVALID",
            field=field,
        )
    return int(seed)


def _samples(kind: str, seed: int, num_samples: int | None) -> int:
    """The number of labels that a kind draws for each target.

    Raises:
        InvalidArgumentError: `NUM_SAMPLES_INVALID` or `SEED_INVALID`.
    """
    is_whole = isinstance(num_samples, (int, np.integer)) and not isinstance(num_samples, bool)
    if num_samples is not None and not (is_whole and num_samples):
        raise InvalidArgumentError(
            f"num_samples must be an integer from 1 to {MOST_SAMPLES}, not {shown(num_samples)}",
            reason="NUM_SAMPLES_INVALID",
            field="num_samples",
        )
    try:
        return check_samples(kind, seed, int(num_samples or 0))
    except SpecError as error:
        raise _refused(error) from None


def _refused(error: SpecError) -> InvalidArgumentError:
    return InvalidArgumentError(
        error.message, reason=error.reason, field=error.field, metadata=error.metadata
    )


def _dtype_name(dtype: Any) -> str:
    if dtype is None:  # numpy would take it for float64
        return "float32"
    try:
        name: str = np.dtype(dtype).name
    except TypeError:
        name = str(dtype).removeprefix("torch.")
    return name
