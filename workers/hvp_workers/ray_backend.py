"""The backend whose ranks are Ray actors."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from hvp_workers.backend import Tuning
from hvp_workers.group_backend import GroupBackend
from hvp_workers.ray_group import RayGroup


def ray_backend(
    *, num_workers: int, device: Literal["cpu", "cuda"], run_dir: Path | None, tuning: Tuning
) -> GroupBackend:
    """A backend of `num_workers` Ray actors, not yet started.

    Args:
        num_workers: Number of ranks, one process each.
        device: The device that holds tensors; with `cuda` each rank takes one GPU.
        run_dir: Folder for the note of processes (see `orphans`); None writes none.
        tuning: Settings of how ranks compute.
    """
    return GroupBackend(
        RayGroup(num_workers=num_workers, device=device, run_dir=run_dir, tuning=tuning)
    )
