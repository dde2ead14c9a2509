"""What a batch may be made of."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hvp_batches.schema import BatchField, BatchSchema, causal_schema
from hvp_client import InvalidArgumentError
from hvp_client._batches import encode_batch
from safetensors.numpy import load

IDS = np.arange(6).reshape(2, 3)


@pytest.mark.parametrize(
    "ids",
    [
        IDS.tolist(),
        IDS.astype(np.int32),
        IDS.astype(np.uint8),
        np.asfortranarray(IDS),
        IDS[:, ::-1],
    ],
    ids=["list", "int32", "uint8", "column-major", "reversed"],
)
def test_anything_that_holds_integers_is_sent_as_int64(ids: Any) -> None:
    tensors = load(encode_batch({"input_ids": ids}))
    assert tensors["input_ids"].dtype == np.int64
    np.testing.assert_array_equal(tensors["input_ids"], np.asarray(ids))


def test_torch_tensors_are_taken_as_they_are() -> None:
    import torch

    batch = {"input_ids": torch.tensor(IDS), "attention_mask": torch.ones(2, 3, dtype=torch.bool)}
    tensors = load(encode_batch(batch))
    np.testing.assert_array_equal(tensors["input_ids"], IDS)
    np.testing.assert_array_equal(tensors["attention_mask"], np.ones((2, 3), np.int64))


def test_equal_batches_are_equal_bytes_whatever_the_order_of_their_fields() -> None:
    one = encode_batch({"input_ids": IDS, "labels": IDS})
    assert one == encode_batch({"labels": IDS.astype(np.int16), "input_ids": IDS})


@pytest.mark.parametrize(
    ("batch", "reason", "field"),
    [
        ({"input_ids": [[1, 2], [3]]}, "BATCH_FIELD_INVALID", "input_ids"),
        ({"input_ids": [["a", "b"]]}, "BATCH_FIELD_INVALID", "input_ids"),
        ({"input_ids": np.full((1, 2), 2**63, np.uint64)}, "BATCH_FIELD_INVALID", "input_ids"),
        ({}, "BATCH_FIELD_INVALID", "input_ids"),
        ({"input ids": IDS}, "BATCH_FIELD_INVALID", "input ids"),
        ({"input_ids": IDS, "weights": [1.0]}, "SHAPE_MISMATCH", "weights"),
        ({"input_ids": IDS, "attention_mask": IDS[:1]}, "SHAPE_MISMATCH", "attention_mask"),
        ({"x": [0.5, np.nan]}, "BATCH_FIELD_INVALID", "x"),
        ({"x": 0.5}, "SHAPE_MISMATCH", "x"),
        ({"input_ids": IDS[:0]}, "BATCH_EMPTY", "input_ids"),
    ],
)
def test_what_cannot_be_a_batch_is_refused_before_it_is_sent(
    batch: dict[str, Any], reason: str, field: str
) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        encode_batch(batch)
    assert (caught.value.reason, caught.value.field) == (reason, field)


@pytest.mark.parametrize("given", [None, "batch.npz", [IDS], IDS], ids=str)
def test_what_is_no_mapping_is_refused_with_what_a_batch_is(given: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="a mapping with input_ids") as refusal:
        encode_batch(given)
    assert refusal.value.field == "batch"


NONE_COUNTS = [[5, -100, -100], [5, -100, -100]]


@pytest.mark.parametrize(
    ("batch", "reason", "field"),
    [
        ({"input_ids": IDS * 1.0}, "BATCH_FIELD_INVALID", "input_ids"),
        ({"input_ids": IDS[0]}, "SHAPE_MISMATCH", "input_ids"),
        ({"input_ids": -IDS}, "TOKEN_ID_OUT_OF_RANGE", "input_ids"),
        ({"input_ids": IDS[:, :1]}, "BATCH_EMPTY", "input_ids"),
        ({"input_ids": IDS, "labels": -IDS}, "TOKEN_ID_OUT_OF_RANGE", "labels"),
        ({"input_ids": IDS, "labels": IDS[:, :2]}, "SHAPE_MISMATCH", "labels"),
        ({"input_ids": IDS, "labels": NONE_COUNTS}, "NO_TARGETS", "labels"),
        ({"input_ids": IDS, "attention_mask": IDS}, "BATCH_VALUE_OUT_OF_RANGE", "attention_mask"),
    ],
)
def test_what_holds_of_language_models_alone_is_asked_of_a_batch_for_one(
    batch: dict[str, Any], reason: str, field: str
) -> None:
    assert encode_batch(batch)
    with pytest.raises(InvalidArgumentError) as refused:
        encode_batch(batch, causal_schema(100, 8))
    assert (refused.value.reason, refused.value.field) == (reason, field)


def test_the_first_label_of_a_row_is_looked_at_where_no_position_predicts_the_next() -> None:
    dims = ("n", "3")
    schema = BatchSchema(
        fields=(
            BatchField(name="input_ids", kind="integer", dims=dims),
            BatchField(name="labels", kind="integer", dims=dims, minimum=0, maximum=6),
        ),
        outputs=("n", "3", "7"),
        unit="element",
    )
    labels = IDS.copy()
    labels[0, 0] = 1000
    batch = {"input_ids": IDS, "labels": labels}
    assert encode_batch(batch, causal_schema(100, 8))
    with pytest.raises(InvalidArgumentError, match="labels holds 1000") as refused:
        encode_batch(batch, schema)
    assert refused.value.reason == "BATCH_VALUE_OUT_OF_RANGE"


@pytest.mark.parametrize(
    ("batch", "field", "words"),
    [
        ({"labels": IDS}, "input_ids", "has no input_ids, which the model takes"),
        ({"input_ids": IDS, "token_type_ids": IDS}, "token_type_ids", "does not take"),
        ({"input_ids": IDS, "label": IDS}, "label", "did you mean labels"),
    ],
)
def test_what_a_model_does_not_take_is_refused_where_the_model_is_known(
    batch: dict[str, Any], field: str, words: str
) -> None:
    assert encode_batch(batch)
    with pytest.raises(InvalidArgumentError, match=words) as refused:
        encode_batch(batch, causal_schema(100, 8))
    assert (refused.value.reason, refused.value.field) == ("BATCH_FIELD_INVALID", field)
