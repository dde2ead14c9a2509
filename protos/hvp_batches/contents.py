"""Statistics of a batch's tensors, and the checks of them that need no model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from hvp_batches.fitting import BatchError
from hvp_batches.schema import IGNORED, FieldContents

MAX_FIELDS = 64
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")


def check_names(names: Sequence[str]) -> None:
    """Check that these names can be the fields of a batch.

    Raises:
        BatchError: BATCH_FIELD_INVALID.
    """
    if not names:
        raise _invalid("A batch has one field or more, such as input_ids.", "input_ids")
    if len(names) > MAX_FIELDS:
        raise _invalid(f"A batch has {len(names)} fields; {MAX_FIELDS} are possible.", names[-1])
    for name in names:
        if not _NAME.fullmatch(name):
            raise _invalid(
                f"{name[:80]!r} is no name of a field: a letter or _, then letters, digits and _, "
                "64 at most.",
                name,
            )


def contents(arrays: Mapping[str, NDArray[np.generic]]) -> tuple[FieldContents, ...]:
    """Take the statistics of each array of a batch. Cost: a few passes over the data.

    Args:
        arrays: Arrays of integers, booleans or floating numbers, by field.

    Returns:
        The statistics of the fields, in the order given.

    Raises:
        BatchError: BATCH_FIELD_INVALID: a number is infinite or undefined.
    """
    return tuple(_field(name, array, arrays) for name, array in arrays.items())


def _field(
    name: str, array: NDArray[np.generic], arrays: Mapping[str, NDArray[np.generic]]
) -> FieldContents:
    if array.dtype.kind == "f":
        if not np.isfinite(array).all():
            raise _invalid(f"{name} holds numbers that are infinite or undefined.", name)
        least, largest = (array.min(), array.max()) if array.size else (None, None)
        return FieldContents(
            name=name,
            kind="number",
            shape=array.shape,
            minimum=None if least is None else float(least),
            maximum=None if largest is None else float(largest),
        )
    values = array.astype(np.int64)
    counts = values != IGNORED
    counted = values[counts]
    # Where position t of a row predicts label t + 1, nobody looks at the first label.
    predicted = values[:, 1:][counts[:, 1:]] if values.ndim == 2 else counted[:0]
    return FieldContents(
        name=name,
        kind="integer",
        shape=array.shape,
        minimum=int(counted.min()) if counted.size else None,
        maximum=int(counted.max()) if counted.size else None,
        num_ignored=int(values.size - counts.sum()),
        num_predicted=_num_predicted(name, counts, arrays),
        minimum_predicted=int(predicted.min()) if predicted.size else None,
        maximum_predicted=int(predicted.max()) if predicted.size else None,
    )


def _num_predicted(
    name: str, counts: NDArray[np.bool_], arrays: Mapping[str, NDArray[np.generic]]
) -> int:
    """Number of labels that count when position t predicts label t + 1; ids are default labels."""
    if counts.ndim != 2:
        return 0
    mask = arrays.get("attention_mask")
    if name == "input_ids" and mask is not None and mask.shape == counts.shape:
        # Where a token and the one before it are no padding.
        real = mask.astype(bool)
        return int((real[:, 1:] & real[:, :-1]).sum())
    return int(counts[:, 1:].sum())


def check_rows(batch: Sequence[FieldContents]) -> None:
    """Check a batch whose model is not known: all fields have as many rows, and one or more.

    What a field is to hold beside that is for the model's schema to say, also where a field has a
    name that language models know: a registered module may call anything `input_ids`.

    Raises:
        BatchError: SHAPE_MISMATCH, BATCH_EMPTY.
    """
    first = batch[0]
    for each in batch:
        if not each.shape:
            raise BatchError(
                "SHAPE_MISMATCH", f"{each.name} is one number; give rows of them.", each.name
            )
        if each.shape[0] != first.shape[0]:
            raise BatchError(
                "SHAPE_MISMATCH",
                f"{each.name} has {each.shape[0]} rows and {first.name} has {first.shape[0]}; give "
                "as many.",
                each.name,
            )
        if not each.num_elements:
            raise BatchError(
                "BATCH_EMPTY", f"{each.name} is {each.shape}, which holds nothing.", each.name
            )


def _invalid(message: str, field: str) -> BatchError:
    return BatchError("BATCH_FIELD_INVALID", message, field)
