"""The file of a data batch, checked as far as that needs no model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from hvp_batches.contents import check_names, check_rows, contents
from hvp_batches.fitting import BatchError
from hvp_batches.schema import FieldContents
from numpy.typing import NDArray
from safetensors.numpy import load_file

from hvp_service.calls.errors import ServiceError
from hvp_service.storage.safetensors_header import (
    Header,
    PickleError,
    SafetensorsError,
    read_header,
)

_DTYPES = ("I64", "BOOL", "F32", "F64")


@dataclass(frozen=True, kw_only=True)
class BatchStatistics:
    """Statistics of a batch; see the proto's DataBatch."""

    num_sequences: int
    sequence_length: int
    num_targets: int
    max_token_id: int
    has_attention_mask: bool
    fields: tuple[FieldContents, ...]

    @property
    def num_positions(self) -> int:
        """Positions of all sequences, padding included; of data without sequences, their rows."""
        return self.num_sequences * max(1, self.sequence_length)


def read_batch(path: Path) -> BatchStatistics:
    """Check a batch. Blocks; memory: the file's size a few times.

    Raises:
        ServiceError: SAFETENSORS_INVALID, or a reason of `check_names`, `contents` or
            `check_rows`.
    """
    try:
        header = read_header(path)
    except SafetensorsError as error:
        raise ServiceError(
            "SAFETENSORS_INVALID",
            f"The batch is not a safetensors file: {error.message} (byte {error.byte_offset}).",
            field="digest",
            metadata={"byte_offset": str(error.byte_offset), "field": error.field},
        ) from None
    except PickleError:
        raise ServiceError(
            "SAFETENSORS_INVALID",
            "The batch is a pickle, which could run code when read; write safetensors.",
            field="digest",
            metadata={"byte_offset": "0"},
        ) from None
    try:
        check_names(list(header.tensors))
        _check_dtypes(header)
        tensors: dict[str, NDArray[np.generic]] = load_file(path)
        fields = contents(tensors)
        check_rows(fields)
    except BatchError as error:
        raise batch_refused(error, "digest") from None
    return statistics_of(fields)


def batch_refused(error: BatchError, field: str) -> ServiceError:
    """Make the refusal of a batch.

    Args:
        error: The fault of the batch.
        field: Field of the request that names the batch.
    """
    return ServiceError(error.reason, error.message, field=field, metadata=error.metadata)


def _check_dtypes(header: Header) -> None:
    for name, span in header.tensors.items():
        if span.dtype not in _DTYPES:
            raise BatchError(
                "BATCH_FIELD_INVALID",
                f"{name} is {span.dtype} and must be {', '.join(_DTYPES[:-1])} or {_DTYPES[-1]}.",
                name,
            )


def statistics_of(fields: tuple[FieldContents, ...]) -> BatchStatistics:
    """The statistics of a batch that has been checked."""
    found = {each.name: each for each in fields}
    ids, labels = found.get("input_ids"), found.get("labels")
    if ids is not None and (ids.kind != "integer" or len(ids.shape) != 2):
        ids = None  # a field of that name that holds no token sequences
    if labels is not None and ids is not None:
        of_positions = labels.kind == "integer" and labels.shape == ids.shape
        predicted = labels if of_positions else None
    else:
        predicted = ids
    largest = (
        None if ids is None else ids.maximum,
        None if predicted is None else predicted.maximum_predicted,
    )
    return BatchStatistics(
        num_sequences=fields[0].shape[0],
        sequence_length=0 if ids is None else ids.shape[1],
        num_targets=0 if predicted is None else predicted.num_predicted,
        max_token_id=max((int(most) for most in largest if most is not None), default=0),
        has_attention_mask="attention_mask" in found,
        fields=fields,
    )
