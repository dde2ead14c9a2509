"""Making, reducing and reading vectors."""

from __future__ import annotations

import asyncio
import contextlib
import math
import shutil
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hvp_workers.backend import Backend, BackendError, Combination, Distribution

from hvp_service.app.dependencies import Dependencies
from hvp_service.blobs.service import resolve_range
from hvp_service.blobs.store import Digest, Piece, read_range
from hvp_service.calls.errors import ServiceError, not_found
from hvp_service.calls.names import Name, parse
from hvp_service.operators.resolver import check_dtype, outputs_of
from hvp_service.uploads.file import UploadFile, disk_full
from hvp_service.vectors.rows import Outputs, Recipe, Vector, words_of
from hvp_service.vectors.store import ITEM_BYTES

DISTRIBUTIONS: dict[str, Distribution] = {
    "DISTRIBUTION_RADEMACHER": "rademacher",
    "DISTRIBUTION_GAUSSIAN": "gaussian",
    "DISTRIBUTION_SPHERE": "sphere",
}


@dataclass(frozen=True, kw_only=True)
class SeededSource:
    """Expanded on the ranks."""

    seed: int
    distribution: str  # the enum value's name


@dataclass(frozen=True, kw_only=True)
class CombinationSource:
    """Sum of coefficient times vector name."""

    terms: tuple[tuple[float, str], ...]


@dataclass(frozen=True)
class ZerosSource:
    """The zero vector."""


@dataclass(frozen=True)
class ParametersSource:
    """θ."""


@dataclass(frozen=True)
class FileSource:
    """Elements that have come with the call; the file is linked, not moved."""

    path: Path
    sha256: str


VectorSource = (
    SeededSource | Digest | CombinationSource | ZerosSource | ParametersSource | FileSource | None
)


@dataclass(frozen=True, kw_only=True)
class VectorPiece:
    """One message of a vector that is written."""

    element_offset: int
    data: bytes
    crc32c: int


async def create(
    deps: Dependencies,
    project: str,
    checkpoint: str,
    dtype: str,
    source: VectorSource,
    session: str = "",
    data_batch: str = "",
) -> Vector:
    """Make a vector on the ranks, in a session or in none.

    Args:
        deps: Dependencies.
        project: Whose.
        checkpoint: Whose parameters, or outputs.
        dtype: Of the elements.
        source: What it is made of.
        session: That it is to belong to; "" for none.
        data_batch: On which it is the model's outputs; "": it is of parameter space.

    Raises:
        ServiceError: RESOURCE_NOT_FOUND, DTYPE_UNSUPPORTED, SOURCE_MISSING,
            DISTRIBUTION_UNSPECIFIED, SHAPE_MISMATCH, NON_FINITE, VECTOR_SPACE_MISMATCH,
            INPUT_MISSING, SESSION_EXPIRED.
        BackendError: VECTOR_MEMORY.
    """
    name = _checkpoint_name(project, checkpoint)
    async with deps.sessions.using(project, session) as lifetime:
        with contextlib.ExitStack() as held:
            held.enter_context(deps.checkpoints.hold(name))
            if data_batch:
                held.enter_context(deps.batches.hold(parse(data_batch, "dataBatches")))
            num_elements, outputs = await _space(deps, name, data_batch)
            space_dtype = check_dtype(dtype)

            def new(recipe: Recipe | None) -> Vector:
                return deps.vectors.new(
                    name, space_dtype, num_elements, recipe, lifetime=lifetime, outputs=outputs
                )

            return await _create(deps, name, new, source, of_outputs=outputs is not None)


async def _space(
    deps: Dependencies, checkpoint: Name, data_batch: str
) -> tuple[int, Outputs | None]:
    """Length of a space's vectors and, unless it is parameter space, what they are outputs on.

    Raises:
        ServiceError: RESOURCE_NOT_FOUND.
    """
    found = await deps.checkpoints.get(checkpoint)
    if not data_batch:
        return found.description.num_parameters, None
    name = parse(data_batch, "dataBatches")
    if name.project != checkpoint.project:
        raise not_found(data_batch, "data batch")
    outputs = outputs_of(found, await deps.batches.get(name))
    return math.prod(outputs.shape), outputs


async def _create(
    deps: Dependencies,
    name: Name,
    new: Callable[[Recipe | None], Vector],
    source: VectorSource,
    *,
    of_outputs: bool,
) -> Vector:

    match source:
        case None:
            raise ServiceError("SOURCE_MISSING", "Say what the vector is made of.", field="source")
        case SeededSource(seed=seed, distribution=distribution):
            if distribution not in DISTRIBUTIONS:
                raise ServiceError(
                    "DISTRIBUTION_UNSPECIFIED",
                    f"Say which distribution: {', '.join(DISTRIBUTIONS)}.",
                    field="source.seeded.distribution",
                )
            recipe = {"kind": "seeded", "seed": seed, "distribution": DISTRIBUTIONS[distribution]}
            return await _make_durable(deps, new(recipe))
        case ZerosSource():
            return await _make_durable(deps, new({"kind": "zeros"}))
        case ParametersSource() if of_outputs:
            raise ServiceError(
                "SOURCE_MISSING",
                "Parameters are no outputs; make the vector of something else.",
                field="source.parameters",
            )
        case ParametersSource():
            return await _make_durable(deps, new({"kind": "parameters"}))
        case Digest():
            with deps.blobs.hold(source.sha256):
                path = await deps.blobs.require(name.project, source, "source.blob")
                return await _from_file(deps, new({"kind": "file"}), path, "source.blob")
        case FileSource(path=path):
            return await _from_file(deps, new({"kind": "file"}), path, "data")
        case CombinationSource(terms=terms):
            return await _combine(deps, new(None), terms)


async def write(
    deps: Dependencies,
    project: str,
    checkpoint: str,
    dtype: str,
    request_id: str,
    pieces: AsyncIterator[VectorPiece],
    session: str = "",
    data_batch: str = "",
) -> Vector:
    """Make a vector from elements that come in one stream, in a session or in none.

    Raises:
        ServiceError: As `create` and `receive`, REQUEST_ID_REUSED.
    """
    # The session is held from the first element on: it must not expire in a slow stream.
    async with deps.sessions.using(project, session):
        source = await receive(deps, project, checkpoint, dtype, pieces, data_batch)
        return await _write(
            deps, project, checkpoint, dtype, request_id, source, session, data_batch
        )


async def _write(
    deps: Dependencies,
    project: str,
    checkpoint: str,
    dtype: str,
    request_id: str,
    source: FileSource,
    session: str,
    data_batch: str,
) -> Vector:
    async def respond() -> bytes:
        made = await create(deps, project, checkpoint, dtype, source, session, data_batch)
        return str(made.name).encode()

    try:
        # The elements' digest stands for them: a stream cannot be kept to be compared.
        name = await deps.request_log.once(
            (project, "WriteVector", request_id),
            f"{checkpoint}\0{dtype}\0{source.sha256}\0{session}\0{data_batch}".encode(),
            respond,
        )
    finally:
        source.path.unlink(missing_ok=True)
    return await deps.vectors.get(parse(name.decode(), "vectors"))


async def receive(
    deps: Dependencies,
    project: str,
    checkpoint: str,
    dtype: str,
    pieces: AsyncIterator[VectorPiece],
    data_batch: str = "",
) -> FileSource:
    """Take the elements of a vector that come in one stream into a temporary file.

    The caller unlinks the file.

    Raises:
        ServiceError: RESOURCE_NOT_FOUND, DTYPE_UNSUPPORTED, SHAPE_MISMATCH,
            CHUNK_CHECKSUM_MISMATCH, CHUNK_TOO_LARGE, WRITE_OFFSET_GAP, DISK_FULL.
    """
    num_elements, _ = await _space(deps, _checkpoint_name(project, checkpoint), data_batch)
    item = ITEM_BYTES[check_dtype(dtype)]
    expected = num_elements * item
    free = shutil.disk_usage(deps.state_dir.root).free
    if expected > free:
        raise disk_full(expected - free)
    path = deps.state_dir.temporary(f"{uuid.uuid4().hex}.write")
    file = await asyncio.to_thread(UploadFile, path, 0, None)
    try:
        async for piece in pieces:
            if len(piece.data) > deps.config.max_chunk_bytes:
                raise ServiceError(
                    "CHUNK_TOO_LARGE",
                    f"A chunk holds at most {deps.config.max_chunk_bytes} bytes.",
                    field="data",
                )
            if piece.element_offset * item != file.position:
                raise ServiceError(
                    "WRITE_OFFSET_GAP",
                    f"A chunk for element {piece.element_offset} came where "
                    f"{file.position // item} was due; send the vector again.",
                )
            if file.position + len(piece.data) > expected:
                raise _wrong_size(expected, file.position + len(piece.data), "data")
            await asyncio.to_thread(file.append, piece.data, piece.crc32c, 0)
        await asyncio.to_thread(file.sync)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    finally:
        file.close()
    return FileSource(path, file.sha256())


async def _make_durable(deps: Dependencies, vector: Vector) -> Vector:
    async def work(backend: Backend) -> None:
        assert vector.recipe is not None
        await backend.create_vector(
            vector.name.id, deps.vectors.space(vector), deps.vectors.source(vector, vector.recipe)
        )

    return (await deps.vectors.make([vector], work))[0]


async def _from_file(deps: Dependencies, vector: Vector, path: Path, field: str) -> Vector:
    expected = vector.num_elements * ITEM_BYTES[vector.dtype]
    size = (await asyncio.to_thread(path.stat)).st_size
    if size != expected:
        raise _wrong_size(expected, size, field)
    await asyncio.to_thread(deps.vectors.adopt_file, vector, path)
    try:
        return await _make_durable(deps, vector)
    except BackendError as error:
        if error.reason == "NON_FINITE":  # here the field of a request, elsewhere the model
            raise ServiceError(
                "NON_FINITE", error.message, field=field, metadata=error.metadata
            ) from error
        raise


async def _combine(
    deps: Dependencies, vector: Vector, terms: Sequence[tuple[float, str]]
) -> Vector:
    if not terms:
        raise ServiceError(
            "SOURCE_MISSING", "A combination has one or more terms.", field="source.combination"
        )
    async with deps.vectors.using([parse(name, "vectors") for _, name in terms]) as inputs:
        return await _combine_held(deps, vector, terms, inputs)


async def _combine_held(
    deps: Dependencies,
    vector: Vector,
    terms: Sequence[tuple[float, str]],
    inputs: Sequence[Vector],
) -> Vector:
    for index, ((coefficient, _), term) in enumerate(zip(terms, inputs, strict=True)):
        if not math.isfinite(coefficient):
            raise ServiceError(
                "NON_FINITE",
                "A coefficient is not finite.",
                field=f"source.combination.terms[{index}].coefficient",
                metadata={"index": str(index)},
            )
        _check_same_space(vector, term, f"source.combination.terms[{index}].vector")

    async def work(backend: Backend) -> None:
        await deps.vectors.ensure_resident(backend, inputs)
        await backend.create_vector(
            vector.name.id,
            deps.vectors.space(vector),
            Combination(
                tuple(
                    (coefficient, term.name.id)
                    for (coefficient, _), term in zip(terms, inputs, strict=True)
                )
            ),
        )

    return (await deps.vectors.make([vector], work))[0]


async def inner_products(deps: Dependencies, pairs: Sequence[tuple[str, str]]) -> list[float]:
    """u·v for each pair of names, taken on the ranks.

    Raises:
        ServiceError: RESOURCE_NOT_FOUND, VECTOR_SPACE_MISMATCH, INPUT_MISSING.
    """
    names = list(dict.fromkeys(name for pair in pairs for name in pair))
    async with deps.vectors.using([parse(name, "vectors") for name in names]) as inputs:
        found = dict(zip(names, inputs, strict=True))
        for index, (left, right) in enumerate(pairs):
            _check_same_space(found[left], found[right], f"inner_products[{index}]")

        async def work(backend: Backend) -> list[float]:
            await deps.vectors.ensure_resident(backend, inputs)
            return await backend.inner_products(
                [(found[left].name.id, found[right].name.id) for left, right in pairs]
            )

        return await deps.group.call(work) if pairs else []


async def keep(deps: Dependencies, name: Name) -> Vector:
    """Let a vector stay until it is deleted, durable.

    Raises:
        ServiceError: RESOURCE_NOT_FOUND, INPUT_MISSING.
        BackendError: DISK_FULL.
    """
    async with deps.vectors.using([name]) as (vector,):
        return await deps.vectors.retain(vector)


async def read(deps: Dependencies, name: Name, offset: int, limit: int) -> AsyncIterator[Piece]:
    """Stream a range of elements; the pieces' offsets are in elements.

    Raises:
        ServiceError: RESOURCE_NOT_FOUND, READ_RANGE_INVALID, INPUT_MISSING.
    """
    async with deps.vectors.using([name]) as (vector,):
        start, stop = resolve_range(offset, limit, vector.num_elements)
        item = ITEM_BYTES[vector.dtype]
        piece_bytes = deps.config.max_chunk_bytes // item * item
        if (kept := deps.vectors.file(vector)).exists():
            async for piece in read_range(kept, start * item, stop * item, piece_bytes):
                yield Piece(piece.offset // item, piece.data, piece.crc32c)
            return
        part = deps.state_dir.temporary(f"{uuid.uuid4().hex}.read")

        async def save(backend: Backend) -> None:
            await deps.vectors.ensure_resident(backend, [vector])
            await backend.save_vector(vector.name.id, part, start, stop)

        async def unlink() -> None:
            part.unlink(missing_ok=True)

        try:
            await deps.group.call(save, undo=unlink)
            async for piece in read_range(part, 0, (stop - start) * item, piece_bytes):
                yield Piece(start + piece.offset // item, piece.data, piece.crc32c)
        finally:
            await unlink()


def _checkpoint_name(project: str, checkpoint: str) -> Name:
    name = parse(checkpoint, "checkpoints")
    if name.project != project:
        raise not_found(checkpoint, "checkpoint")
    return name


def _wrong_size(expected: int, size: int, field: str) -> ServiceError:
    return ServiceError(
        "SHAPE_MISMATCH",
        f"A vector of this checkpoint and dtype has {expected} bytes; {size} came.",
        field=field,
        metadata={"expected_bytes": str(expected), "bytes": str(size)},
    )


def _check_same_space(one: Vector, other: Vector, field: str) -> None:
    if one.space != other.space:
        raise ServiceError(
            "VECTOR_SPACE_MISMATCH",
            f"{other.name} is a {words_of(other.space)}; expected was a {words_of(one.space)}.",
            field=field,
        )
