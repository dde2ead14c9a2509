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
    # The first label of a sequence is of no position: nobody looks at it.
    looked_at = (
        slice(1, None) if name == "labels" and _are_of_positions(array, arrays) else slice(None)
    )
    counted = values[..., looked_at][counts[..., looked_at]]
    return FieldContents(
        name=name,
        kind="integer",
        shape=array.shape,
        minimum=int(counted.min()) if counted.size else None,
        maximum=int(counted.max()) if counted.size else None,
        num_ignored=int(values.size - counts.sum()),
        num_predicted=_num_predicted(name, counts, arrays),
    )


def _are_of_positions(
    labels: NDArray[np.generic], arrays: Mapping[str, NDArray[np.generic]]
) -> bool:
    """Whether labels are those of a causal language model, one for each token."""
    ids = arrays.get("input_ids")
    return ids is not None and labels.ndim == 2 and labels.shape == ids.shape


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


def check_alone(batch: Sequence[FieldContents]) -> None:
    """Check a batch whose model is not known: one with `input_ids` as one of token sequences.

    Raises:
        BatchError: BATCH_FIELD_INVALID, SHAPE_MISMATCH, BATCH_EMPTY, TOKEN_ID_OUT_OF_RANGE,
            NO_TARGETS.
    """
    check_rows(batch)
    given = {each.name: each for each in batch}
    if "input_ids" in given:
        _check_tokens(given)


def check_rows(batch: Sequence[FieldContents]) -> None:
    """See that all fields have as many rows, and one or more.

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


def _check_tokens(given: Mapping[str, FieldContents]) -> None:
    ids = given["input_ids"]
    if ids.kind != "integer":
        raise _invalid("input_ids holds floating numbers; token ids are integers.", "input_ids")
    if len(ids.shape) != 2:
        raise BatchError(
            "SHAPE_MISMATCH",
            f"input_ids is {ids.shape} and must be (sequences, tokens).",
            "input_ids",
        )
    least = IGNORED if ids.num_ignored else ids.minimum
    if least is not None and least < 0:
        raise BatchError(
            "TOKEN_ID_OUT_OF_RANGE", f"input_ids holds the negative id {least}.", "input_ids"
        )
    mask, labels = given.get("attention_mask"), given.get("labels")
    if mask is not None:
        _check_mask(mask, ids)
    if labels is None or (labels.kind == "integer" and len(labels.shape) == 2):
        _check_labels(labels or ids, ids)


def _check_mask(mask: FieldContents, ids: FieldContents) -> None:
    if mask.shape != ids.shape:
        raise _shapes_differ(mask, ids)
    values = {mask.minimum, mask.maximum} | ({IGNORED} if mask.num_ignored else set())
    if mask.kind != "integer" or values - {0, 1}:
        raise _invalid("attention_mask holds other than 0 and 1.", "attention_mask")


def _check_labels(labels: FieldContents, ids: FieldContents) -> None:
    """Check labels of positions; a batch without labels passes its ids, which are the default."""
    if labels.shape != ids.shape:
        raise _shapes_differ(labels, ids)
    if labels.minimum is not None and labels.minimum < 0:
        raise BatchError(
            "TOKEN_ID_OUT_OF_RANGE",
            f"labels holds the negative id {labels.minimum}; only {IGNORED} is ignored.",
            "labels",
        )
    if ids.shape[1] < 2:
        raise BatchError(
            "BATCH_EMPTY",
            f"A batch of shape {ids.shape} has nothing to predict: one sequence of two tokens is "
            "the least.",
            "input_ids",
        )
    if labels.num_predicted == 0:
        raise BatchError(
            "NO_TARGETS",
            f"After the shift every label is {IGNORED}: no loss is defined.",
            "labels",
        )


def _shapes_differ(one: FieldContents, ids: FieldContents) -> BatchError:
    return BatchError(
        "SHAPE_MISMATCH", f"{one.name} is {one.shape} and input_ids is {ids.shape}.", one.name
    )


def _invalid(message: str, field: str) -> BatchError:
    return BatchError("BATCH_FIELD_INVALID", message, field)
