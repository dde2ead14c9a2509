"""Who may write to an upload's file: the newest stream, one step at a time, on any server."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import final

from hvp_service.calls.errors import ServiceError
from hvp_service.calls.names import Name
from hvp_service.storage.state_dir import StateDir
from hvp_service.uploads.rows import Upload, UploadRows

_NUM_LOCKS = 1024  # files by which servers that share the folder wait for one another


@final
class Writers:
    """The streams that write to uploads.

    Law: in a block of `alone` that has passed `require_newest` no other stream's step runs, on
    whatever server, and none of an older stream ever runs after it.

    Args:
        rows: Rows of the uploads, which number the streams.
        state_dir: The folder of the files.
    """

    def __init__(self, rows: UploadRows, state_dir: StateDir):
        self._rows = rows
        self._state_dir = state_dir
        self._locks: dict[str, asyncio.Lock] = {}
        #: The newest stream of this server, by upload.
        self.epochs: dict[str, int] = {}

    @contextlib.asynccontextmanager
    async def alone(self, identifier: str) -> AsyncIterator[None]:
        """Let one step at a time at an upload's file."""
        async with (
            self._locks.setdefault(identifier, asyncio.Lock()),
            self._state_dir.alone(f"upload-{int(identifier[:8], 16) % _NUM_LOCKS}"),
        ):
            yield

    async def begin(self, upload: Upload, busy_s: float) -> Upload:
        """Count one more stream of an upload; the older ones may write no more."""
        upload = await self._rows.new_epoch(upload, busy_s)
        identifier = upload.name.id
        self.epochs[identifier] = max(upload.writer_epoch, self.epochs.get(identifier, 0))
        return upload

    def end(self, identifier: str, epoch: int) -> None:
        """Note that a stream has ended."""
        if self.epochs.get(identifier) == epoch:
            del self.epochs[identifier]
            self._locks.pop(identifier, None)

    def revoke(self, identifier: str) -> None:
        """Let no stream of this server write to an upload any more."""
        self.epochs.pop(identifier, None)

    def tidy(self, identifier: str) -> None:
        """Forget the lock of an upload that nobody writes to."""
        if identifier not in self.epochs:
            self._locks.pop(identifier, None)

    async def is_newest(self, name: Name, epoch: int) -> bool:
        """Whether a stream is still the one that may write; inside `alone`."""
        if self.epochs.get(name.id) != epoch:
            return False
        return not self._state_dir.is_shared or await self._rows.epoch(name) == epoch

    async def require_newest(self, name: Name, epoch: int) -> None:
        """Stop a stream that may not write any more; inside `alone`.

        Raises:
            ServiceError: UPLOAD_SUPERSEDED.
        """
        if not await self.is_newest(name, epoch):
            raise ServiceError(
                "UPLOAD_SUPERSEDED",
                "A newer stream writes to this upload, or it was given up; stop this one.",
                resource=str(name),
            )
