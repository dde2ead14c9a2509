"""Vectors: rows that say how to make one again, and the ranks that hold the elements."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
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

from hvp_service.clock import now_us
from hvp_service.database import Database, vectors
from hvp_service.errors import ServiceError, not_found
from hvp_service.group_supervisor import GroupSupervisor
from hvp_service.names import Name
from hvp_service.paging import Pager, PageRequest
from hvp_service.state_dir import StateDir, sync_folder

Recipe = Mapping[str, Any]  # JSON; "kind" is seeded, file, zeros or parameters

ITEM_BYTES: dict[str, int] = {"float32": 4, "float64": 8}


@dataclass(frozen=True, kw_only=True)
class Vector:
    """One vector as its row has it."""

    name: Name
    checkpoint_id: str
    dtype: Dtype
    num_elements: int
    recipe: Recipe | None  # None: a product; it ends with the ranks
    generation: str
    create_time: int  # microseconds

    @property
    def durable(self) -> bool:
        """Whether it can be made again."""
        return self.recipe is not None

    @property
    def checkpoint(self) -> Name:
        """Of the parameter space."""
        return Name(self.name.project, "checkpoints", self.checkpoint_id)


class VectorStore:
    """Rows of vectors, and `ensure_resident`, the one place that brings elements to the ranks."""

    def __init__(
        self,
        database: Database,
        state_dir: StateDir,
        pager: Pager,
        group: GroupSupervisor,
    ):
        self._database = database
        self._state_dir = state_dir
        self._pager = pager
        self._group = group
        self._resident: set[tuple[str, str]] = set()  # (generation, vector id)

    def new(
        self,
        checkpoint: Name,
        dtype: Dtype,
        num_elements: int,
        recipe: Recipe | None,
        identifier: str = "",
    ) -> Vector:
        """A vector of the ranks' present generation, not yet a row; by default with a new name."""
        return Vector(
            name=Name(checkpoint.project, "vectors", identifier or uuid.uuid4().hex),
            checkpoint_id=checkpoint.id,
            dtype=dtype,
            num_elements=num_elements,
            recipe=recipe,
            generation=self._group.backend.generation,
            create_time=now_us(),
        )

    def space(self, vector: Vector) -> Space:
        """The backend's name of the vector's space."""
        return Space(
            checkpoint_dir=self._state_dir.checkpoint(vector.checkpoint_id), dtype=vector.dtype
        )

    def file(self, vector: Vector) -> Path:
        """Where the elements of a vector with recipe `file` are."""
        return self._state_dir.vector(vector.name.id)

    async def make(
        self, wanted: Sequence[Vector], work: Callable[[Backend], Coroutine[Any, Any, None]]
    ) -> list[Vector]:
        """Put vectors on the ranks and insert their rows, or leave nothing behind.

        Args:
            wanted: The vectors, from `new`.
            work: Makes the elements, under the vectors' ids.

        Raises:
            ServiceError: WORKER_GROUP_LOST.
            BackendError: What `work` raised.
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
        """Insert the rows of vectors, which the ranks hold now or have in files."""
        async with self._database.writing() as connection:
            await connection.execute(
                # An eigenvector's name follows from its job: a second attempt replaces the first's.
                sa.insert(vectors).prefix_with("OR REPLACE"),
                [
                    {
                        "project": vector.name.project,
                        "id": vector.name.id,
                        "checkpoint_id": vector.checkpoint_id,
                        "dtype": vector.dtype,
                        "num_elements": vector.num_elements,
                        "recipe": vector.recipe,
                        "generation": vector.generation,
                        "create_time": vector.create_time,
                    }
                    for vector in made
                ],
            )
        if resident:
            self._resident.update((vector.generation, vector.name.id) for vector in made)

    async def get(self, name: Name) -> Vector:
        """The vector of a name.

        Raises:
            ServiceError: RESOURCE_NOT_FOUND; INPUT_MISSING for a product whose ranks are gone.
        """
        async with self._database.reading() as connection:
            row = (
                await connection.execute(
                    sa.select(vectors).where(
                        vectors.c.project == name.project, vectors.c.id == name.id
                    )
                )
            ).one_or_none()
        if row is None:
            raise not_found(str(name), "vector")
        vector = _from_row(row)
        if not vector.durable and vector.generation != self._group.backend.generation:
            raise ServiceError(
                "INPUT_MISSING",
                f"The ranks that held {name} are gone and it was a product; make it again.",
                resource=str(name),
            )
        return vector

    async def list_page(self, project: str, page: PageRequest) -> tuple[list[Vector], str]:
        """One page of the vectors that can be used, oldest first, and the next page's token."""
        async with self._database.reading() as connection:
            rows, token = await self._pager.fetch(
                connection,
                vectors,
                page,
                scope=f"{project}/vectors",
                where=[
                    vectors.c.project == project,
                    sa.or_(
                        vectors.c.recipe.is_not(sa.null()),
                        vectors.c.generation == self._group.backend.generation,
                    ),
                ],
            )
        return [_from_row(row) for row in rows], token

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
                raise ServiceError(
                    "INPUT_MISSING",
                    f"The ranks that held {vector.name} are gone and it was a product; "
                    "make it again.",
                    resource=str(vector.name),
                )
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
            await self.get(vector.name)
        except ServiceError:
            await backend.delete_vectors([vector.name.id])
            raise

    def source(self, vector: Vector, recipe: Recipe) -> Source:
        """What the backend makes a vector from."""
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
            self.adopt_file(vector, temporary)
        finally:
            temporary.unlink(missing_ok=True)

    def adopt_file(self, vector: Vector, source: Path) -> None:
        """Hard-link a synced file of elements as the vector's own."""
        target = self.file(vector)
        target.unlink(missing_ok=True)
        os.link(source, target)
        sync_folder(target.parent)

    async def delete(self, name: Name) -> None:
        """Free a vector on the ranks and on disk.

        Raises:
            ServiceError: RESOURCE_NOT_FOUND.
        """
        if not await self._delete_rows(vectors.c.project == name.project, vectors.c.id == name.id):
            raise not_found(str(name), "vector")

    async def _delete_ids(self, ids: Sequence[str]) -> None:
        await self._delete_rows(vectors.c.id.in_(ids))

    async def delete_of_checkpoint(self, checkpoint: Name) -> None:
        """Delete every vector of a parameter space."""
        await self._delete_rows(
            vectors.c.project == checkpoint.project, vectors.c.checkpoint_id == checkpoint.id
        )

    async def discard(self, names: Sequence[str]) -> None:
        """Free vectors on the ranks and on disk that have no row, by id."""
        for identifier in names:
            self._state_dir.vector(identifier).unlink(missing_ok=True)
        await self.free(names)

    async def withdraw(self, names: Sequence[str]) -> None:
        """Leave nothing of vectors, by id, wherever their making has ended."""
        await self._delete_ids(names)
        with contextlib.suppress(BackendError, ServiceError):
            await self.discard(names)

    async def free(self, names: Sequence[str]) -> None:
        """Free vectors on the ranks, by id; `ensure_resident` brings durable ones back."""
        self._resident.difference_update(
            [entry for entry in self._resident if entry[1] in set(names)]
        )
        # Ranks that are gone hold nothing to free.
        if self._group.state == "READY":
            await self._group.call(lambda backend: backend.delete_vectors(names))

    async def forget_products(self, before_us: int) -> None:
        """Drop the rows of products of earlier ranks and files without a row; called at start."""
        async with self._database.writing() as connection:
            await connection.execute(
                sa.delete(vectors).where(
                    vectors.c.recipe.is_(sa.null()), vectors.c.create_time < before_us
                )
            )
            known = set((await connection.scalars(sa.select(vectors.c.id))).all())
        for path in self._state_dir.vector("x").parent.iterdir():
            if path.stem not in known:
                path.unlink()

    async def _delete_rows(self, *where: sa.ColumnElement[bool]) -> list[str]:
        async with self._database.writing() as connection:
            names = list(
                (
                    await connection.scalars(
                        sa.delete(vectors).where(*where).returning(vectors.c.id)
                    )
                ).all()
            )
        if names:
            # The row is gone, so nobody can name the elements; the next start frees them.
            with contextlib.suppress(BackendError, ServiceError):
                await self.discard(names)
        return names


def _from_row(row: sa.Row[Any]) -> Vector:
    return Vector(
        name=Name(row.project, "vectors", row.id),
        checkpoint_id=row.checkpoint_id,
        dtype=row.dtype,
        num_elements=row.num_elements,
        recipe=row.recipe,
        generation=row.generation,
        create_time=row.create_time,
    )
