"""Losses, gradients and products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import structlog
from hvp_workers.backend import Backend

from hvp_service.dependencies import Dependencies
from hvp_service.errors import ServiceError
from hvp_service.names import parse
from hvp_service.operator_resolver import OperatorRef, ResolvedOperator
from hvp_service.vector_store import Vector

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
    return resolved, ref.micro_batch_size or deps.group.backend.default_micro_batch(
        batch.num_sequences, batch.sequence_length
    )


async def evaluate_loss(deps: Dependencies, ref: OperatorRef) -> Loss:
    """L(θ). Cost: one forward pass."""
    resolved = await deps.operators.resolve(ref)
    value = await deps.group.call(lambda backend: backend.loss(resolved.operator))
    return Loss(value, resolved.batch.statistics.num_targets)


async def compute_gradient(deps: Dependencies, ref: OperatorRef) -> Vector:
    """∇L(θ), left on the ranks."""
    resolved = await deps.operators.resolve(ref)
    (gradient,) = _products(deps, resolved, 1)

    async def work(backend: Backend) -> None:
        await backend.gradient(resolved.operator, gradient.name.id)

    return (await deps.vectors.make([gradient], work))[0]


async def apply(deps: Dependencies, ref: OperatorRef, vectors: Sequence[str]) -> list[Vector]:
    """The product with each vector, left on the ranks.

    Raises:
        ServiceError: VECTORS_MISSING, VECTOR_SPACE_MISMATCH, INPUT_MISSING, and as
            `OperatorResolver.resolve`.
    """
    if not vectors:
        raise ServiceError("VECTORS_MISSING", "Name one or more vectors.", field="vectors")
    resolved = await deps.operators.resolve(ref)
    inputs = [await deps.vectors.get(parse(name, "vectors")) for name in vectors]
    for index, vector in enumerate(inputs):
        if (
            vector.checkpoint != resolved.checkpoint.name
            or vector.dtype != resolved.operator.space.dtype
        ):
            raise ServiceError(
                "VECTOR_SPACE_MISMATCH",
                f"{vector.name} is a {vector.dtype} vector of {vector.checkpoint}; the operator is "
                f"{resolved.operator.space.dtype} on {resolved.checkpoint.name}.",
                field=f"vectors[{index}]",
            )
    outputs = _products(deps, resolved, len(inputs))

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


def _products(deps: Dependencies, resolved: ResolvedOperator, count: int) -> list[Vector]:
    return [
        deps.vectors.new(
            resolved.checkpoint.name, resolved.operator.space.dtype, resolved.num_parameters, None
        )
        for _ in range(count)
    ]
