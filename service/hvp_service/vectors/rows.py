"""Vectors as rows: a vector's name, its space, the recipe to make it again, and its lifetime."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, final

import sqlalchemy as sa
from hvp_operations.wording import clipped
from hvp_workers.backend import Activation, Dtype
from sqlalchemy.ext.asyncio import AsyncConnection

from hvp_service.calls.errors import ServiceError, not_found, session_expired
from hvp_service.calls.names import Name
from hvp_service.calls.paging import Pager, PageRequest
from hvp_service.storage.clock import SECOND, now_us
from hvp_service.storage.database import (
    Database,
    checkpoints,
    data_batches,
    job_inputs,
    sessions,
    vectors,
)
from hvp_service.storage.lifetimes import UNTIL_DELETED, Lifetime

#: The expiry of a vector that was deleted while a job needs it: it has no name any more.
_DELETED = 0
_IS_NAMED = sa.or_(vectors.c.expire_time.is_(None), vectors.c.expire_time != _DELETED)
_IS_NEEDED = (
    sa.exists()
    .where(job_inputs.c.project == vectors.c.project, job_inputs.c.vector_id == vectors.c.id)
    .correlate(vectors)
)

Recipe = Mapping[str, Any]  # JSON; "kind" is seeded, file, zeros or parameters


@final
@dataclass(frozen=True, kw_only=True)
class Outputs:
    """The space of a model's outputs, or of an activation, on a batch.

    Attributes:
        batch: Name of the batch.
        shape: (sequences, positions, vocabulary), or that of the activation.
        activation: The activation; None for the model's own outputs.
    """

    batch: Name
    shape: tuple[int, ...]
    activation: Activation | None = None


@final
@dataclass(frozen=True)
class Selection:
    """Some of a checkpoint's parameters; two are equal where they select the same ones.

    Attributes:
        names: Names of the parameters in canonical order; () for all.
        globs: Patterns by which the caller selected them.
    """

    names: tuple[str, ...] = ()
    globs: tuple[str, ...] = field(default=(), compare=False)


ALL_PARAMETERS = Selection()
#: A space of vectors that can be added: checkpoint, dtype, batch of outputs, activation, selection.
VectorSpace = tuple[Name, Dtype, Name | None, Activation | None, Selection]


@final
@dataclass(frozen=True, kw_only=True)
class Vector:
    """One vector, read from its row."""

    name: Name
    checkpoint_id: str
    dtype: Dtype
    num_elements: int
    recipe: Recipe | None  # None: a product; it ends with the ranks
    generation: str
    create_time: int  # microseconds
    lifetime: Lifetime = UNTIL_DELETED
    batch_id: str = ""  # "": parameter space
    output_shape: tuple[int, ...] = ()
    selection: Selection = ALL_PARAMETERS
    activation: Activation | None = None  # that its outputs are; None: the model's own

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape (n,), or for outputs (sequences, positions, vocabulary)."""
        return self.output_shape or (self.num_elements,)

    @property
    def batch(self) -> Name | None:
        """Name of the batch whose outputs the vector has; None in parameter space."""
        return Name(self.name.project, "dataBatches", self.batch_id) if self.batch_id else None

    @property
    def space(self) -> VectorSpace:
        """The space of the vectors that it can be added to."""
        return self.checkpoint, self.dtype, self.batch, self.activation, self.selection

    @property
    def durable(self) -> bool:
        """Whether the vector can be made again when the ranks are gone."""
        return self.recipe is not None

    @property
    def checkpoint(self) -> Name:
        """Name of the checkpoint whose parameters, or outputs, the vector has."""
        return Name(self.name.project, "checkpoints", self.checkpoint_id)

    @property
    def session(self) -> Name | None:
        """Name of the session that the vector belongs to; None where it belongs to none."""
        identifier = self.lifetime.session
        return Name(self.name.project, "sessions", identifier) if identifier else None


@final
class VectorRows:
    """The table of vectors.

    Laws: the row of a vector was inserted while its checkpoint was there, and the session that it
    belongs to, if any. The row of a vector that an unfinished job needs stays. If it is deleted
    meanwhile it is found by that job alone, and goes at the first `delete_outlived` after the job.

    Args:
        database: The database that holds the table.
        pager: Makes page tokens.
        ttl_s: Time to live, after each use, of a vector that has one.
    """

    def __init__(self, database: Database, pager: Pager, *, ttl_s: float):
        self._database = database
        self._pager = pager
        self._ttl_us = int(ttl_s * SECOND)

    async def insert(self, made: Sequence[Vector]) -> None:
        """Insert rows; a time to live begins now.

        Raises:
            ServiceError: SESSION_EXPIRED; RESOURCE_NOT_FOUND for the checkpoint.
        """
        later = now_us() + self._ttl_us
        async with self._database.writing() as connection:
            for space in {vector.checkpoint for vector in made}:
                if not await _is_there(connection, checkpoints, space):
                    raise not_found(str(space), "checkpoint", "It was deleted meanwhile.")
            for batch in {vector.batch for vector in made if vector.batch is not None}:
                if not await _is_there(connection, data_batches, batch):
                    raise not_found(str(batch), "data batch", "It was deleted meanwhile.")
            for owner in {vector.session for vector in made if vector.session is not None}:
                if not await _is_there(connection, sessions, owner):
                    raise session_expired(str(owner))
            for vector in made:
                # An eigenvector's name follows from its job's attempt, which may try twice.
                await connection.execute(sa.delete(vectors).where(*_is(vector.name)))
            await connection.execute(
                vectors.insert(),
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
                        "session": vector.lifetime.session,
                        "expire_time": None if vector.lifetime.expire_time is None else later,
                        "kept": vector.lifetime.kept,
                        "batch_id": vector.batch_id,
                        "shape": list(vector.output_shape),
                        "selection": asdict(vector.selection),
                        "activation": asdict(vector.activation) if vector.activation else {},
                    }
                    for vector in made
                ],
            )

    async def get(self, name: Name, *, even_deleted: bool = False) -> Vector:
        """Look up a vector by its name.

        Args:
            name: Name of the vector.
            even_deleted: Find one too that was deleted while a job needs it.

        Raises:
            ServiceError: RESOURCE_NOT_FOUND.
        """
        async with self._database.reading() as connection:
            row = (
                await connection.execute(
                    sa.select(vectors).where(
                        vectors.c.project == name.project, vectors.c.id == name.id
                    )
                )
            ).one_or_none()
        if row is None or (row.expire_time == _DELETED and not even_deleted):
            raise gone(name)
        return _from_row(row)

    async def list_page(
        self, project: str, page: PageRequest, generation: str
    ) -> tuple[list[Vector], str]:
        """One page of the vectors that can be used, oldest first, and the next page's token.

        Args:
            project: Project of the vectors.
            page: Size and token of the page.
            generation: Generation of the ranks; products of other generations are left out.
        """
        async with self._database.reading() as connection:
            found, token = await self._pager.fetch(
                connection,
                vectors,
                page,
                scope=f"{project}/vectors",
                where=[
                    vectors.c.project == project,
                    _IS_NAMED,
                    sa.or_(vectors.c.recipe.is_not(sa.null()), vectors.c.generation == generation),
                ],
            )
        return [_from_row(row) for row in found], token

    async def prolong(self, used: Sequence[Vector]) -> list[Vector]:
        """Start the time to live of vectors anew, unless most of it is left."""
        later = now_us() + self._ttl_us
        due = {
            vector.name.id
            for vector in used
            if vector.lifetime.expire_time not in (None, _DELETED)
            and later - vector.lifetime.expire_time > self._ttl_us // 10
        }
        if not due:
            return list(used)
        async with self._database.updating() as connection:
            await connection.execute(
                sa.update(vectors)
                # One that a caller keeps meanwhile has no time to live any more.
                .where(vectors.c.id.in_(due), vectors.c.expire_time.is_not(None), _IS_NAMED)
                .values(expire_time=later)
            )
        return [
            replace(vector, lifetime=Lifetime(expire_time=later))
            if vector.name.id in due
            else vector
            for vector in used
        ]

    async def retain(self, vector: Vector, recipe: Recipe, lifetime: Lifetime) -> Vector:
        """Give a vector a recipe and another lifetime.

        Raises:
            ServiceError: RESOURCE_NOT_FOUND.
        """
        async with self._database.writing() as connection:
            changed = await connection.execute(
                sa.update(vectors)
                .where(
                    vectors.c.project == vector.name.project,
                    vectors.c.id == vector.name.id,
                    _IS_NAMED,
                )
                .values(
                    recipe=recipe,
                    session=lifetime.session,
                    expire_time=lifetime.expire_time,
                    kept=lifetime.kept,
                )
            )
        if not changed.rowcount:
            raise gone(vector.name)
        return replace(vector, recipe=recipe, lifetime=lifetime)

    async def delete(self, *where: sa.ColumnElement[bool]) -> list[str]:
        """Delete rows and return their ids; those that a job needs lose their names alone."""
        async with self._database.writing() as connection:
            await connection.execute(
                sa.update(vectors)
                .where(*where, _IS_NEEDED)
                .values(session="", expire_time=_DELETED, kept=False)
            )
            deleted = sa.delete(vectors).where(*where, ~_IS_NEEDED).returning(vectors.c.id)
            return list((await connection.scalars(deleted)).all())

    async def delete_outlived(self, in_use: Collection[str]) -> list[str]:
        """Delete the rows of vectors whose session has ended or whose time is up; their ids.

        Args:
            in_use: Ids of vectors that a call uses at present, so that their time is not up.
        """
        living = sa.select(sessions.c.id).where(sessions.c.project == vectors.c.project)
        return await self.delete(
            sa.or_(
                sa.and_(vectors.c.session != "", vectors.c.session.not_in(living)),
                sa.and_(vectors.c.expire_time < now_us(), vectors.c.id.not_in(in_use), ~_IS_NEEDED),
            )
        )

    async def next_expiry(self) -> int | None:
        """When the next vector's time to live ends, in microseconds; None where none has one."""
        async with self._database.reading() as connection:
            found: int | None = await connection.scalar(
                sa.select(sa.func.min(vectors.c.expire_time)).where(~_IS_NEEDED)
            )
        return found

    async def ids(self) -> set[str]:
        """Ids of the vectors of all projects."""
        async with self._database.reading() as connection:
            return set((await connection.scalars(sa.select(vectors.c.id))).all())


def words_of(space: VectorSpace) -> str:
    """A space of vectors in words."""
    checkpoint, dtype, batch, activation, selection = space
    what = f"{activation.side} of {activation.module} in" if activation else "outputs of"
    where = f"of {checkpoint}" if batch is None else f"of the {what} {checkpoint} on {batch}"
    if selection.names:
        where = f"of {_shown(selection.globs)} ({len(selection.names)} tensors) {where}"
    return f"{dtype} vector {where}"


def _shown(globs: Sequence[str]) -> str:
    few = ", ".join(clipped(glob) for glob in globs[:3])
    return few if len(globs) <= 3 else f"{few} and {len(globs) - 3} more"


def gone(name: Name) -> ServiceError:
    """The refusal of a vector that has no row."""
    return not_found(
        str(name),
        "vector",
        "If it was there, it was deleted, or what it belonged to has ended: its session, its job, "
        "or the time for which nobody used it. Make it again.",
    )


def lost(name: Name) -> ServiceError:
    """The refusal of a product that is not on these ranks."""
    return ServiceError(
        "INPUT_MISSING",
        f"{name} is a product, and the ranks that held it are gone, or another server's; make it "
        "again, and keep it if it has to outlast the ranks.",
        resource=str(name),
    )


async def is_named(connection: AsyncConnection, name: Name) -> bool:
    """Whether there is a vector of this name."""
    row = sa.select(vectors.c.id).where(
        vectors.c.project == name.project, vectors.c.id == name.id, _IS_NAMED
    )
    return (await connection.execute(row)).first() is not None


def _is(name: Name) -> tuple[sa.ColumnElement[bool], ...]:
    return vectors.c.project == name.project, vectors.c.id == name.id


async def _is_there(connection: AsyncConnection, table: sa.Table, name: Name) -> bool:
    row = sa.select(table.c.id).where(table.c.project == name.project, table.c.id == name.id)
    return (await connection.execute(row)).first() is not None


def _from_row(row: sa.Row[Any]) -> Vector:
    return Vector(
        name=Name(row.project, "vectors", row.id),
        checkpoint_id=row.checkpoint_id,
        dtype=row.dtype,
        num_elements=row.num_elements,
        recipe=row.recipe,
        generation=row.generation,
        create_time=row.create_time,
        lifetime=Lifetime(session=row.session, expire_time=row.expire_time, kept=row.kept),
        batch_id=row.batch_id,
        output_shape=tuple(row.shape),
        selection=Selection(*(tuple(row.selection.get(key, ())) for key in ("names", "globs"))),
        activation=Activation(**row.activation) if row.activation else None,
    )
