"""Data batches: token ids, labels and masks as one safetensors blob."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from hvp_protos.v1 import data_batch_pb2
from numpy.typing import NDArray
from safetensors.numpy import save

from hvp_client._arrays import as_numpy
from hvp_client._blobs import Source, upload_blobs
from hvp_client._exceptions import HvpError, InvalidArgumentError
from hvp_client._session import Session, new_request_id

_FIELDS = ("input_ids", "labels", "attention_mask")


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Data that a loss is taken over, checked and held by the server.

    Attributes:
        name: `projects/{project}/dataBatches/{id}`; equal data have equal names.
        num_sequences: n of the (n, s) token ids.
        sequence_length: s.
        num_targets: Labels that count after the shift: the denominator of the mean loss.
        max_token_id: Largest id in use.
        has_attention_mask: Whether a mask was given.
    """

    name: str
    num_sequences: int
    sequence_length: int
    num_targets: int
    max_token_id: int
    has_attention_mask: bool

    def __repr__(self) -> str:
        size = f"{self.num_sequences} x {self.sequence_length} tokens, {self.num_targets} targets"
        return f"<{type(self).__name__} {size} {self.name}>"


def batch_from_proto(message: data_batch_pb2.DataBatch) -> Batch:
    """Make the record of a message."""
    return Batch(
        name=message.name,
        num_sequences=message.num_sequences,
        sequence_length=message.sequence_length,
        num_targets=message.num_targets,
        max_token_id=message.max_token_id,
        has_attention_mask=message.has_attention_mask,
    )


def encode_batch(batch: Mapping[str, Any]) -> bytes:
    """Check a batch as far as its arrays tell and make safetensors bytes of it.

    Args:
        batch: `input_ids` and optionally `labels` and `attention_mask`, each integers (n, s).

    Returns:
        A safetensors file of int64 tensors; equal batches give equal bytes.

    Raises:
        InvalidArgumentError: `BATCH_FIELD_INVALID`, `SHAPE_MISMATCH` or `BATCH_EMPTY`; `field` is
            the entry at fault.
    """
    if not isinstance(batch, Mapping):
        raise _invalid(
            f"a batch is a mapping with input_ids, such as a dict, not {type(batch).__name__}; "
            "np.load reads one of a file",
            "batch",
        )
    for name in batch:
        if name not in _FIELDS:
            raise _invalid(f"a batch has no {name!r}; it has {', '.join(_FIELDS)}", str(name))
    if "input_ids" not in batch:
        raise _invalid("a batch needs input_ids", "input_ids")
    arrays = {name: _int64(name, batch[name]) for name in _FIELDS if name in batch}
    shape = arrays["input_ids"].shape
    if len(shape) != 2:
        raise _invalid(
            f"input_ids must be (sequences, tokens), not {shape}", "input_ids", "SHAPE_MISMATCH"
        )
    if shape[0] < 1 or shape[1] < 2:
        raise _invalid(
            f"a batch of shape {shape} predicts nothing; give sequences of two tokens or more",
            "input_ids",
            "BATCH_EMPTY",
        )
    for name, array in arrays.items():
        if array.shape != shape:
            raise _invalid(
                f"{name} is {array.shape} but input_ids is {shape}", name, "SHAPE_MISMATCH"
            )
    encoded: bytes = save(arrays)
    return encoded


def _int64(name: str, value: Any) -> NDArray[np.int64]:
    try:
        array = as_numpy(value)
    except (ValueError, TypeError) as error:
        raise _invalid(
            f"{name} is no array of integers ({error}); pad sequences to one length", name
        ) from None
    if array.dtype.kind not in "iub":
        raise _invalid(
            f"{name} holds {array.dtype}; token ids, labels and masks are integers", name
        )
    if array.dtype == np.uint64 and array.size and array.max() > np.iinfo(np.int64).max:
        raise _invalid(f"{name} holds numbers too large for int64", name)
    return np.ascontiguousarray(array, dtype=np.int64)


def _invalid(message: str, field: str, reason: str = "BATCH_FIELD_INVALID") -> InvalidArgumentError:
    return InvalidArgumentError(message, reason=reason, field=field)


async def upload_batch(session: Session, batch: Mapping[str, Any]) -> Batch:
    """Upload a batch and register it; see Client.upload_batch."""
    encoded = encode_batch(batch)
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
