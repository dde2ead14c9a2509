"""The one place that chooses a backend."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from hvp_workers.backend import Backend, Tuning
from hvp_workers.inprocess import inprocess_backend
from hvp_workers.ray_backend import ray_backend


def open_backend(
    *,
    kind: Literal["ray", "inprocess"],
    num_workers: int,
    device: Literal["cpu", "cuda"],
    run_dir: Path | None = None,
    tuning: Tuning | None = None,
) -> Backend:
    """Make a backend, not yet started.

    Args:
        kind: `ray`: one Ray actor per rank; `inprocess`: one rank in a thread of this process.
        num_workers: Number of ranks; must be 1 in process.
        device: The device that holds the ranks' tensors.
        run_dir: Folder in which the Ray backend notes the processes it starts, so that the next
            server on the same folder ends those that a killed one left; None notes nothing.
        tuning: Settings of how ranks compute; None for the defaults.

    Raises:
        ValueError: More than one rank in process.
    """
    if kind == "inprocess":
        if num_workers != 1:
            raise ValueError("the in-process backend has one rank; use the Ray backend for more")
        return inprocess_backend(device, tuning or Tuning())
    return ray_backend(
        num_workers=num_workers, device=device, run_dir=run_dir, tuning=tuning or Tuning()
    )
