"""Vectors: rows that say how to make one again, and the ranks that hold the elements."""

from __future__ import annotations

import asyncio
import contextlib
import os
import uuid
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from hvp_workers.backend import (
    Backend,
    BackendError,
    Dtype,
    Parameters,
    RawFile,
    Seeded,
    Source,
    Space,
    Zeros,
)

from hvp_service.calls.errors import ServiceError
from hvp_service.calls.names import Name, noted
from hvp_service.calls.paging import Pager, PageRequest
from hvp_service.group.supervisor import GroupSupervisor
from hvp_service.storage.clock import SECOND, now_us
from hvp_service.storage.database import Database, vectors
from hvp_service.storage.lifetimes import KEPT, UNTIL_DELETED, Holds, Lifetime
from hvp_service.storage.state_dir import StateDir, sync_file, sync_folder
from hvp_service.vectors.rows import (
    ALL_PARAMETERS,
    Outputs,
    Recipe,
    Selection,
    Vector,
    VectorRows,
    lost,
)

ITEM_BYTES: dict[str, int] = {"float32": 4, "float64": 8}


class VectorStore:
    """Rows of vectors, and `ensure_resident`, the one place that brings elements to the ranks.

    Law: a vector that is deleted cannot be named any more; what the ranks and the disk hold of it
    goes as soon as no call uses it, and no job that has not ended needs it.

    Args:
        database: The database that holds the rows.
        state_dir: The folder that holds the files of elements.
        pager: Makes page tokens.
        group: The ranks, which hold the elements.
        ttl_s: Time to live, after its last use, of a vector that belongs to no session and no job.
    """

    def __init__(
        self,
        database: Database,
        state_dir: StateDir,
        pager: Pager,
        group: GroupSupervisor,
        *,
        ttl_s: float,
    ):
        self._rows = VectorRows(database, pager, ttl_s=ttl_s)
        self._holds = Holds(self._discard_deleted)
        self._state_dir = state_dir
        self._group = group
        self._resident: set[tuple[str, str]] = set()  # (generation, vector id)

    def new(
        self,
        checkpoint: Name,
        dtype: Dtype,
        num_elements: int,
        recipe: Recipe | None,
        identifier: str = "",
        lifetime: Lifetime = UNTIL_DELETED,
        outputs: Outputs | None = None,
        selection: Selection = ALL_PARAMETERS,
    ) -> Vector:
        """A vector of the ranks' present generation, not yet a row.

        Args:
            checkpoint: Name of the checkpoint whose parameters, or outputs, the vector has.
            dtype: Dtype of the elements.
            num_elements: Number of the elements.
            recipe: Recipe to make the vector again; None for a product.
            identifier: Id of the vector; "" makes a new one.
            lifetime: When the vector goes by itself.
            outputs: Space of outputs that the vector belongs to; None for parameter space.
            selection: The parameters that a vector of parameter space has.
        """
        return Vector(
            name=noted(Name(checkpoint.project, "vectors", identifier or uuid.uuid4().hex)),
            checkpoint_id=checkpoint.id,
            dtype=dtype,
            num_elements=num_elements,
            recipe=recipe,
            generation=self._group.backend.generation,
            create_time=now_us(),
            lifetime=lifetime,
            batch_id="" if outputs is None else outputs.batch.id,
            output_shape=() if outputs is None else outputs.shape,
            activation=None if outputs is None else outputs.activation,
            selection=selection if outputs is None else ALL_PARAMETERS,
        )

    def space(self, vector: Vector) -> Space:
        """The backend's name of the vector's space."""
        return Space(
            checkpoint_dir=self._state_dir.checkpoint(vector.checkpoint_id),
            dtype=vector.dtype,
            # A batch's id is its blob's.
            outputs_on=self._state_dir.blob(vector.batch_id) if vector.batch_id else None,
            parameters=vector.selection.names,
            activation=vector.activation,
        )

    def file(self, vector: Vector) -> Path:
        """Path of the file that holds the elements of a vector with recipe `file`."""
        return self._state_dir.vector(vector.name.id)

    async def make(
        self, wanted: Sequence[Vector], work: Callable[[Backend], Coroutine[Any, Any, None]]
    ) -> list[Vector]:
        """Put vectors on the ranks and insert their rows, or leave nothing behind.

        Args:
            wanted: The vectors, from `new`.
            work: Makes the elements, under the vectors' ids.

        Raises:
            ServiceError: WORKER_GROUP_LOST, SESSION_EXPIRED, RESOURCE_NOT_FOUND.
            BackendError: Any that `work` raises.
        """

        async def run(backend: Backend) -> list[Vector]:
            await work(backend)
            made = [replace(vector, generation=backend.generation) for vector in wanted]
            try:
                await self.add(made)
            except BaseException:
                await backend.delete_vectors(ids)  # without rows nobody could name them
                raise
            return made

        ids = [vector.name.id for vector in wanted]
        try:
            return await self._group.call(run, undo=lambda: self._delete_ids(ids))
        except Exception:
            for identifier in ids:
                self._state_dir.vector(identifier).unlink(missing_ok=True)
            raise

    async def add(self, made: Sequence[Vector], *, resident: bool = True) -> None:
        """Insert the rows of vectors whose elements are on the ranks, or only in their files.

        Raises:
            ServiceError: SESSION_EXPIRED, RESOURCE_NOT_FOUND for the checkpoint.
        """
        await self._rows.insert(made)
        if resident:
            self._resident.update((vector.generation, vector.name.id) for vector in made)

    async def get(self, name: Name, *, for_job: bool = False) -> Vector:
        """Look up a vector by its name.

        Args:
            name: Name of the vector.
            for_job: Whether an unfinished job needs it, which finds it even when it was deleted.

        Raises:
            ServiceError: RESOURCE_NOT_FOUND; INPUT_MISSING for a product whose ranks are gone.
        """
        vector = await self._rows.get(name, even_deleted=for_job)
        if not vector.durable and vector.generation != self._group.backend.generation:
            raise lost(name)
        return vector

    @contextlib.asynccontextmanager
    async def using(
        self, names: Sequence[Name], *, for_job: bool = False
    ) -> AsyncIterator[list[Vector]]:
        """Look vectors up and hold them for the block: none goes before its end.

        A vector that is deleted meanwhile cannot be named any more, and its elements go after the
        block. A vector with a time to live has all of it again.

        Args:
            names: Names of the vectors.
            for_job: As for `get`.

        Yields:
            The vectors, in order.

        Raises:
            ServiceError: As `get`.
        """
        with self._holds.hold([name.id for name in names]):
            found = [await self.get(name, for_job=for_job) for name in names]
            found = await self._rows.prolong(found)
            yield found
            await self._rows.prolong(found)

    async def list_page(self, project: str, page: PageRequest) -> tuple[list[Vector], str]:
        """One page of the vectors that can be used, oldest first, and the next page's token."""
        return await self._rows.list_page(project, page, self._group.backend.generation)

    async def ensure_resident(self, backend: Backend, wanted: Sequence[Vector]) -> None:
        """Bring vectors to the ranks that are not there; inside a call on the group.

        Raises:
            ServiceError: INPUT_MISSING for a product of ranks that are gone; RESOURCE_NOT_FOUND
                for a vector that was deleted meanwhile.
            BackendError: VECTOR_MEMORY.
        """
        for vector in wanted:
            if (backend.generation, vector.name.id) in self._resident:
                continue
            if vector.recipe is None:
                raise lost(vector.name)
            try:
                await backend.create_vector(
                    vector.name.id, self.space(vector), self.source(vector, vector.recipe)
                )
            finally:
                # Deleted between its look-up and here, it would stay without a name; its file may
                # have been what could not be read.
                await self._require_row(backend, vector)
            self._resident.add((backend.generation, vector.name.id))

    async def _require_row(self, backend: Backend, vector: Vector) -> None:
        try:
            await self.get(vector.name, for_job=True)
        except ServiceError:
            await backend.delete_vectors([vector.name.id])
            raise

    def source(self, vector: Vector, recipe: Recipe) -> Source:
        """The source from which the backend makes a vector by its recipe."""
        match recipe["kind"]:
            case "seeded":
                return Seeded(int(recipe["seed"]), recipe["distribution"])
            case "file":
                return RawFile(self.file(vector))
            case "zeros":
                return Zeros()
            case "parameters":
                return Parameters()
        raise ValueError(f"no recipe of kind {recipe['kind']!r}")

    async def keep(self, vector: Vector) -> None:
        """Put a vector's elements in its file, so that it has the recipe `file`.

        The file appears whole or not at all.
        """
        temporary = self._state_dir.temporary(f"{vector.name.id}.keep")
        try:
            await self._group.call(lambda b: b.save_vector(vector.name.id, temporary))
            await asyncio.to_thread(sync_file, temporary)
            self.adopt_file(vector, temporary)
        finally:
            temporary.unlink(missing_ok=True)

    async def retain(self, vector: Vector, lifetime: Lifetime = KEPT) -> Vector:
        """Give a vector another lifetime, and let it outlast the ranks; inside `using`.

        Raises:
            ServiceError: RESOURCE_NOT_FOUND when it was deleted meanwhile.
            BackendError: DISK_FULL.
        """
        recipe = vector.recipe
        if recipe is None:
            await self.keep(vector)
            recipe = {"kind": "file"}
        return await self._rows.retain(vector, recipe, lifetime)

    def adopt_file(self, vector: Vector, source: Path) -> None:
        """Hard-link a synced file of elements as the vector's own."""
        target = self.file(vector)
        target.unlink(missing_ok=True)
        os.link(source, target)
        sync_folder(target.parent)

    async def delete(self, name: Name) -> None:
        """Free a vector on the ranks and on disk; one that a job needs goes when the job has ended.

        Raises:
            ServiceError: RESOURCE_NOT_FOUND.
        """
        await self._rows.get(name)
        await self._discard_deleted(
            await self._rows.delete(vectors.c.project == name.project, vectors.c.id == name.id)
        )

    async def _delete_ids(self, ids: Sequence[str]) -> None:
        await self._discard_deleted(await self._rows.delete(vectors.c.id.in_(ids)))

    async def delete_of_checkpoint(self, checkpoint: Name) -> None:
        """Delete every vector of a parameter space."""
        await self._discard_deleted(
            await self._rows.delete(
                vectors.c.project == checkpoint.project, vectors.c.checkpoint_id == checkpoint.id
            )
        )

    async def delete_of_batch(self, batch: Name) -> None:
        """Delete every vector of outputs on a batch."""
        await self._discard_deleted(
            await self._rows.delete(
                vectors.c.project == batch.project, vectors.c.batch_id == batch.id
            )
        )

    async def delete_of_job(self, job: Name) -> None:
        """Delete the eigenvectors of a job, but for those that a caller keeps."""
        await self._discard_deleted(
            await self._rows.delete(
                vectors.c.project == job.project,
                vectors.c.id.startswith(f"{job.id}-", autoescape=True),
                vectors.c.kept.is_(sa.false()),
            )
        )

    async def collect(self) -> None:
        """Delete every vector whose session has ended or whose time is up.

        The rows are gone on return; the ranks may be in a long product and free the rest after it.
        """
        gone = await self._rows.delete_outlived(self._holds.ids)
        if self._state_dir.is_shared:  # others delete rows of what lies here
            held = {identifier for _, identifier in self._resident}
            gone += held - await self._rows.ids()
        self._holds.remove_soon(gone)

    async def next_expiry(self) -> int | None:
        """When the next vector's time to live ends, in microseconds; None where none has one."""
        return await self._rows.next_expiry()

    async def close(self) -> None:
        """Wait until deleted vectors are gone; called after the ranks' end, which frees them."""
        await self._holds.close()

    async def discard(self, names: Collection[str]) -> None:
        """Free vectors on the ranks and on disk that have no row, by id, once nobody uses them."""
        free = self._holds.leave(names)
        for identifier in free:
            self._state_dir.vector(identifier).unlink(missing_ok=True)
        await self.free(free)

    async def _discard_deleted(self, names: Collection[str]) -> None:
        # The rows are gone, so nobody can name the elements; the next start frees them.
        with contextlib.suppress(BackendError, ServiceError):
            await self.discard(names)

    async def withdraw(self, names: Sequence[str]) -> None:
        """Remove every trace of vectors, by id, however far the making of them came."""
        await self._delete_ids(names)
        with contextlib.suppress(BackendError, ServiceError):
            await self.discard(names)

    async def free(self, names: Sequence[str]) -> None:
        """Free vectors on the ranks, by id; `ensure_resident` brings durable ones back.

        The ranks free them after the product that they may be at; this call does not wait for it.
        """
        if not names:
            return
        self._resident.difference_update(
            [entry for entry in self._resident if entry[1] in set(names)]
        )
        self._group.call_soon(lambda backend: backend.delete_vectors(names))

    async def forget_products(self, before_us: int) -> None:
        """Drop the rows of products of earlier ranks and files without a row; called at start.

        Of files that other servers may be about to make a row for, only old ones are dropped.
        """
        await self._rows.delete(vectors.c.recipe.is_(sa.null()), vectors.c.create_time < before_us)
        files = list(self._state_dir.vector("x").parent.iterdir())
        known = await self._rows.ids()
        for path in files:
            if path.stem not in known and not (
                self._state_dir.is_shared and path.stat().st_ctime > before_us / SECOND
            ):
                path.unlink(missing_ok=True)
