"""Chunks written fast are what any reader of protobuf takes."""

from __future__ import annotations

from typing import Any

import pytest
from hvp_protos.chunks import encoded, passing_text
from hvp_protos.v1 import blob_pb2, vector_pb2
from hypothesis import given
from hypothesis import strategies as st

OFFSETS = st.integers(-(2**63), 2**63 - 1)
CHECKSUMS = st.integers(0, 2**32 - 1)
HEADS = st.one_of(
    st.builds(
        blob_pb2.UploadBlobRequest,
        upload=st.text(),
        write_offset=OFFSETS,
        crc32c=CHECKSUMS,
        finish=st.booleans(),
    ),
    st.builds(blob_pb2.DownloadBlobResponse, offset=OFFSETS, crc32c=CHECKSUMS),
    st.builds(
        vector_pb2.WriteVectorRequest,
        create=st.none() | st.builds(vector_pb2.CreateVectorRequest, parent=st.text()),
        element_offset=OFFSETS,
        crc32c=CHECKSUMS,
    ),
    st.builds(vector_pb2.ReadVectorResponse, element_offset=OFFSETS, crc32c=CHECKSUMS),
)


@given(head=HEADS, data=st.binary(max_size=300))
def test_the_text_parses_to_the_message_with_its_bytes(head: Any, data: bytes) -> None:
    whole = type(head)()
    whole.CopyFrom(head)
    whole.data = data
    read = type(head).FromString(encoded(head, data))
    assert read == whole
    assert read.SerializeToString(deterministic=True) == whole.SerializeToString(deterministic=True)


@pytest.mark.parametrize("size", [127, 128, (1 << 14) - 1, 1 << 14, 1 << 20, (1 << 21) + 1])
def test_lengths_of_every_width_are_written(size: int) -> None:
    head = blob_pb2.DownloadBlobResponse(offset=7)
    assert blob_pb2.DownloadBlobResponse.FromString(encoded(head, b"x" * size)).data == b"x" * size


def test_a_serializer_hands_on_text_and_writes_messages() -> None:
    message = blob_pb2.DownloadBlobResponse(offset=7, data=b"ab")
    serialize = passing_text(blob_pb2.DownloadBlobResponse.SerializeToString)
    assert serialize(message) == message.SerializeToString()
    assert serialize(b"text") == b"text"
