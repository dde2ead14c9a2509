"""What a data batch's file holds, checked with numpy alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from hvp_service.calls.errors import ServiceError
from hvp_service.storage.safetensors_header import (
    Header,
    PickleError,
    SafetensorsError,
    read_header,
)

IGNORED = -100  # the label that does not count

_DTYPES = {
    "input_ids": ("I64",),
    "labels": ("I64",),
    "attention_mask": ("I64", "BOOL"),
}


@dataclass(frozen=True, kw_only=True)
class BatchStatistics:
    """What a batch says about itself; see the proto's DataBatch."""

    num_sequences: int
    sequence_length: int
    num_targets: int
    max_token_id: int
    has_attention_mask: bool


def read_batch(path: Path) -> BatchStatistics:
    """Check a batch. Blocks; memory: the file's size a few times.

    Raises:
        ServiceError: SAFETENSORS_INVALID, BATCH_FIELD_INVALID, BATCH_EMPTY, SHAPE_MISMATCH,
            TOKEN_ID_OUT_OF_RANGE, NO_TARGETS.
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
    _check_header(header)
    tensors: dict[str, NDArray[np.int64]] = load_file(path)
    ids = tensors["input_ids"]
    mask = tensors.get("attention_mask")
    return _statistics(ids, tensors.get("labels", _default_labels(ids, mask)), mask)


def _default_labels(ids: NDArray[np.int64], mask: NDArray[np.int64] | None) -> NDArray[np.int64]:
    """The ids, where they and those before them are no padding: as the ranks take them."""
    if mask is None:
        return ids
    real = mask.astype(bool)
    return np.where(real & np.roll(real, 1, 1), ids, IGNORED)


def _check_header(header: Header) -> None:
    for name, span in header.tensors.items():
        if name not in _DTYPES:
            raise _invalid(
                "BATCH_FIELD_INVALID",
                f"A batch has no tensor {name[:200]!r}; it holds {', '.join(_DTYPES)}.",
                name,
            )
        if span.dtype not in _DTYPES[name]:
            raise _invalid(
                "BATCH_FIELD_INVALID",
                f"{name} is {span.dtype} and must be {' or '.join(_DTYPES[name])}.",
                name,
            )
    if "input_ids" not in header.tensors:
        raise _invalid("BATCH_FIELD_INVALID", "The batch has no input_ids.", "input_ids")
    shape = header.tensors["input_ids"].shape
    if len(shape) != 2:
        raise _invalid(
            "SHAPE_MISMATCH", f"input_ids has shape {shape}, not (sequences, tokens).", "input_ids"
        )
    for name, span in header.tensors.items():
        if span.shape != shape:
            raise _invalid(
                "SHAPE_MISMATCH", f"{name} has shape {span.shape}, input_ids has {shape}.", name
            )
    if shape[0] < 1 or shape[1] < 2:
        raise _invalid(
            "BATCH_EMPTY",
            f"A batch of shape {shape} has nothing to predict: one sequence of two tokens is the "
            "least.",
            "input_ids",
        )


def _statistics(
    ids: NDArray[np.int64], labels: NDArray[np.int64], mask: NDArray[np.int64] | None
) -> BatchStatistics:
    if mask is not None and not np.isin(mask, (0, 1)).all():
        raise _invalid(
            "BATCH_FIELD_INVALID", "attention_mask holds other than 0 and 1.", "attention_mask"
        )
    if ids.min() < 0:
        raise _invalid(
            "TOKEN_ID_OUT_OF_RANGE", f"input_ids holds the negative id {ids.min()}.", "input_ids"
        )
    counts = labels != IGNORED
    if (labels[counts] < 0).any():
        raise _invalid(
            "TOKEN_ID_OUT_OF_RANGE",
            f"labels holds the negative id {labels[counts].min()}; only {IGNORED} is ignored.",
            "labels",
        )
    targets = counts[:, 1:]  # position t predicts token t + 1
    num_targets = int(targets.sum())
    if num_targets == 0:
        raise _invalid(
            "NO_TARGETS", f"After the shift every label is {IGNORED}: no loss is defined.", "labels"
        )
    return BatchStatistics(
        num_sequences=ids.shape[0],
        sequence_length=ids.shape[1],
        num_targets=num_targets,
        max_token_id=int(max(ids.max(), labels[:, 1:][targets].max())),
        has_attention_mask=mask is not None,
    )


def _invalid(reason: str, message: str, tensor: str) -> ServiceError:
    return ServiceError(reason, message, field="digest", metadata={"tensor": tensor[:200]})
