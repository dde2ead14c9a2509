"""No vector is on the ranks or on disk that nobody can name."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
from hvp_service.app.dependencies import Dependencies
from hvp_service.calls.errors import ServiceError
from hvp_service.calls.paging import PageRequest
from hvp_service.operators import service as operators
from hvp_service.operators.resolver import OperatorRef
from hvp_service.storage.troubles import DatabaseBusyError
from hvp_service.vectors import service as vectors
from hvp_service.vectors import transfer
from hvp_service.vectors.rows import Vector

from tests.service.quadratic_backend import QuadraticBackend
from tests.service.world import PROJECT, make_operator, upload

SEEDED = vectors.SeededSource(seed=3, distribution="DISTRIBUTION_GAUSSIAN")
ONES = np.ones(6).tobytes()


async def make(deps: Dependencies, ref: OperatorRef, source: Any = SEEDED) -> Vector:
    return await vectors.create(deps, PROJECT, ref.checkpoint, ref.dtype, source)


async def named(deps: Dependencies) -> set[str]:
    """Ids of the vectors that can be named."""
    return {vector.name.id for vector in (await deps.vectors.list_page(PROJECT, PageRequest()))[0]}


def on_disk(deps: Dependencies) -> set[str]:
    return {path.stem for path in deps.state_dir.vector("x").parent.iterdir()}


async def read(deps: Dependencies, ref: OperatorRef, vector: Vector) -> None:
    async for _ in transfer.read(deps, vector.name, 0, 0):
        pass


USES: dict[str, Callable[[Dependencies, OperatorRef, Vector], Awaitable[Any]]] = {
    "reduced": lambda deps, ref, v: vectors.inner_products(deps, [(str(v.name), str(v.name))]),
    "multiplied": lambda deps, ref, v: operators.apply(deps, ref, [str(v.name)]),
    "combined": lambda deps, ref, v: make(
        deps, ref, vectors.CombinationSource(terms=((2.0, str(v.name)),))
    ),
    "read": read,
}


# An uploaded vector is read from its file, without the ranks.
@pytest.mark.parametrize(
    ("use", "uploaded"),
    [
        (use, uploaded)
        for use in USES
        for uploaded in (False, True)
        if (use, uploaded) != ("read", True)
    ],
)
async def test_a_vector_deleted_between_its_look_up_and_its_use_leaves_nothing(
    deps: Dependencies,
    backend: QuadraticBackend,
    monkeypatch: pytest.MonkeyPatch,
    use: str,
    uploaded: bool,
) -> None:
    ref = await make_operator(deps)
    vector = await make(deps, ref, await upload(deps, ONES) if uploaded else SEEDED)
    await deps.vectors.free([vector.name.id])  # as after the loss of the ranks
    call = deps.group.call

    async def after_a_deletion(*arguments: Any, **named: Any) -> Any:
        monkeypatch.undo()
        await deps.vectors.delete(vector.name)
        return await call(*arguments, **named)

    monkeypatch.setattr(deps.group, "call", after_a_deletion)
    try:
        await USES[use](deps, ref, vector)
    except ServiceError as error:
        assert error.reason == "RESOURCE_NOT_FOUND"  # noqa: PT017  it may also be in time
    assert vector.name.id not in await named(deps)
    assert set(backend.resident) <= await named(deps)
    assert on_disk(deps) <= await named(deps)


@pytest.mark.parametrize("error", [DatabaseBusyError("held"), OSError("no space")], ids=repr)
async def test_a_vector_whose_row_cannot_be_written_leaves_nothing(
    deps: Dependencies,
    backend: QuadraticBackend,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    ref = await make_operator(deps)
    seeded, blob = await make(deps, ref), await upload(deps, ONES)
    held, files = set(backend.resident), on_disk(deps)

    async def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(deps.vectors, "add", fail)
    for work in (
        make(deps, ref),
        make(deps, ref, blob),
        make(deps, ref, vectors.CombinationSource(terms=((2.0, str(seeded.name)),))),
        operators.apply(deps, ref, [str(seeded.name)]),
        operators.compute_gradient(deps, ref),
    ):
        with pytest.raises(type(error)):
            await work
    assert (set(backend.resident), on_disk(deps)) == (held, files)
