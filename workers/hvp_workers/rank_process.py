"""How the process of a rank begins: its settings before torch is imported, and the imports."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from hvp_workers.allocator import keep_freed_memory
from hvp_workers.backend import Tuning


def prepare_process(tuning: Tuning, *, device: str, num_threads: int) -> None:
    """Set up a process that is a rank and nothing else.

    Args:
        tuning: Settings of how ranks compute.
        device: `cpu` or `cuda`.
        num_threads: The rank's share of the host's cores.
    """
    use_compile_cache(tuning.compile_cache)
    fix_workspaces()
    # Otherwise every rank of a host compiles with as many processes as the host has cores.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(num_threads))
    # It is quicker and takes more at the peak; who asks for lean has no more.
    if device == "cpu" and tuning.schedule != "lean":
        keep_freed_memory()


@contextmanager
def loading_modules() -> Iterator[None]:
    """Load modules without garbage collection, now and later: all of their objects stay.

    This saves nearly one of the four seconds that torch, transformers and the engine take, and a
    quarter of a second of the first product, whose traces make so many objects that all are looked
    through.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if collects:
            gc.enable()


def total_memory(device: str) -> int:
    """All bytes of the device's memory, or for `cpu` of the host's, whether free or not."""
    if device == "cpu":
        return int(psutil.virtual_memory().total)
    import torch

    return int(torch.cuda.mem_get_info(torch.device(device))[1])


def fix_workspaces() -> None:
    """Give cuBLAS workspaces of a fixed size, without which sums may be cut otherwise each time.

    Torch insists on it where it is to be deterministic, and reads it once. The size is what torch
    takes on a Hopper anyway.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def use_compile_cache(folder: Path | None) -> None:
    """Keep what TorchInductor and Triton compile in a folder.

    It overrides the environment: a process that has used TorchInductor names its own folder there,
    which the processes that it starts inherit.

    Args:
        folder: Folder on a file system that lasts; None changes nothing.
    """
    if folder is None:
        return
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
    os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")
