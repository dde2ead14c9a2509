"""Data batches: rows of statistics; the data are a blob."""

from __future__ import annotations

import asyncio
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from hvp_batches.schema import FieldContents, contents_from_json, to_json

from hvp_service.batches.contents import BatchStatistics, read_batch
from hvp_service.blobs.store import BlobStore, Digest
from hvp_service.calls.errors import not_found
from hvp_service.calls.names import Name, noted
from hvp_service.calls.paging import Pager, PageRequest
from hvp_service.storage.clock import now_us
from hvp_service.storage.database import Database, data_batches, insert_missing


@dataclass(frozen=True, kw_only=True)
class DataBatch:
    """A batch that has passed every check; its id is the blob's SHA-256."""

    name: Name
    digest: Digest
    statistics: BatchStatistics
    create_time: int  # microseconds


class BatchStore:
    """Rows of data batches."""

    def __init__(self, database: Database, blobs: BlobStore, pager: Pager):
        self._database = database
        self._blobs = blobs
        self._pager = pager

    def path(self, batch: DataBatch) -> Path:
        """Path of the batch's safetensors file."""
        return self._blobs.path(batch.digest)

    def hold(self, name: Name) -> AbstractContextManager[None]:
        """Use a batch for a block: its file stays until the block's end."""
        return self._blobs.hold(name.id)

    async def create(self, project: str, digest: Digest) -> DataBatch:
        """Check a blob and register it; one that is registered already is answered at once.

        Raises:
            ServiceError: INPUT_MISSING, or a reason of `read_batch`.
        """
        with self._blobs.hold(digest.sha256):
            return await self._create(project, digest)

    async def _create(self, project: str, digest: Digest) -> DataBatch:
        path = await self._blobs.require(project, digest, "digest")
        name = noted(Name(project, "dataBatches", digest.sha256))
        if (known := await self._find(name)) is not None:
            async with self._database.writing() as connection:
                await self._blobs.claim(connection, project, digest)
            return known
        statistics = await asyncio.to_thread(read_batch, path)
        batch = DataBatch(name=name, digest=digest, statistics=statistics, create_time=now_us())
        async with self._database.writing() as connection:
            await self._blobs.claim(connection, project, digest)
            await connection.execute(
                insert_missing(connection, data_batches).values(
                    project=project,
                    id=name.id,
                    size_bytes=digest.size_bytes,
                    create_time=batch.create_time,
                    **{
                        **asdict(statistics),
                        "fields": [to_json(each) for each in statistics.fields],
                    },
                )
            )
        return batch

    async def get(self, name: Name) -> DataBatch:
        """Look up a batch by its name.

        Raises:
            ServiceError: RESOURCE_NOT_FOUND.
        """
        batch = await self._find(name)
        if batch is None:
            raise not_found(str(name), "data batch")
        return batch

    async def list_page(self, project: str, page: PageRequest) -> tuple[list[DataBatch], str]:
        """One page of a project's batches, oldest first, and the next page's token."""
        async with self._database.reading() as connection:
            rows, token = await self._pager.fetch(
                connection,
                data_batches,
                page,
                scope=f"{project}/dataBatches",
                where=[data_batches.c.project == project],
            )
        return [_from_row(row) for row in rows], token

    async def delete(self, name: Name) -> None:
        """Delete a batch; its blob is for `BlobStore.release`.

        Raises:
            ServiceError: RESOURCE_NOT_FOUND.
        """
        async with self._database.writing() as connection:
            deleted = await connection.execute(
                sa.delete(data_batches).where(
                    data_batches.c.project == name.project, data_batches.c.id == name.id
                )
            )
        if not deleted.rowcount:
            raise not_found(str(name), "data batch")

    async def _find(self, name: Name) -> DataBatch | None:
        async with self._database.reading() as connection:
            row = (
                await connection.execute(
                    sa.select(data_batches).where(
                        data_batches.c.project == name.project, data_batches.c.id == name.id
                    )
                )
            ).one_or_none()
        return None if row is None else _from_row(row)


def _from_row(row: sa.Row[Any]) -> DataBatch:
    fields = tuple(contents_from_json(each) for each in row.fields) or _fields_of_old_row(row)
    return DataBatch(
        name=Name(row.project, "dataBatches", row.id),
        digest=Digest(sha256=row.id, size_bytes=row.size_bytes),
        statistics=BatchStatistics(
            num_sequences=row.num_sequences,
            sequence_length=row.sequence_length,
            num_targets=row.num_targets,
            max_token_id=row.max_token_id,
            has_attention_mask=row.has_attention_mask,
            fields=fields,
        ),
        create_time=row.create_time,
    )


def _fields_of_old_row(row: sa.Row[Any]) -> tuple[FieldContents, ...]:
    """Contents of the fields, for a row from when every batch was one of token sequences."""
    shape = row.num_sequences, row.sequence_length
    ids = FieldContents(
        name="input_ids",
        kind="integer",
        shape=shape,
        minimum=0,
        maximum=row.max_token_id,
        num_predicted=row.num_targets,
    )
    mask = FieldContents(name="attention_mask", kind="integer", shape=shape, minimum=0, maximum=1)
    return (ids, mask) if row.has_attention_mask else (ids,)
