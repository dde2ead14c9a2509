"""The things of a machine that a server needs: checked before it starts, named if it does not."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from hvp_workers import orphans

# The path of a Unix socket holds 107 characters, and Ray puts 62 to 65 after its folder's.
_LONGEST_TEMP_ROOT = 107 - 65 - len(f"/{orphans.TEMP_PREFIX}") - 8 - len(f"/{orphans.RAY_FOLDER}")
_ELSE = Path("/tmp")  # noqa: S108 - mkdtemp makes a private folder in it
# NVIDIA's, the same under Windows' Linux, AMD's.
_GPU_DEVICES = ("nvidia[0-9]*", "dxg", "kfd")
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - the kernel's own name for it


@dataclass(frozen=True, kw_only=True)
class Obstacle:
    """Something in the way of a server.

    Attributes:
        what: The folder or the part of the machine that is in the way, in words.
        problem: A sentence that names the problem.
        fix: A sentence that says what to do or to set.
    """

    what: str
    problem: str
    fix: str

    def __str__(self) -> str:
        return f"{self.problem} {self.fix}"


def temp_root() -> Path:
    """The folder in which Ray's folder is made: TMPDIR where Ray can use it, else /tmp."""
    root = Path(tempfile.gettempdir())
    return root if is_fit_for_sockets(root) else _ELSE


def unused_temporary() -> Path | None:
    """The temporary folder, if Ray cannot use it and its folder is made elsewhere; else None."""
    try:
        root = Path(tempfile.gettempdir())
    except OSError:  # there is none, which is an obstacle
        return None
    return None if is_fit_for_sockets(root) else root


def is_fit_for_sockets(folder: Path) -> bool:
    """Whether Ray can put its sockets into a folder: its path is short enough, and in ASCII."""
    return len(os.fsencode(folder)) <= _LONGEST_TEMP_ROOT and str(folder).isascii()


def has_gpu_driver() -> bool:
    """Whether the driver of a GPU has left its devices on this machine, without asking torch."""
    return any(any(Path("/dev").glob(device)) for device in _GPU_DEVICES)


def torch_accelerator() -> str | None:
    """The accelerator that the installed torch was built for, found without importing torch.

    Returns:
        Name and version, such as `CUDA 13.0`; "" for CPUs alone; None where there is no torch.
    """
    found = find_spec("torch")
    if found is None or found.origin is None:
        return None
    text = Path(found.origin).with_name("version.py").read_text()
    for name, title in (("cuda", "CUDA"), ("hip", "ROCm")):
        if version := re.search(rf"^{name}\b[^=]*=\s*['\"](.+)['\"]", text, re.MULTILINE):
            return f"{title} {version[1]}"
    return ""


def no_gpu() -> Obstacle | None:
    """The obstacle for ranks that compute on GPUs, if torch has no GPU on this machine."""
    if (built_for := torch_accelerator()) == "":
        return Obstacle(
            what="devices",
            problem="The installed torch was built for CPUs alone.",
            fix="Install a build for your GPU, or use --device cpu.",
        )
    if not has_gpu_driver():
        return Obstacle(
            what="devices",
            problem=f"torch for {built_for} finds no GPU on this machine: there is no device of a "
            f"driver's ({', '.join(f'/dev/{device}' for device in _GPU_DEVICES)}).",
            fix="Check `nvidia-smi`, give a container its GPUs (--gpus all), or use --device cpu.",
        )
    return None


def lost_current_folder() -> Obstacle | None:
    """The obstacle that the current folder of this process has been deleted, if it has."""
    try:
        Path.cwd()
    except OSError:
        # The kernel still knows what it was called.
        where = str(Path("/proc/self/cwd").readlink()).removesuffix(" (deleted)")
        return Obstacle(
            what="current folder",
            problem=f"The current folder, {where}, has been deleted.",
            fix="Change to one that exists and start again.",
        )
    return None


def obstacles(
    *, shared_memory: Path = _SHARED_MEMORY, temporary: Path | None = None
) -> list[Obstacle]:
    """Everything that keeps ranks of this machine from starting.

    Args:
        shared_memory: Folder in which Ray and ranks of one machine exchange tensors.
        temporary: Folder for Ray's sockets and logs; by default that of `temp_root`.
    """
    return list(_obstacles(shared_memory, temporary))


def _obstacles(shared_memory: Path, temporary: Path | None) -> Iterator[Obstacle]:
    if lost := lost_current_folder():
        yield lost
    try:
        folder = temporary or temp_root()
    except OSError as error:  # no folder of many could be written to
        yield Obstacle(
            what="temporary folder",
            problem=f"There is no temporary folder: {error}.",
            fix="Set TMPDIR to a folder that can be written to.",
        )
    else:
        if problem := _write_problem(folder):
            yield Obstacle(
                what="temporary folder",
                problem=f"The temporary folder {folder} cannot be written to ({problem}).",
                fix=f"Set TMPDIR to one that can, with an ASCII path of at most "
                f"{_LONGEST_TEMP_ROOT} characters.",
            )
    if shared_memory.exists() and (problem := _write_problem(shared_memory)):
        yield Obstacle(
            what="shared memory",
            problem=f"{shared_memory} cannot be written to ({problem}); ranks exchange tensors "
            "there.",
            fix=f"Mount it writable (mount -o remount,rw {shared_memory}; of a container, do not "
            "make it read-only), or use --backend inprocess --workers 1.",
        )


def _write_problem(folder: Path) -> str:
    """Why no file can be made in a folder; "" if one can."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return error.strerror or str(error)
