"""Data batches: the fields that a model takes, as one safetensors blob."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from hvp_batches.contents import check_names, check_rows, contents
from hvp_batches.fitting import BatchError, check_fit
from hvp_batches.schema import BatchSchema
from hvp_protos.v1 import data_batch_pb2
from numpy.typing import NDArray
from safetensors.numpy import save

from hvp_client._arrays import as_numpy
from hvp_client._blobs import Source, upload_blobs
from hvp_client._exceptions import HvpError, InvalidArgumentError
from hvp_client._session import Session, new_request_id


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Data that a loss is taken over, checked and held by the server.

    Attributes:
        name: `projects/{project}/dataBatches/{id}`; equal data have equal names.
        num_sequences: Rows of every field.
        sequence_length: s of token ids (n, s); 0 where there are none.
        num_targets: Labels of token sequences that count after the shift of a causal language
            model: the denominator of its mean loss. 0 where the count depends on the model.
        max_token_id: Largest token id in use; 0 where there are no ids.
        has_attention_mask: Whether the batch has an `attention_mask`.
        fields: Shape of each field, by its name.
    """

    name: str
    num_sequences: int
    sequence_length: int
    num_targets: int
    max_token_id: int
    has_attention_mask: bool
    fields: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def __repr__(self) -> str:
        size = f"{self.num_sequences} x {self.sequence_length} tokens, {self.num_targets} targets"
        if not self.num_targets:
            shapes = [f"{name} {shape}" for name, shape in self.fields.items()]
            size = f"{self.num_sequences} rows: {', '.join(shapes)}"
        return f"<{type(self).__name__} {size} {self.name}>"


def batch_from_proto(message: data_batch_pb2.DataBatch) -> Batch:
    """Make a `Batch` of its message."""
    return Batch(
        name=message.name,
        num_sequences=message.num_sequences,
        sequence_length=message.sequence_length,
        num_targets=message.num_targets,
        max_token_id=message.max_token_id,
        has_attention_mask=message.has_attention_mask,
        fields={each.name: tuple(each.shape) for each in message.fields},
    )


def encode_batch(batch: Mapping[str, Any], schema: BatchSchema | None = None) -> bytes:
    """Check a batch, as far as can be said before it is sent, and make safetensors bytes of it.

    Args:
        batch: Arrays of integers or floating numbers by field, all with as many rows.
        schema: Schema of the model that the batch is for; None where that is not known yet.

    Returns:
        A safetensors file of int64, float32 and float64 tensors; equal batches give equal bytes.

    Raises:
        InvalidArgumentError: As `check_rows`, and as `check_fit` where there is a schema; `field`
            is the entry at fault.
    """
    if not isinstance(batch, Mapping):
        raise _invalid(
            f"a batch is a mapping with input_ids, such as a dict, not {type(batch).__name__}; "
            "np.load reads one of a file",
            "batch",
        )
    try:
        check_names([str(name) for name in batch])
        arrays = {str(name): _array(str(name), value) for name, value in batch.items()}
        found = contents(arrays)
        check_rows(found)
        if schema is not None:
            check_fit(schema, found)
    except BatchError as error:
        raise InvalidArgumentError(
            error.message, reason=error.reason, field=error.field, metadata=error.metadata
        ) from None
    encoded: bytes = save(dict(sorted(arrays.items())))
    return encoded


def _array(name: str, value: Any) -> NDArray[np.generic]:
    """An array in the dtype that the file stores: int64, float32 or float64."""
    try:
        array = as_numpy(value)
    except (ValueError, TypeError) as error:
        raise _invalid(
            f"{name} is no array of numbers ({error}); pad sequences to one length", name
        ) from None
    if array.dtype.kind not in "iubf":
        raise _invalid(
            f"{name} holds {array.dtype}; fields of a batch are integers or floating numbers", name
        )
    if array.dtype.kind == "f":
        kept = np.float64 if array.dtype.itemsize > 4 else np.float32
        return np.asarray(array, dtype=kept, order="C")
    if array.dtype == np.uint64 and array.size and array.max() > np.iinfo(np.int64).max:
        raise _invalid(f"{name} holds numbers too large for int64", name)
    return np.asarray(array, dtype=np.int64, order="C")


def _invalid(message: str, field: str, reason: str = "BATCH_FIELD_INVALID") -> InvalidArgumentError:
    return InvalidArgumentError(message, reason=reason, field=field)


async def upload_batch(
    session: Session, batch: Mapping[str, Any], schema: BatchSchema | None = None
) -> Batch:
    """Upload a batch and register it; see Client.upload_batch."""
    encoded = encode_batch(batch, schema)
    (digest,) = await upload_blobs(session, [Source(content=encoded)])
    try:
        answer = await session.wire.unary(
            "DataBatchService/CreateDataBatch",
            data_batch_pb2.CreateDataBatchRequest(
                parent=session.parent, request_id=new_request_id(), digest=digest
            ),
            data_batch_pb2.CreateDataBatchResponse,
        )
    except HvpError as error:
        # The request holds a digest only; the caller gave entries.
        error.field = error.metadata.get("tensor", error.field)
        raise
    return batch_from_proto(answer.data_batch)
