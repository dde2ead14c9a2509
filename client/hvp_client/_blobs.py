"""Bringing files to the server: only what it lacks, in checked chunks, resumed after any break."""

from __future__ import annotations

import asyncio
import hashlib
import io
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import final

import google_crc32c
from hvp_protos.chunks import encoded
from hvp_protos.v1 import blob_pb2

from hvp_client._exceptions import HvpError, NotFoundError
from hvp_client._session import Session, gather_bounded, new_request_id
from hvp_client._times import from_timestamp
from hvp_client._wire import CHUNK_BYTES, Pauses, is_resumable

ProgressCallback = Callable[[int, int], None]

_PARALLEL_UPLOADS = 4  # as many as there are connections for bulk data
_SLOWEST_DISK = 20e6  # bytes a second that a server reads at least


@dataclass(frozen=True, kw_only=True)
class Blob:
    """A file that the server holds, of which checkpoints and batches are made.

    Attributes:
        name: `projects/{project}/blobs/{sha256}`.
        size_bytes: Size of the content.
        create_time: When the upload was complete, UTC.
    """

    name: str
    size_bytes: int
    create_time: datetime


def blob_from_proto(message: blob_pb2.Blob) -> Blob:
    """Make a `Blob` of its message."""
    return Blob(
        name=message.name,
        size_bytes=message.digest.size_bytes,
        create_time=from_timestamp(message.create_time),
    )


@dataclass(frozen=True, kw_only=True)
class Source:
    """Bytes to upload: a file, or bytes in memory."""

    content: Path | bytes

    def open(self) -> io.BufferedIOBase:
        """Open for reading from the start."""
        return (
            io.BytesIO(self.content) if isinstance(self.content, bytes) else self.content.open("rb")
        )

    def digest(self) -> blob_pb2.Digest:
        """Size and SHA-256; reads everything once."""
        with self.open() as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            return blob_pb2.Digest(sha256=sha256, size_bytes=file.seek(0, io.SEEK_END))


async def upload_blobs(
    session: Session, sources: Sequence[Source], progress: ProgressCallback | None = None
) -> list[blob_pb2.Digest]:
    """Make the server hold these bytes.

    Args:
        session: The client's session.
        sources: Contents to bring. Equal ones are sent once; the server's own are not sent again.
        progress: Called with (bytes done, bytes in all) as chunks go out; the first number steps
            back when a broken connection lost bytes.

    Returns:
        The digests, in the order of the sources.

    Raises:
        HvpError: The server refused, or patience with a broken connection is over.
    """
    digests = await gather_bounded(
        _PARALLEL_UPLOADS, [partial(asyncio.to_thread, source.digest) for source in sources]
    )
    answer = await session.wire.unary(
        "BlobService/FindMissingBlobs",
        blob_pb2.FindMissingBlobsRequest(parent=session.parent, digests=digests),
        blob_pb2.FindMissingBlobsResponse,
    )
    missing = {digest.sha256 for digest in answer.missing}
    by_sha256 = {
        digest.sha256: (source, digest) for source, digest in zip(sources, digests, strict=True)
    }
    meter = _Meter(
        progress, {sha256: digest.size_bytes for sha256, (_, digest) in by_sha256.items()}
    )
    for sha256 in by_sha256.keys() - missing:
        meter.done[sha256] = by_sha256[sha256][1].size_bytes
    meter.show()
    await gather_bounded(
        _PARALLEL_UPLOADS,
        [_Upload(session, *by_sha256[sha256], meter).run for sha256 in sorted(missing)],
    )
    return digests


@final
class _Meter:
    """Adds up the bytes done by parallel uploads, for the caller's progress callback."""

    def __init__(self, callback: ProgressCallback | None, sizes: dict[str, int]):
        self._callback = callback
        self._total_bytes = sum(sizes.values())
        self.done = dict.fromkeys(sizes, 0)  # SHA-256 -> bytes

    def show(self) -> None:
        if self._callback is not None:
            self._callback(sum(self.done.values()), self._total_bytes)


@final
class _Upload:
    """The upload of one blob, resumed until the server has verified it."""

    def __init__(self, session: Session, source: Source, digest: blob_pb2.Digest, meter: _Meter):
        self._session = session
        self._source = source
        self._digest = digest
        self._meter = meter

    async def run(self) -> None:
        """Send until the server has verified the whole."""
        wire = self._session.wire
        pauses = Pauses(wire.retry, wire.retry.patience_s)
        upload = await self._start()
        durable_bytes = upload.committed_size
        while not upload.HasField("blob"):
            try:
                upload = await self._send(upload)
                break
            except HvpError as error:
                if not is_resumable(error):
                    raise
                await pauses.after(error)
            upload = await self._resume(upload.name)
            if upload.committed_size > durable_bytes:
                durable_bytes = upload.committed_size
                pauses.reset()
        self._advance(self._digest.size_bytes)

    async def _start(self) -> blob_pb2.UploadSession:
        answer = await self._session.wire.unary(
            "BlobService/StartUpload",
            blob_pb2.StartUploadRequest(
                parent=self._session.parent, request_id=new_request_id(), expected=self._digest
            ),
            blob_pb2.StartUploadResponse,
        )
        return answer.upload

    async def _resume(self, name: str) -> blob_pb2.UploadSession:
        try:
            answer = await self._session.wire.unary(
                "BlobService/GetUpload",
                blob_pb2.GetUploadRequest(name=name),
                blob_pb2.GetUploadResponse,
            )
        except NotFoundError:
            # The session ended while nobody was connected.
            return await self._start()
        return answer.upload

    async def _send(self, upload: blob_pb2.UploadSession) -> blob_pb2.UploadSession:
        """Stream everything from `committed_size` on."""
        wire = self._session.wire
        # A server that was started anew reads what it has before it takes more.
        silence_s = wire.timeout.silence_s + upload.committed_size / _SLOWEST_DISK
        answer = await wire.client_stream(
            "BlobService/UploadBlob",
            self._messages(upload),
            blob_pb2.UploadBlobResponse,
            silence_s=silence_s,
            answer_s=silence_s,
        )
        return answer.upload

    async def _messages(self, upload: blob_pb2.UploadSession) -> AsyncIterator[bytes]:
        chunk_bytes = min(CHUNK_BYTES, upload.max_chunk_bytes or CHUNK_BYTES)
        offset = upload.committed_size
        with self._source.open() as file:
            file.seek(offset)
            while True:
                data, crc32c = await asyncio.to_thread(_read_chunk, file, chunk_bytes)
                end = offset + len(data)
                # An empty read means that the file has shrunk: the server then finds the digest
                # wrong and says so.
                finish = end >= self._digest.size_bytes or not data
                self._advance(offset)
                head = blob_pb2.UploadBlobRequest(
                    upload=upload.name if offset == upload.committed_size else "",
                    write_offset=offset,
                    crc32c=crc32c,
                    finish=finish,
                )
                yield encoded(head, data)
                offset = end
                if finish:
                    return

    def _advance(self, done_bytes: int) -> None:
        self._meter.done[self._digest.sha256] = done_bytes
        self._meter.show()


def _read_chunk(file: io.BufferedIOBase, size: int) -> tuple[bytes, int]:
    data = file.read(size)
    return data, google_crc32c.value(data)
