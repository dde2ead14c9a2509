"""The bytes of one upload stream: written in place, hashed as they come, synced now and then."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path
from typing import Protocol

import google_crc32c

from hvp_service.calls.errors import ServiceError

_REREAD_BYTES = 4 << 20


class Hash(Protocol):
    """The methods that are used of a hashlib object."""

    def update(self, data: bytes, /) -> None:
        """Take more bytes."""

    def copy(self) -> Hash:
        """An independent copy of the state."""

    def hexdigest(self) -> str:
        """The digest so far."""


def disk_full(missing_bytes: int) -> ServiceError:
    """Make the refusal of bytes that the disk has no room for."""
    return ServiceError(
        "DISK_FULL",
        "The server's state directory has no room for these bytes; delete checkpoints, batches, "
        "blobs or vectors that are not needed.",
        metadata={"missing_bytes": str(missing_bytes)},
    )


class UploadFile:
    """One writer of a partial file. Every method blocks: call them in a thread, one at a time.

    Attributes:
        position: Number of bytes that have been written and hashed, from the file's start.
    """

    def __init__(self, path: Path, position: int, hash_so_far: Hash | None):
        """Open at the durable position.

        Args:
            path: The partial file; made when absent and nothing is durable yet.
            position: Bytes that earlier streams made durable; what lies behind is dropped.
            hash_so_far: SHA-256 of those bytes if it is known, else they are read again.

        Raises:
            OSError: The file holds fewer than `position` bytes; it is never filled up.
        """
        create = 0 if position else os.O_CREAT
        self._descriptor = os.open(path, os.O_RDWR | create | os.O_CLOEXEC, 0o600)
        try:
            self._check_length(position)
            os.ftruncate(self._descriptor, position)
            self._hash: Hash = hash_so_far or self._hash_of_prefix(position)
        except BaseException:
            os.close(self._descriptor)
            raise
        self.position = position

    def _check_length(self, size: int) -> None:
        length = os.fstat(self._descriptor).st_size
        if length < size:
            raise OSError(f"the upload's file ends at byte {length}, before {size}")

    def _hash_of_prefix(self, size: int) -> Hash:
        digest = hashlib.sha256()
        offset = 0
        while offset < size:
            data = os.pread(self._descriptor, min(_REREAD_BYTES, size - offset), offset)
            if not data:
                raise OSError(f"the upload's file ends at byte {offset}, before {size}")
            digest.update(data)
            offset += len(data)
        return digest

    def append(self, data: bytes, crc32c: int, skip: int) -> None:
        """Check a chunk and write the bytes of it that are new.

        Args:
            data: The chunk's bytes.
            crc32c: CRC-32C of the whole chunk.
            skip: Number of leading bytes that the file has already.

        Raises:
            ServiceError: CHUNK_CHECKSUM_MISMATCH, DISK_FULL.
            OSError: The file lost bytes.
        """
        if google_crc32c.value(data) != crc32c:
            raise ServiceError(
                "CHUNK_CHECKSUM_MISMATCH",
                "A chunk was damaged on its way; ask for the upload's state and resume there.",
                metadata={"offset": str(self.position - skip)},
            )
        self._check_length(self.position)
        new = memoryview(data)[skip:]
        written = 0
        try:
            while written < len(new):
                written += os.pwrite(self._descriptor, new[written:], self.position + written)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise disk_full(len(new) - written) from error
            raise
        self._hash.update(bytes(new) if skip else data)
        self.position += len(new)

    def sync(self) -> Hash:
        """Make everything written durable; the hash of it, for a stream that resumes here.

        Raises:
            OSError: The file lost bytes.
        """
        self._check_length(self.position)
        os.fsync(self._descriptor)
        return self._hash.copy()

    def sha256(self) -> str:
        """Hexadecimal digest of everything written."""
        return self._hash.hexdigest()

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)
