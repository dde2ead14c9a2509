"""Checkpoints: folders of hard links to blobs, and rows that describe them."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import shutil
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import sqlalchemy as sa
import structlog
from hvp_batches.schema import causal_schema, schema_from_json, to_json
from hvp_folders.weights import CONFIG
from hvp_workers.backend import CheckpointDescription, ParameterTensor

from hvp_service.blobs.store import BlobStore, Digest
from hvp_service.calls.errors import ServiceError, not_found
from hvp_service.calls.labels import check_etag
from hvp_service.calls.names import Name, noted
from hvp_service.calls.paging import Pager, PageRequest
from hvp_service.checkpoints.files import check_contents, check_names, choose_files
from hvp_service.group.supervisor import GroupSupervisor
from hvp_service.storage.clock import now_us
from hvp_service.storage.database import Database, checkpoint_files, checkpoints
from hvp_service.storage.lifetimes import Holds
from hvp_service.storage.state_dir import StateDir, sync_folder

log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True)
class CheckpointFile:
    """One file of a checkpoint."""

    path: str
    digest: Digest


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model that has passed every check."""

    name: Name
    files: tuple[CheckpointFile, ...]
    description: CheckpointDescription
    create_time: int  # microseconds
    labels: Mapping[str, str] = field(default_factory=dict)
    ignored_files: tuple[str, ...] = ()  # of the call that made it, and no part of the model

    @property
    def size_bytes(self) -> int:
        """Size of all files together."""
        return sum(file.digest.size_bytes for file in self.files)


def checkpoint_id(files: Sequence[CheckpointFile]) -> str:
    """The id that the same files always have: 32 hexadecimal digits."""
    lines = sorted(f"{file.path}\0{file.digest.sha256}\n" for file in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:32]


class CheckpointStore:
    """Rows and folders of checkpoints.

    Laws:
        The folder of a row is always complete.
        A folder whose row was deleted goes when no call uses it.
    """

    def __init__(
        self,
        database: Database,
        state_dir: StateDir,
        blobs: BlobStore,
        pager: Pager,
        group: GroupSupervisor,
    ):
        self._database = database
        self._state_dir = state_dir
        self._blobs = blobs
        self._pager = pager
        self._group = group
        self._folders = asyncio.Lock()
        self._holds = Holds(self._remove_left)

    async def create(self, project: str, files: Sequence[CheckpointFile]) -> Checkpoint:
        """Check files and register them; files that are registered already are answered at once.

        Files that look like weights and are no part of the model are left out, and named in the
        answer.

        Raises:
            ServiceError: CHECKPOINT_FILES_INVALID, PICKLE_REFUSED, SAFETENSORS_INVALID,
                CONFIG_INVALID, QUANTIZATION_UNSUPPORTED, INPUT_MISSING.
            BackendError: The workers' refusal of the model.
        """
        check_names([file.path for file in files])
        with self._blobs.hold(*(file.digest.sha256 for file in files)):
            return await self._create(project, files)

    async def _create(self, project: str, files: Sequence[CheckpointFile]) -> Checkpoint:
        paths = {
            file.path: await self._blobs.require(project, file.digest, f"files[{index}].digest")
            for index, file in enumerate(files)
        }
        chosen = await asyncio.to_thread(choose_files, paths)
        files = [file for file in files if file.path in {CONFIG, *chosen.files}]
        paths = {file.path: paths[file.path] for file in files}
        name = noted(Name(project, "checkpoints", checkpoint_id(files)))
        async with self._alone_at_folders():
            if (known := await self._find(name)) is not None:
                await self._claim(known)
                return replace(known, ignored_files=chosen.ignored)
            await asyncio.to_thread(check_contents, paths)
            folder = self._state_dir.checkpoint(name.id)
            await asyncio.to_thread(_link, folder, paths)
            try:
                # Not a call on the ranks: a product may hold them for minutes.
                description = await self._group.backend.describe_checkpoint(folder)
                checkpoint = Checkpoint(
                    name=name,
                    files=tuple(files),
                    description=description,
                    create_time=now_us(),
                    ignored_files=chosen.ignored,
                )
                await self._insert(checkpoint)
            except BaseException:
                await asyncio.shield(asyncio.ensure_future(self._remove_unused(name.id)))
                raise
        return checkpoint

    async def get(self, name: Name) -> Checkpoint:
        """Look up a checkpoint by its name.

        Raises:
            ServiceError: RESOURCE_NOT_FOUND.
        """
        checkpoint = await self._find(name)
        if checkpoint is None:
            raise not_found(str(name), "checkpoint")
        return checkpoint

    async def list_page(self, project: str, page: PageRequest) -> tuple[list[Checkpoint], str]:
        """One page of a project's checkpoints, oldest first, and the next page's token."""
        async with self._database.reading() as connection:
            rows, token = await self._pager.fetch(
                connection,
                checkpoints,
                page,
                scope=f"{project}/checkpoints",
                where=[checkpoints.c.project == project],
            )
        found = []
        for row in rows:
            try:
                found.append(await self._find(Name(project, "checkpoints", row.id)))
            except ServiceError as error:
                log.warning("a checkpoint is left out of a list", error=error.message)
        return [checkpoint for checkpoint in found if checkpoint is not None], token

    async def relabel(self, name: Name, labels: Mapping[str, str], etag: str) -> Checkpoint:
        """Give a checkpoint other labels, if its present ones have this tag or the tag is "".

        Raises:
            ServiceError: RESOURCE_NOT_FOUND, ETAG_MISMATCH.
        """
        where = checkpoints.c.project == name.project, checkpoints.c.id == name.id
        async with self._database.writing() as connection:
            known = (
                await connection.execute(sa.select(checkpoints.c.labels).where(*where))
            ).one_or_none()
            if known is None:
                raise not_found(str(name), "checkpoint")
            check_etag(etag, known.labels if isinstance(known.labels, dict) else {}, str(name))
            await connection.execute(
                sa.update(checkpoints).where(*where).values(labels=dict(labels))
            )
        return await self.get(name)

    async def delete(self, name: Name) -> None:
        """Delete a checkpoint; its blobs are for `BlobStore.release`.

        Raises:
            ServiceError: RESOURCE_NOT_FOUND.
        """
        async with self._alone_at_folders():
            async with self._database.writing() as connection:
                await connection.execute(
                    sa.delete(checkpoint_files).where(
                        checkpoint_files.c.project == name.project,
                        checkpoint_files.c.checkpoint_id == name.id,
                    )
                )
                deleted = await connection.execute(
                    sa.delete(checkpoints).where(
                        checkpoints.c.project == name.project, checkpoints.c.id == name.id
                    )
                )
            if not deleted.rowcount:
                raise not_found(str(name), "checkpoint")
            if self._holds.leave([name.id]):
                await self._remove_unused(name.id)

    @contextlib.asynccontextmanager
    async def _alone_at_folders(self) -> AsyncIterator[None]:
        async with self._folders, self._state_dir.alone("checkpoints"):
            yield

    def hold(self, name: Name) -> AbstractContextManager[None]:
        """Use a checkpoint for a block: its folder stays until the block's end."""
        return self._holds.hold([name.id])

    async def close(self) -> None:
        """Wait for folders that are being removed."""
        await self._holds.close()

    async def _remove_left(self, ids: Collection[str]) -> None:
        async with self._alone_at_folders():
            for identifier in ids:
                await self._remove_unused(identifier)

    async def sweep(self) -> None:
        """Remove folders without a row and those that were never completed."""
        async with self._alone_at_folders():
            async with self._database.reading() as connection:
                known = set((await connection.scalars(sa.select(checkpoints.c.id))).all())
            known.update(self._holds.ids)
            for folder in self._state_dir.checkpoint("x").parent.iterdir():
                if folder.name not in known:
                    await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)

    async def _remove_unused(self, identifier: str) -> None:
        async with self._database.reading() as connection:
            user = sa.select(checkpoints.c.id).where(checkpoints.c.id == identifier).limit(1)
            if (await connection.execute(user)).first() is None:
                await asyncio.to_thread(
                    shutil.rmtree, self._state_dir.checkpoint(identifier), ignore_errors=True
                )

    async def _insert(self, checkpoint: Checkpoint) -> None:
        name, description = checkpoint.name, checkpoint.description
        async with self._database.writing() as connection:
            for file in checkpoint.files:
                await self._blobs.claim(connection, name.project, file.digest)
            await connection.execute(
                checkpoints.insert().values(
                    project=name.project,
                    id=name.id,
                    architecture=description.architecture,
                    num_parameters=description.num_parameters,
                    vocab_size=description.vocab_size,
                    max_positions=description.max_positions,
                    stored_dtype=description.stored_dtype,
                    size_bytes=checkpoint.size_bytes,
                    parameters=[[p.name, list(p.shape), p.offset] for p in description.parameters],
                    create_time=checkpoint.create_time,
                    labels={},
                    task=description.task,
                    batch_schema=to_json(description.batch_schema),
                )
            )
            await connection.execute(
                checkpoint_files.insert(),
                [
                    {
                        "project": name.project,
                        "checkpoint_id": name.id,
                        "path": file.path,
                        "sha256": file.digest.sha256,
                        "size_bytes": file.digest.size_bytes,
                    }
                    for file in checkpoint.files
                ],
            )

    async def _claim(self, checkpoint: Checkpoint) -> None:
        async with self._database.writing() as connection:
            for file in checkpoint.files:
                await self._blobs.claim(connection, checkpoint.name.project, file.digest)

    async def _find(self, name: Name) -> Checkpoint | None:
        async with self._database.reading() as connection:
            row = (
                await connection.execute(
                    sa.select(checkpoints).where(
                        checkpoints.c.project == name.project, checkpoints.c.id == name.id
                    )
                )
            ).one_or_none()
            if row is None:
                return None
            files = (
                await connection.execute(
                    sa.select(checkpoint_files)
                    .where(
                        checkpoint_files.c.project == name.project,
                        checkpoint_files.c.checkpoint_id == name.id,
                    )
                    .order_by(checkpoint_files.c.path)
                )
            ).all()
        try:
            return _from_rows(name, row, files)
        except (KeyError, TypeError, ValueError):
            raise ServiceError(
                "CHECKPOINT_UNREADABLE",
                f"The row of {name} is another version's, or damaged; delete the checkpoint and "
                "upload it again.",
                resource=str(name),
            ) from None


def _from_rows(name: Name, row: sa.Row[Any], files: Sequence[sa.Row[Any]]) -> Checkpoint:
    return Checkpoint(
        name=name,
        files=tuple(
            CheckpointFile(
                path=file.path, digest=Digest(sha256=file.sha256, size_bytes=file.size_bytes)
            )
            for file in files
        ),
        description=CheckpointDescription(
            architecture=row.architecture,
            num_parameters=row.num_parameters,
            vocab_size=row.vocab_size,
            max_positions=row.max_positions,
            stored_dtype=row.stored_dtype,
            parameters=tuple(
                ParameterTensor(name=tensor, shape=tuple(shape), offset=offset)
                for tensor, shape, offset in row.parameters
            ),
            task=row.task,
            # Rows of before had no schema: every model was a causal language model.
            batch_schema=causal_schema(row.vocab_size, row.max_positions)
            if row.batch_schema is None
            else schema_from_json(row.batch_schema),
        ),
        create_time=row.create_time,
        labels=row.labels if isinstance(row.labels, dict) else {},
    )


def _link(folder: Path, paths: Mapping[str, Path]) -> None:
    """Make the folder, which appears complete or not at all."""
    if folder.is_dir():  # left by a crash before its row: the name says that it is the same
        return
    building = folder.with_name(f"{folder.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    for name, path in paths.items():
        os.link(path, building / name)
    sync_folder(building)
    building.rename(folder)
    sync_folder(folder.parent)


def require_unused(checkpoint: Name, used: bool) -> None:
    """Refuse to delete a checkpoint that a job uses.

    Raises:
        ServiceError: RESOURCE_IN_USE.
    """
    if used:
        raise ServiceError(
            "RESOURCE_IN_USE",
            f"A job that has not ended uses {checkpoint}; cancel the job first.",
            resource=str(checkpoint),
        )
