"""A folder's small files, read with a limit, and links whose target is not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hvp_folders.json_bounds import JsonBounds
from hvp_folders.refusal import files_invalid


def read_object(path: Path, bounds: JsonBounds) -> tuple[dict[str, Any] | None, str]:
    """Read a JSON object.

    Args:
        path: The file.
        bounds: Limits on the file's contents.

    Returns:
        The object and ""; or None and the fault, in words that follow the file's name.

    Raises:
        OSError: The file cannot be read.
    """
    with path.open("rb") as file:
        raw = file.read(bounds.num_bytes + 1)
    if too_much := bounds.exceeded_by(raw):
        return None, f"has {too_much}"
    try:
        loaded = json.loads(raw)
    except (ValueError, RecursionError):
        loaded = None
    return (loaded, "") if isinstance(loaded, dict) else (None, "is not a JSON object")


def require_file(path: Path, name: str) -> None:
    """Refuse a file that is not there.

    Args:
        path: Path of the file.
        name: The file's name in the refusal.

    Raises:
        FolderError: CHECKPOINT_FILES_INVALID, with the target where the path is a dangling link.
    """
    if path.is_file():
        return
    if path.is_symlink():
        raise files_invalid(
            f"{name} is a link to {path.readlink()}, which is not there: a download that was not "
            "finished, or a cache that was cleaned; download the model again",
            name,
        )
    raise files_invalid(f"{name} is not a file; give the folder of a checkpoint", name)
