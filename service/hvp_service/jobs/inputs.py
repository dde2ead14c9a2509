"""The vectors that a job's question names: looked up, checked and held."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence

from hvp_service.jobs.store import PRECONDITION, JobSpec
from hvp_service.operators.resolver import (
    ResolvedOperator,
    check_preconditioner,
    check_space,
)
from hvp_service.vectors.rows import Vector
from hvp_service.vectors.store import VectorStore


@contextlib.asynccontextmanager
async def using_inputs(
    vectors: VectorStore, asked: JobSpec, resolved: ResolvedOperator, *, is_queued: bool = False
) -> AsyncIterator[Mapping[str, Sequence[Vector]]]:
    """Look up the vectors that a question names and hold them for the block.

    Args:
        vectors: Store of the vectors.
        asked: The question.
        resolved: The operator of the question.
        is_queued: Whether there is a job of the question, which finds its vectors even when they
            were deleted meanwhile.

    Yields:
        The vectors by field of the spec; the operator's preconditioner under PRECONDITION.

    Raises:
        ServiceError: RESOURCE_NOT_FOUND; VECTOR_SPACE_MISMATCH; INPUT_MISSING for a product whose
            ranks are gone.
    """
    inputs = asked.inputs
    names = [name for some in inputs.values() for name in some]
    async with vectors.using(names, for_job=is_queued) as found:
        by_name = dict(zip(names, found, strict=True))
        by_field = {field: [by_name[name] for name in some] for field, some in inputs.items()}
        for each in asked.declared.inputs:
            outputs = resolved.domain if each.space == "domain" else resolved.codomain
            where = f"spec.{asked.operation}.{each.field}"
            check_space(resolved, outputs, by_field[each.field], where)
        for vector in by_field.get(PRECONDITION, []):
            check_preconditioner(resolved, vector, f"spec.{asked.operation}.operator")
        yield by_field
