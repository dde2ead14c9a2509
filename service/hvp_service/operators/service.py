"""Losses, gradients and products."""

from __future__ import annotations

import contextlib
import math
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import get_args

import structlog
from hvp_workers.backend import Backend, Form

from hvp_service.app.dependencies import Dependencies
from hvp_service.calls.errors import ServiceError
from hvp_service.calls.names import Name, parse
from hvp_service.metrics.instruments import computed
from hvp_service.operators.resolver import (
    OperatorRef,
    ResolvedOperator,
    check_preconditioner,
    check_space,
)
from hvp_service.storage.lifetimes import Lifetime
from hvp_service.vectors.rows import Outputs, Vector

log = structlog.get_logger()

#: Points of one call: each is a forward pass, and a call is one piece of work for the ranks.
MAX_POINTS = 256

FORMS: dict[str, Form] = {f"FORM_{form.upper()}": form for form in get_args(Form)}


@dataclass(frozen=True)
class Loss:
    """A loss: the mean over `num_targets` targets, in nats."""

    value: float
    num_targets: int


async def describe(deps: Dependencies, ref: OperatorRef) -> tuple[ResolvedOperator, int]:
    """Check an operator and fill in its defaults; the ranks are not asked.

    Returns:
        The operator, and how many sequences a rank takes at once.

    Raises:
        ServiceError: As `OperatorResolver.resolve`.
    """
    resolved = await deps.operators.resolve(ref)
    async with _preconditioner(deps, resolved):
        pass
    batch = resolved.batch.statistics
    if resolved.operator.kind == "jacobian":
        return resolved, 0  # whose outputs have one cut alone
    return resolved, ref.micro_batch_size or deps.group.backend.default_micro_batch(
        batch.num_sequences, max(1, batch.sequence_length)
    )


async def evaluate_loss(deps: Dependencies, ref: OperatorRef) -> Loss:
    """The loss L(θ). Cost: one forward pass."""
    async with deps.operators.using(ref) as resolved:
        value = await deps.group.call(lambda backend: backend.loss(resolved.operator))
    schema = resolved.checkpoint.description.batch_schema
    return Loss(value, schema.num_targets(resolved.batch.statistics.fields))


async def compute_gradient(deps: Dependencies, ref: OperatorRef, session: str = "") -> Vector:
    """The gradient ∇L(θ) as a vector on the ranks, in a session or in none.

    Raises:
        ServiceError: SESSION_EXPIRED, and as `OperatorResolver.resolve`.
    """
    async with (
        deps.operators.using(ref) as resolved,
        deps.sessions.using(resolved.checkpoint.name.project, session) as lifetime,
    ):
        (gradient,) = _products(deps, resolved, None, 1, lifetime)

        async def work(backend: Backend) -> None:
            await backend.gradient(resolved.operator, gradient.name.id)

        return (await deps.vectors.make([gradient], work))[0]


async def apply(
    deps: Dependencies,
    ref: OperatorRef,
    vectors: Sequence[str],
    session: str = "",
    *,
    transposed: bool = False,
) -> list[Vector]:
    """The product with each vector, as vectors on the ranks, in a session or in none.

    Args:
        deps: The server's stores, settings and ranks.
        ref: The operator.
        vectors: Names of the vectors.
        session: Name of the session that the products are to belong to; "" for none.
        transposed: Whether to multiply with the transposed matrix.

    Raises:
        ServiceError: VECTORS_MISSING, VECTOR_SPACE_MISMATCH, INPUT_MISSING, SESSION_EXPIRED, and
            as `OperatorResolver.resolve`.
    """
    names = _vector_names(vectors)
    async with (
        deps.operators.using(ref) as resolved,
        deps.sessions.using(resolved.checkpoint.name.project, session) as lifetime,
        deps.vectors.using(names) as inputs,
        _preconditioner(deps, resolved) as beside,
    ):
        wanted = resolved.transposed if transposed else resolved
        return await _apply(deps, ref, wanted, inputs, beside, lifetime)


async def evaluate_forms(
    deps: Dependencies, ref: OperatorRef, form: str, vectors: Sequence[str]
) -> list[float]:
    """A number for each vector; only the numbers leave the ranks.

    Args:
        deps: The server's stores, settings and ranks.
        ref: The operator.
        form: Name of the enum value that says which number.
        vectors: Names of the vectors.

    Raises:
        ServiceError: FORM_UNSPECIFIED, OPERATOR_NOT_SYMMETRIC, VECTORS_MISSING,
            VECTOR_SPACE_MISMATCH, INPUT_MISSING, and as `OperatorResolver.resolve`.
    """
    if form not in FORMS:
        raise ServiceError(
            "FORM_UNSPECIFIED", f"Say which number: {' or '.join(FORMS)}.", field="form"
        )
    wanted = FORMS[form]
    names = _vector_names(vectors)
    async with (
        deps.operators.using(ref) as resolved,
        deps.vectors.using(names) as inputs,
        _preconditioner(deps, resolved) as beside,
    ):
        if wanted == "quadratic" and resolved.operator.kind == "jacobian":
            raise ServiceError(
                "OPERATOR_NOT_SYMMETRIC",
                "A Jacobian is no square matrix and has no quadratic form; ask for that of a GGN.",
                field="operator.kind",
            )
        check_space(resolved, None, inputs, "vectors")

        async def work(backend: Backend) -> list[float]:
            await deps.vectors.ensure_resident(backend, [*inputs, *beside])
            return await backend.evaluate_forms(
                resolved.operator, wanted, [vector.name.id for vector in inputs]
            )

        return await deps.group.call(work)


async def losses_along(
    deps: Dependencies, ref: OperatorRef, directions: Sequence[str], coefficients: Sequence[float]
) -> list[float]:
    """The loss at points around θ.

    Args:
        deps: The server's stores, settings and ranks.
        ref: The operator.
        directions: Names of the K directions.
        coefficients: K coefficients for each point, point after point.

    Raises:
        ServiceError: POINTS_INVALID, VECTORS_MISSING, VECTOR_SPACE_MISMATCH, INPUT_MISSING, and as
            `OperatorResolver.resolve`.
    """
    names = _vector_names(directions)
    num_points, left = divmod(len(coefficients), len(names))
    fine = all(map(math.isfinite, coefficients))
    if left or not 1 <= num_points <= MAX_POINTS or not fine:
        which = "" if fine else ", not all of them finite"
        raise ServiceError(
            "POINTS_INVALID",
            f"Give {len(names)} finite numbers for each of 1 to {MAX_POINTS} points, one for each "
            f"direction; these are {len(coefficients)}{which}.",
            field="coefficients",
        )
    each = len(names)
    points = [coefficients[i : i + each] for i in range(0, len(coefficients), each)]
    async with deps.operators.using(ref) as resolved, deps.vectors.using(names) as inputs:
        check_space(resolved, None, inputs, "directions")

        async def work(backend: Backend) -> list[float]:
            await deps.vectors.ensure_resident(backend, inputs)
            return await backend.losses_along(
                resolved.operator, [vector.name.id for vector in inputs], points
            )

        return await deps.group.call(work)


async def _apply(
    deps: Dependencies,
    ref: OperatorRef,
    resolved: ResolvedOperator,
    inputs: Sequence[Vector],
    beside: Sequence[Vector],
    lifetime: Lifetime,
) -> list[Vector]:
    check_space(resolved, resolved.domain, inputs, "vectors")
    outputs = _products(deps, resolved, resolved.codomain, len(inputs), lifetime)

    async def work(backend: Backend) -> None:
        await deps.vectors.ensure_resident(backend, [*inputs, *beside])
        news = await backend.apply(
            resolved.operator,
            [vector.name.id for vector in inputs],
            [vector.name.id for vector in outputs],
        )
        computed("call", len(inputs), resolved.batch.statistics.num_positions)
        if news:
            log.info(
                "products",
                checkpoint=ref.checkpoint,
                data_batch=ref.data_batch,
                kind=resolved.operator.kind,
                precision=resolved.operator.precision,
                notes=dict(news),
            )

    return await deps.vectors.make(outputs, work)


@contextlib.asynccontextmanager
async def _preconditioner(
    deps: Dependencies, resolved: ResolvedOperator
) -> AsyncIterator[list[Vector]]:
    """The vector that an operator is preconditioned with, if there is one, held for the block.

    Raises:
        ServiceError: RESOURCE_NOT_FOUND, VECTOR_SPACE_MISMATCH, INPUT_MISSING.
    """
    names = [] if resolved.precondition is None else [resolved.precondition]
    async with deps.vectors.using(names) as found:
        for vector in found:
            check_preconditioner(resolved, vector, "operator")
        yield found


def _vector_names(vectors: Sequence[str]) -> list[Name]:
    if not vectors:
        raise ServiceError("VECTORS_MISSING", "Name one or more vectors.", field="vectors")
    return [parse(name, "vectors") for name in vectors]


def _products(
    deps: Dependencies,
    resolved: ResolvedOperator,
    outputs: Outputs | None,
    count: int,
    lifetime: Lifetime,
) -> list[Vector]:
    return [
        deps.vectors.new(
            resolved.checkpoint.name,
            resolved.operator.space.dtype,
            resolved.length(outputs),
            None,
            lifetime=lifetime,
            outputs=outputs,
            selection=resolved.selection,
        )
        for _ in range(count)
    ]
