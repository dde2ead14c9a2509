"""Whether a batch fits a model, decided from the model's schema and the tensors' statistics."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import final

from hvp_batches.schema import IGNORED, POSITIONS, ROWS, BatchField, BatchSchema, FieldContents

_VALUES = {"integer": "integers (int64)", "number": "floating numbers (float32 or float64)"}


@final
class BatchError(Exception):
    """A batch that does not fit.

    Attributes:
        reason: UPPER_SNAKE code of the protos' ErrorReason.
        message: What is wrong and what to do.
        field: The field of the batch at fault.
        metadata: Figures for programs, by name.
    """

    def __init__(
        self, reason: str, message: str, field: str, metadata: Mapping[str, str] | None = None
    ):
        super().__init__(reason, message, field, dict(metadata or {}))
        self.reason, self.message, self.field = reason, message, field
        self.metadata = {"tensor": field[:200], **(metadata or {})}


def check_fit(schema: BatchSchema, batch: Sequence[FieldContents]) -> None:
    """Check that a batch fits a model.

    Args:
        schema: Schema of the model.
        batch: Contents of the batch's fields.

    Raises:
        BatchError: BATCH_FIELD_INVALID: a field is missing, unknown, or of another kind.
            SHAPE_MISMATCH, SEQUENCE_TOO_LONG, TOKEN_ID_OUT_OF_RANGE, BATCH_VALUE_OUT_OF_RANGE,
            BATCH_EMPTY, NO_TARGETS.
    """
    known = {each.name: each for each in schema.fields}
    given = {each.name: each for each in batch}
    for name in given:
        if name not in known:
            raise _unknown(name, known)
    for wanted in schema.fields:
        if wanted.required and wanted.name not in given:
            raise BatchError(
                "BATCH_FIELD_INVALID",
                f"The batch has no {wanted.name}, which the model takes: "
                f"{_VALUES[wanted.kind]} ({', '.join(wanted.dims)}).",
                wanted.name,
            )
    sizes: dict[str, tuple[int, str]] = {}
    for wanted in schema.fields:
        if wanted.name in given:
            _check_shape(wanted, given[wanted.name], sizes)
            _check_values(schema, wanted, given[wanted.name])
    for symbol, most in schema.longest.items():
        if symbol in sizes and sizes[symbol][0] > most:
            raise _too_long(symbol, *sizes[symbol], most)
    if schema.num_targets(batch) == 0:
        first = given[schema.fields[0].name]
        if schema.unit == "token" and first.shape[1] < 2:
            raise BatchError(
                "BATCH_EMPTY",
                f"A batch of shape {first.shape} has nothing to predict: one sequence of two "
                "tokens is the least.",
                first.name,
            )
        raise BatchError(
            "NO_TARGETS", "No target of the batch counts: no loss is defined.", schema.targets
        )


def _unknown(name: str, known: Mapping[str, BatchField]) -> BatchError:
    near = difflib.get_close_matches(name, known, 1)
    guess = f"; did you mean {near[0]}?" if near else "."
    return BatchError(
        "BATCH_FIELD_INVALID",
        f"The batch has a field {name[:200]!r} that the model does not take; it takes "
        f"{', '.join(known)}{guess}",
        name,
    )


def _check_shape(
    wanted: BatchField, given: FieldContents, sizes: dict[str, tuple[int, str]]
) -> None:
    if given.kind != wanted.kind:
        raise BatchError(
            "BATCH_FIELD_INVALID",
            f"{wanted.name} holds {_VALUES[given.kind]}; the model takes {_VALUES[wanted.kind]}.",
            wanted.name,
        )
    right = len(given.shape) == len(wanted.dims) and all(
        size > 0 and (not dim.isdecimal() or int(dim) == size)
        for dim, size in zip(wanted.dims, given.shape, strict=False)
    )
    if not right:
        raise BatchError(
            "SHAPE_MISMATCH",
            f"{wanted.name} is {given.shape}; the model takes ({', '.join(wanted.dims)})"
            f"{', with n rows' if wanted.dims[0] == ROWS else ''}.",
            wanted.name,
        )
    for dim, size in zip(wanted.dims, given.shape, strict=True):
        if dim.isdecimal():
            continue
        first, owner = sizes.setdefault(dim, (size, wanted.name))
        if first != size:
            raise BatchError(
                "SHAPE_MISMATCH",
                f"{wanted.name} is {given.shape} and {owner} has {dim} = {first}; give both the "
                f"same {dim} ({wanted.name} is ({', '.join(wanted.dims)})).",
                wanted.name,
            )


def _check_values(schema: BatchSchema, wanted: BatchField, given: FieldContents) -> None:
    if schema.unit == "token" and wanted.name == schema.targets and given.num_predicted:
        given = _of_positions(given)
    if given.num_ignored and wanted.ignored is None and wanted.kind == "integer":
        given = replace(given, minimum=min(IGNORED, given.minimum or 0))
    for value, beyond in (
        (given.minimum, wanted.minimum is not None and _less(given.minimum, wanted.minimum)),
        (given.maximum, wanted.maximum is not None and _less(wanted.maximum, given.maximum)),
    ):
        if beyond:
            raise _out_of_range(schema, wanted, value)


def _of_positions(given: FieldContents) -> FieldContents:
    """The contents of labels without the first of each row, which no position predicts."""
    if given.minimum_predicted is None:
        return given  # statistics of an older server, which left these labels out itself
    return replace(given, minimum=given.minimum_predicted, maximum=given.maximum_predicted)


def _less(one: float | None, other: float | None) -> bool:
    return one is not None and other is not None and one < other


def _out_of_range(schema: BatchSchema, wanted: BatchField, value: float | None) -> BatchError:
    is_id = wanted is schema.fields[0] or (wanted.name == schema.targets and schema.unit == "token")
    if is_id and wanted.kind == "integer" and wanted.maximum is not None:
        return BatchError(
            "TOKEN_ID_OUT_OF_RANGE",
            f"The batch holds the id {value} in {wanted.name}; the model's ids are 0 to "
            f"{wanted.maximum}, below {wanted.maximum + 1}. Use the tokenizer of this model.",
            wanted.name,
            {"max_token_id": str(value), "vocab_size": str(wanted.maximum + 1)},
        )
    ignored = f", and {wanted.ignored} counts nothing" if wanted.ignored is not None else ""
    low = "any number" if wanted.minimum is None else str(wanted.minimum)
    high = "any number" if wanted.maximum is None else str(wanted.maximum)
    return BatchError(
        "BATCH_VALUE_OUT_OF_RANGE",
        f"{wanted.name} holds {value}; the model takes {low} to {high}{ignored}.",
        wanted.name,
        {"value": str(value)},
    )


def _too_long(symbol: str, size: int, owner: str, most: int) -> BatchError:
    if symbol == POSITIONS:
        return BatchError(
            "SEQUENCE_TOO_LONG",
            f"The batch's sequences have {size} tokens; the model has {most} positions. Cut the "
            "rows, or scale rotary positions in config.json (rope_parameters).",
            owner,
            {"sequence_length": str(size), "max_positions": str(most)},
        )
    return BatchError(
        "SHAPE_MISMATCH",
        f"{owner} has {symbol} = {size}; the model takes {most} at most.",
        owner,
    )
