"""Losses, gradients and products."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import structlog
from hvp_workers.backend import Backend

from hvp_service.dependencies import Dependencies
from hvp_service.errors import ServiceError
from hvp_service.lifetimes import Lifetime
from hvp_service.names import parse
from hvp_service.operator_resolver import OperatorRef, ResolvedOperator
from hvp_service.vector_rows import Outputs, Vector, words_of

log = structlog.get_logger()


@dataclass(frozen=True)
class Loss:
    """A mean over targets, in nats."""

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
    batch = resolved.batch.statistics
    if resolved.operator.kind == "jacobian":
        return resolved, 0  # whose outputs have one cut alone
    return resolved, ref.micro_batch_size or deps.group.backend.default_micro_batch(
        batch.num_sequences, batch.sequence_length
    )


async def evaluate_loss(deps: Dependencies, ref: OperatorRef) -> Loss:
    """L(θ). Cost: one forward pass."""
    async with deps.operators.using(ref) as resolved:
        value = await deps.group.call(lambda backend: backend.loss(resolved.operator))
    return Loss(value, resolved.batch.statistics.num_targets)


async def compute_gradient(deps: Dependencies, ref: OperatorRef, session: str = "") -> Vector:
    """∇L(θ), left on the ranks, in a session or in none.

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
    """The product with each vector, left on the ranks, in a session or in none.

    Args:
        deps: Dependencies.
        ref: The operator.
        vectors: Names.
        session: That the products are to belong to; "" for none.
        transposed: Take the transposed matrix.

    Raises:
        ServiceError: VECTORS_MISSING, VECTOR_SPACE_MISMATCH, INPUT_MISSING, SESSION_EXPIRED, and
            as `OperatorResolver.resolve`.
    """
    if not vectors:
        raise ServiceError("VECTORS_MISSING", "Name one or more vectors.", field="vectors")
    names = [parse(name, "vectors") for name in vectors]
    async with (
        deps.operators.using(ref) as resolved,
        deps.sessions.using(resolved.checkpoint.name.project, session) as lifetime,
        deps.vectors.using(names) as inputs,
    ):
        wanted = resolved.transposed if transposed else resolved
        return await _apply(deps, ref, wanted, inputs, lifetime)


async def _apply(
    deps: Dependencies,
    ref: OperatorRef,
    resolved: ResolvedOperator,
    inputs: Sequence[Vector],
    lifetime: Lifetime,
) -> list[Vector]:
    for index, vector in enumerate(inputs):
        domain = resolved.domain
        space = (
            resolved.checkpoint.name,
            resolved.operator.space.dtype,
            None if domain is None else domain.batch,
        )
        if vector.space != space:
            raise ServiceError(
                "VECTOR_SPACE_MISMATCH",
                f"{vector.name} is a {words_of(vector.space)}; the operator takes a "
                f"{words_of(space)}.",
                field=f"vectors[{index}]",
            )
    outputs = _products(deps, resolved, resolved.codomain, len(inputs), lifetime)

    async def work(backend: Backend) -> None:
        await deps.vectors.ensure_resident(backend, inputs)
        news = await backend.apply(
            resolved.operator,
            [vector.name.id for vector in inputs],
            [vector.name.id for vector in outputs],
        )
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
            resolved.num_parameters if outputs is None else math.prod(outputs.shape),
            None,
            lifetime=lifetime,
            outputs=outputs,
        )
        for _ in range(count)
    ]
