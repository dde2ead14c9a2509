"""Changes and deletions of checkpoints, which concern more than their own rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hvp_service.app.dependencies import Dependencies
from hvp_service.calls.labels import check_labels, check_mask
from hvp_service.calls.names import Name
from hvp_service.checkpoints.store import Checkpoint, require_unused


async def update_checkpoint(
    deps: Dependencies, name: Name, labels: Mapping[str, str], mask: Sequence[str], etag: str
) -> Checkpoint:
    """Change a checkpoint's labels.

    Args:
        deps: The server's stores, settings and ranks.
        name: Name of the checkpoint.
        labels: Labels that the checkpoint is to have.
        mask: Names of the fields to change.
        etag: Tag of the labels to replace; "" replaces whatever labels there are.

    Raises:
        ServiceError: RESOURCE_NOT_FOUND, FIELD_MASK_INVALID, LABELS_INVALID, ETAG_MISMATCH.
    """
    check_mask(mask)
    check_labels(labels, "checkpoint.labels")
    return await deps.checkpoints.relabel(name, labels, etag)


async def delete_checkpoint(deps: Dependencies, name: Name) -> None:
    """Delete a checkpoint, the vectors of its space, and the blobs that nothing else is made of.

    Raises:
        ServiceError: RESOURCE_NOT_FOUND, RESOURCE_IN_USE.
    """
    checkpoint = await deps.checkpoints.get(name)
    unfinished = await deps.jobs.unfinished(name.project)
    require_unused(name, any(job.uses(name) for job in unfinished))
    await deps.checkpoints.delete(name)
    await deps.blobs.release(name.project, [file.digest for file in checkpoint.files])
    await deps.vectors.delete_of_checkpoint(name)
