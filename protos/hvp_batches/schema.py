"""Schemas: the fields that a model takes, and the contents of a batch's fields."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, final

#: A label that counts nothing.
IGNORED = -100
#: The first dimension of every field: rows, of which the loss is a sum.
ROWS = "n"
#: Positions of a sequence.
POSITIONS = "s"

Kind = Literal["integer", "number"]
Unit = Literal["token", "row", "element"]


@final
@dataclass(frozen=True, kw_only=True)
class BatchField:
    """One tensor that a model takes.

    Attributes:
        name: Name of the tensor among the model's inputs.
        kind: `integer` (int64, or bool for masks) or `number` (float32 or float64).
        dims: The dimensions, each a symbol or a size in digits; equal symbols are equal sizes. The
            first is `n`, the rows.
        required: Whether a batch must have the field.
        minimum: The least value allowed; None for no limit.
        maximum: The largest value allowed; None for no limit.
        ignored: A value outside of that range that is allowed and counts nothing; None for none.
    """

    name: str
    kind: Kind
    dims: tuple[str, ...]
    required: bool = True
    minimum: int | None = None
    maximum: int | None = None
    ignored: int | None = None


@final
@dataclass(frozen=True, kw_only=True)
class BatchSchema:
    """The fields of a batch for a model, and the outputs and targets that follow from them.

    Attributes:
        fields: Fields that the model takes; the first is the input that rows are counted by.
        outputs: Dimensions of the tensor that the loss is taken of; () where the model gives the
            loss alone.
        unit: Unit that the mean loss is a mean over: label positions after the shift of a causal
            language model, rows, or elements of the targets that are not ignored.
        targets: Name of the field of targets; "" where there is none.
        longest: The largest size of a dimension, by its symbol.
    """

    fields: tuple[BatchField, ...]
    outputs: tuple[str, ...]
    unit: Unit
    targets: str = "labels"
    longest: Mapping[str, int] = field(default_factory=dict)

    def output_shape(self, batch: Sequence[FieldContents]) -> tuple[int, ...]:
        """The shape of the outputs on a batch that fits; () where there are none."""
        sizes = self._sizes(batch)
        return tuple(sizes[dim] if dim in sizes else int(dim) for dim in self.outputs)

    def num_targets(self, batch: Sequence[FieldContents]) -> int:
        """Number of targets that the mean loss is taken over, on a batch that fits."""
        found = {each.name: each for each in batch}
        if self.unit == "token":
            first = found[self.fields[0].name]
            labels = found.get(self.targets)
            return first.num_predicted if labels is None else labels.num_predicted
        if self.targets not in found:
            return self._sizes(batch)[ROWS]
        target = found[self.targets]
        return target.shape[0] if self.unit == "row" else target.num_elements - target.num_ignored

    def _sizes(self, batch: Sequence[FieldContents]) -> dict[str, int]:
        dims = {each.name: each.dims for each in self.fields}
        return {
            dim: size
            for each in batch
            for dim, size in zip(dims[each.name], each.shape, strict=True)
            if not dim.isdecimal()
        }


@final
@dataclass(frozen=True, kw_only=True)
class FieldContents:
    """Statistics of one tensor of a batch.

    Attributes:
        name: Name of the field.
        kind: Kind of the elements, `integer` or `number`.
        shape: Shape of the tensor.
        minimum: The least value but for −100; None where there is no other.
        maximum: The largest value but for −100; None where there is no other.
        num_ignored: Number of elements that are −100.
        num_predicted: Number of elements that count when position t of a row predicts position
            t + 1: neither −100 nor, among default labels, at or behind padding. 0 where that has no
            meaning.
        minimum_predicted: The least value behind the first of each row, but for −100; None where
            there is none.
        maximum_predicted: The largest value behind the first of each row, but for −100; None where
            there is none.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    minimum: float | None = None
    maximum: float | None = None
    num_ignored: int = 0
    num_predicted: int = 0
    minimum_predicted: float | None = None
    maximum_predicted: float | None = None

    @property
    def num_elements(self) -> int:
        """Number of the tensor's elements."""
        return math.prod(self.shape)


def causal_schema(vocab_size: int, longest: int | None) -> BatchSchema:
    """The schema of a causal language model.

    Args:
        vocab_size: Size of the vocabulary; ids are below it.
        longest: Length of the longest sequence that the model has positions for; None: no limit.
    """
    dims = ROWS, POSITIONS
    last = vocab_size - 1
    return BatchSchema(
        fields=(
            BatchField(name="input_ids", kind="integer", dims=dims, minimum=0, maximum=last),
            BatchField(
                name="labels",
                kind="integer",
                dims=dims,
                required=False,
                minimum=0,
                maximum=last,
                ignored=IGNORED,
            ),
            BatchField(
                name="attention_mask",
                kind="integer",
                dims=dims,
                required=False,
                minimum=0,
                maximum=1,
            ),
        ),
        outputs=(*dims, str(vocab_size)),
        unit="token",
        longest={} if longest is None else {POSITIONS: longest},
    )


def to_json(value: BatchSchema | FieldContents) -> dict[str, Any]:
    """A schema, or a field's contents, as a JSON object."""
    return asdict(value)


def schema_from_json(value: Mapping[str, Any]) -> BatchSchema:
    """The schema that `to_json` gave.

    Raises:
        TypeError: `value` is no schema.
        KeyError: `value` is no schema.
    """
    fields = tuple(BatchField(**{**each, "dims": tuple(each["dims"])}) for each in value["fields"])
    return BatchSchema(**{**value, "fields": fields, "outputs": tuple(value["outputs"])})


def contents_from_json(value: Mapping[str, Any]) -> FieldContents:
    """The field's contents that `to_json` gave.

    Raises:
        TypeError: `value` is no field's contents.
        KeyError: `value` is no field's contents.
    """
    return FieldContents(**{**value, "shape": tuple(value["shape"])})
