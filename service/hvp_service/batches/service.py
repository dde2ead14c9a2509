"""Deletion of data batches, with the vectors and blobs that depend on them."""

from __future__ import annotations

from hvp_service.app.dependencies import Dependencies
from hvp_service.calls.errors import ServiceError
from hvp_service.calls.names import Name


async def delete_batch(deps: Dependencies, name: Name) -> None:
    """Delete a data batch, the outputs on it, and its blob unless something else is made of it.

    Raises:
        ServiceError: RESOURCE_NOT_FOUND, RESOURCE_IN_USE.
    """
    batch = await deps.batches.get(name)
    for job in await deps.jobs.unfinished(name.project):
        if job.uses(name):
            raise ServiceError(
                "RESOURCE_IN_USE",
                f"{job.name}, which has not ended, uses {name}; cancel it first.",
                resource=str(name),
            )
    await deps.batches.delete(name)
    await deps.vectors.delete_of_batch(name)
    await deps.blobs.release(name.project, [batch.digest])
