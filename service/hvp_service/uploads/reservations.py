"""Room on the disk for uploads: who has some set aside, and for how long."""

from __future__ import annotations

import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import final

from sqlalchemy.ext.asyncio import AsyncConnection

from hvp_service.calls.errors import ServiceError
from hvp_service.uploads.rows import Upload, UploadRows


@final
@dataclass(frozen=True, kw_only=True)
class _Room:
    """Room on the disk for a project's uploads, in bytes."""

    left: int  # neither used nor set aside
    left_of_share: int
    set_aside: int  # for open uploads
    until_lapse_s: float  # until one of them loses it, if nothing comes meanwhile

    @property
    def bytes(self) -> int:
        """Bytes that one more upload may take."""
        return min(self.left, self.left_of_share)


@final
class UploadRoom:
    """Sets room aside for open uploads.

    Law: an upload holds room while bytes of it come, and for `silence_s` after its start and after
    its last chunk; the room of a project's uploads is at most `share` of what is free.

    Args:
        rows: Rows of the uploads.
        root: A folder on the disk whose room is shared.
        silence_s: How long a silent upload holds its room, in seconds.
        share: Share of the free disk that one project's uploads may hold.
    """

    def __init__(self, rows: UploadRows, root: Path, *, silence_s: float, share: float):
        self._rows = rows
        self._root = root
        self._silence_s = silence_s
        self._share = share
        self._heard: dict[str, float] = {}  # monotonic time of an upload's last sign of life

    def hear(self, identifier: str) -> None:
        """Note a sign of life of an upload."""
        self._heard[identifier] = time.monotonic()

    def forget(self, identifier: str) -> None:
        """Note that an upload has ended."""
        self._heard.pop(identifier, None)

    async def has(self, connection: AsyncConnection, project: str, size_bytes: int) -> bool:
        """Whether a project may set `size_bytes` more bytes aside."""
        return size_bytes <= (await self._measure(connection, project)).bytes

    async def take(self, connection: AsyncConnection, upload: Upload) -> None:
        """Set room aside for the bytes that an upload still lacks, unless it holds it already.

        Raises:
            ServiceError: DISK_FULL.
        """
        if not self._holds(upload.name.id):
            await self.check(
                connection, upload.name.project, upload.expected.size_bytes - upload.committed_size
            )
        self.hear(upload.name.id)

    async def check(self, connection: AsyncConnection, project: str, size_bytes: int) -> None:
        """Refuse `size_bytes` more bytes where there is no room for them.

        Raises:
            ServiceError: DISK_FULL.
        """
        room = await self._measure(connection, project)
        if size_bytes <= room.bytes:
            return
        sentences = [
            f"The state directory has no room for {size_bytes - room.bytes} of {size_bytes} bytes"
        ]
        if room.left_of_share < room.left:
            sentences[0] += (
                f": the open uploads of one project may take {self._share:.0%} of what is free"
            )
        lapses = size_bytes <= room.bytes + room.set_aside
        if lapses:
            sentences.append(
                f"{room.set_aside} bytes are set aside for open uploads, and one from which "
                f"nothing comes for {self._silence_s:g} s loses its room: call again in "
                f"{math.ceil(room.until_lapse_s)} s, or cancel those uploads"
            )
        else:
            sentences.append("Delete checkpoints, batches or blobs that are not needed")
        raise ServiceError(
            "DISK_FULL",
            ". ".join(sentences) + ".",
            metadata={
                "needed_bytes": str(size_bytes),
                "available_bytes": str(max(0, room.bytes)),
                "set_aside_bytes": str(room.set_aside),
            },
            retry_after_s=room.until_lapse_s if lapses else None,
        )

    def _holds(self, identifier: str) -> bool:
        heard = self._heard.get(identifier, -math.inf)
        return time.monotonic() - heard <= self._silence_s

    async def _measure(self, connection: AsyncConnection, project: str) -> _Room:
        now = time.monotonic()
        open_uploads = await self._rows.waiting_for_bytes(connection)
        held = [upload for upload in open_uploads if self._holds(upload.name.id)]
        self._heard = {upload.name.id: self._heard[upload.name.id] for upload in held}
        promised = {
            upload.name.id: upload.expected.size_bytes - upload.committed_size for upload in held
        }
        free = shutil.disk_usage(self._root).free
        ours = sum(promised[each.name.id] for each in held if each.name.project == project)
        return _Room(
            left=free - sum(promised.values()),
            left_of_share=int(self._share * free) - ours,
            set_aside=sum(promised.values()),
            until_lapse_s=min(self._heard.values(), default=now) + self._silence_s - now,
        )
