"""What operators and jobs are asked for, checked here before it travels."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from hvp_protos.v1 import job_pb2, operator_pb2

from hvp_client._batches import Batch
from hvp_client._checkpoints import Checkpoint
from hvp_client._enums import plain_name
from hvp_client._exceptions import InvalidArgumentError


def operator_spec(
    checkpoint: Checkpoint | str,
    batch: Batch | str,
    kind: str,
    dtype: Any,
    micro_batch_size: int | None,
    precision: str | None,
) -> operator_pb2.OperatorSpec:
    """The message of an operator; the server judges dtype and precision.

    Args:
        checkpoint: A checkpoint or its name.
        batch: A batch or its name.
        kind: As `kind_name` gives it.
        dtype: A string, a numpy dtype or a torch dtype; None means float32.
        micro_batch_size: None lets the server choose.
        precision: None lets the server choose.

    Returns:
        The message.

    Raises:
        InvalidArgumentError: `KIND_UNSPECIFIED` or `MICRO_BATCH_INVALID`.
    """
    try:
        wire_kind = operator_pb2.OperatorSpec.Kind.Value(f"KIND_{str(kind).upper()}")
    except ValueError:
        raise InvalidArgumentError(
            f"no operator kind {kind!r}; there are hessian, ggn and empirical_fisher",
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
    return operator_pb2.OperatorSpec(
        checkpoint=checkpoint if isinstance(checkpoint, str) else checkpoint.name,
        data_batch=batch if isinstance(batch, str) else batch.name,
        kind=wire_kind,
        dtype=_dtype_name(dtype),
        micro_batch_size=micro_batch_size or 0,
        precision="" if precision is None else str(precision),
    )


def kind_name(kind: operator_pb2.OperatorSpec.Kind.ValueType) -> str:
    """Plain name of a kind of operator, as in `ggn`."""
    return plain_name(operator_pb2.OperatorSpec.Kind, kind, "KIND_").lower()


def eigsh_spec(
    operator: operator_pb2.OperatorSpec,
    num_parameters: int,
    k: int,
    which: str,
    *,
    tol: float,
    max_products: int | None,
    seed: int,
    num_lanczos_vectors: int | None,
) -> job_pb2.EigshSpec:
    """The message of a search for eigenpairs; see Operator.eigsh.

    Args:
        operator: Whose.
        num_parameters: It is n by n.
        k: As there, like the following.
        which: See there.
        tol: See there.
        max_products: See there.
        seed: See there.
        num_lanczos_vectors: See there.

    Returns:
        The message.

    Raises:
        InvalidArgumentError: As there.
    """
    return job_pb2.EigshSpec(
        operator=operator,
        k=_count("k", k, num_parameters - 1, "K_INVALID"),
        which=_which(which),
        tol=_tolerance(tol),
        max_products=_optional_count("max_products", max_products),
        seed=check_seed(seed),
        num_lanczos_vectors=_optional_count("num_lanczos_vectors", num_lanczos_vectors),
    )


def check_seed(seed: int) -> int:
    """Refuse what is no unsigned 64-bit number."""
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**64:
        raise InvalidArgumentError(
            f"seed must be an integer from 0 to 2**64 - 1, not {seed!r}",
            reason="SEED_INVALID",
            field="seed",
        )
    return int(seed)


def _dtype_name(dtype: Any) -> str:
    if dtype is None:  # numpy would take it for float64
        return "float32"
    try:
        name: str = np.dtype(dtype).name
    except TypeError:
        name = str(dtype).removeprefix("torch.")
    return name


def _count(field: str, value: int, largest: int, reason: str) -> int:
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not whole or not 1 <= value <= largest:
        raise InvalidArgumentError(
            f"{field} must be an integer from 1 to {largest}, not {value!r}",
            reason=reason,
            field=field,
        )
    return int(value)


def _optional_count(field: str, value: int | None) -> int:
    return 0 if value is None else _count(field, value, 2**31 - 1, f"{field.upper()}_INVALID")


def _which(which: str) -> job_pb2.EigshSpec.Which.ValueType:
    if which not in ("LA", "SA", "LM", "BE"):
        raise InvalidArgumentError(
            f"no which={which!r}; there are LA, SA, LM and BE",
            reason="WHICH_UNSUPPORTED",
            field="which",
        )
    return job_pb2.EigshSpec.Which.Value(f"WHICH_{which}")


def _tolerance(tol: float) -> float:
    try:
        number = float(tol)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number < 1:
        raise InvalidArgumentError(
            f"tol is {tol}; 0 <= tol < 1 is possible. It is relative to the largest eigenvalue's "
            "magnitude: with 1, any vector would do",
            reason="TOL_INVALID",
            field="tol",
        )
    return number
