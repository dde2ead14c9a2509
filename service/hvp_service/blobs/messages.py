"""Blobs, digests and uploads as messages."""

from __future__ import annotations

from hvp_protos.v1 import blob_pb2

from hvp_service.app.config import ServerConfig
from hvp_service.blobs.store import Blob, Digest
from hvp_service.calls.messages import timestamp
from hvp_service.uploads.rows import Upload


def digest_value(message: blob_pb2.Digest) -> Digest:
    """Read a digest from its message, unchecked."""
    return Digest(sha256=message.sha256, size_bytes=message.size_bytes)


def digest_message(digest: Digest) -> blob_pb2.Digest:
    """Make the message of a digest."""
    return blob_pb2.Digest(sha256=digest.sha256, size_bytes=digest.size_bytes)


def blob_message(blob: Blob) -> blob_pb2.Blob:
    """Make the message of a blob."""
    return blob_pb2.Blob(
        name=blob.name,
        digest=digest_message(blob.digest),
        create_time=timestamp(blob.create_time),
    )


def upload_message(upload: Upload, config: ServerConfig) -> blob_pb2.UploadSession:
    """Make the message of an upload session, with the server's limits for it."""
    return blob_pb2.UploadSession(
        name=str(upload.name),
        committed_size=upload.committed_size,
        max_chunk_bytes=config.max_chunk_bytes,
        commit_interval_bytes=config.commit_interval_bytes,
        blob=None if upload.blob is None else blob_message(upload.blob),
        expire_time=timestamp(upload.expire_time),
        writer_epoch=upload.writer_epoch,
    )
