"""Making, reducing and keeping vectors."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hvp_workers.backend import (
    Activation,
    Backend,
    BackendError,
    Combination,
    Distribution,
    Dtype,
    Space,
)

from hvp_service.app.dependencies import Dependencies
from hvp_service.blobs.store import Digest
from hvp_service.calls.errors import ServiceError, not_found
from hvp_service.calls.names import Name, parse
from hvp_service.operators.activations import activation_of
from hvp_service.operators.resolver import (
    check_dtype,
    outputs_of,
    parameters_of,
    select_parameters,
)
from hvp_service.vectors.rows import (
    ALL_PARAMETERS,
    Outputs,
    Recipe,
    Selection,
    Vector,
    words_of,
)
from hvp_service.vectors.store import ITEM_BYTES

DISTRIBUTIONS: dict[str, Distribution] = {
    "DISTRIBUTION_RADEMACHER": "rademacher",
    "DISTRIBUTION_GAUSSIAN": "gaussian",
    "DISTRIBUTION_SPHERE": "sphere",
}


@dataclass(frozen=True, kw_only=True)
class SeededSource:
    """A random vector, expanded on the ranks from its seed."""

    seed: int
    distribution: str  # the enum value's name


@dataclass(frozen=True, kw_only=True)
class CombinationSource:
    """A linear combination: the terms are pairs of a coefficient and a vector's name."""

    terms: tuple[tuple[float, str], ...]


@dataclass(frozen=True)
class ZerosSource:
    """The zero vector."""


@dataclass(frozen=True)
class ParametersSource:
    """The model's parameters θ."""


@dataclass(frozen=True)
class FileSource:
    """A file of elements that came with the call; it is linked, not moved."""

    path: Path
    sha256: str


VectorSource = (
    SeededSource | Digest | CombinationSource | ZerosSource | ParametersSource | FileSource | None
)


async def create(
    deps: Dependencies,
    project: str,
    checkpoint: str,
    dtype: str,
    source: VectorSource,
    session: str = "",
    data_batch: str = "",
    parameters: Sequence[str] = (),
    module: str = "",
    of_input: bool = False,
) -> Vector:
    """Make a vector on the ranks, in a session or in none.

    Args:
        deps: The server's stores, settings and ranks.
        project: Project of the vector.
        checkpoint: Name of the checkpoint whose parameters, or outputs, the vector has.
        dtype: Dtype of the elements.
        source: Source that the vector is made of.
        session: Name of the session that the vector is to belong to; "" for none.
        data_batch: Name of the batch whose outputs the vector has; "" for parameter space.
        parameters: Globs of the parameters that a vector of parameter space has; () for all.
        module: Submodule whose output a vector of outputs has; "" for the model's own outputs.
        of_input: It has what the submodule is given.

    Raises:
        ServiceError: RESOURCE_NOT_FOUND, DTYPE_UNSUPPORTED, SOURCE_MISSING,
            DISTRIBUTION_UNSPECIFIED, SHAPE_MISMATCH, NON_FINITE, VECTOR_SPACE_MISMATCH,
            INPUT_MISSING, SESSION_EXPIRED, PARAMETERS_NOT_FOUND, PARAMETERS_INVALID,
            MODULES_INVALID, MODULE_NOT_FOUND, MODULE_UNSUPPORTED.
        BackendError: VECTOR_MEMORY.
    """
    name = checkpoint_name(project, checkpoint)
    async with deps.sessions.using(project, session) as lifetime:
        with contextlib.ExitStack() as held:
            held.enter_context(deps.checkpoints.hold(name))
            if data_batch:
                held.enter_context(deps.batches.hold(parse(data_batch, "dataBatches")))
            space_dtype = check_dtype(dtype)
            activation = activation_of(module, of_input=of_input, field="module")
            num_elements, outputs, selection = await space_of(
                deps, name, data_batch, parameters, activation, space_dtype
            )

            def new(recipe: Recipe | None) -> Vector:
                return deps.vectors.new(
                    name,
                    space_dtype,
                    num_elements,
                    recipe,
                    lifetime=lifetime,
                    outputs=outputs,
                    selection=selection,
                )

            return await _create(deps, name, new, source, of_outputs=outputs is not None)


async def space_of(
    deps: Dependencies,
    checkpoint: Name,
    data_batch: str,
    parameters: Sequence[str],
    activation: Activation | None,
    dtype: Dtype,
) -> tuple[int, Outputs | None, Selection]:
    """Resolve a space: the length of its vectors, their outputs (or None), and their parameters.

    Raises:
        ServiceError: RESOURCE_NOT_FOUND, PARAMETERS_NOT_FOUND, PARAMETERS_INVALID,
            MODULES_INVALID, MODULE_NOT_FOUND, MODULE_UNSUPPORTED.
    """
    found = await deps.checkpoints.get(checkpoint)
    if not data_batch:
        if activation is not None:
            raise ServiceError(
                "MODULES_INVALID",
                "An activation is one on a batch; name that, or leave module empty.",
                field="module",
            )
        selection = select_parameters(found, parameters)
        numel = sum(math.prod(tensor.shape) for tensor in parameters_of(found, selection))
        return numel, None, selection
    if parameters:
        raise ServiceError(
            "PARAMETERS_INVALID",
            "Outputs have no parameters; leave parameters or data_batch empty.",
            field="parameters",
        )
    name = parse(data_batch, "dataBatches")
    if name.project != checkpoint.project:
        raise not_found(data_batch, "data batch")
    batch = await deps.batches.get(name)
    if activation is None:
        outputs = outputs_of(found, batch)
    else:
        space = Space(
            checkpoint_dir=deps.state_dir.checkpoint(checkpoint.id),
            dtype=dtype,
            outputs_on=deps.batches.path(batch),
            activation=activation,
        )
        shape = await deps.operators.activations.shape(space, "module")
        outputs = Outputs(batch=name, shape=shape, activation=activation)
    return math.prod(outputs.shape), outputs, ALL_PARAMETERS


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
        raise wrong_size(expected, size, field)
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
    """Let a vector stay until it is deleted, and make it durable.

    Raises:
        ServiceError: RESOURCE_NOT_FOUND, INPUT_MISSING.
        BackendError: DISK_FULL.
    """
    async with deps.vectors.using([name]) as (vector,):
        return await deps.vectors.retain(vector)


def checkpoint_name(project: str, checkpoint: str) -> Name:
    """The name of a checkpoint of this project.

    Raises:
        ServiceError: RESOURCE_NOT_FOUND.
    """
    name = parse(checkpoint, "checkpoints")
    if name.project != project:
        raise not_found(checkpoint, "checkpoint")
    return name


def wrong_size(expected: int, size: int, field: str) -> ServiceError:
    """The refusal of more or fewer bytes than a vector of the space has."""
    return ServiceError(
        "SHAPE_MISMATCH",
        f"A vector of these parameters and dtype has {expected} bytes; {size} came.",
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
