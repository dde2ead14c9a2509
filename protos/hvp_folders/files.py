"""A folder's small files, read with a limit, and links whose target is not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hvp_folders.refusal import files_invalid

MAX_JSON_BYTES = 64 << 20  # an index names every tensor; a config is far smaller


def read_object(path: Path) -> dict[str, Any] | None:
    """Read a JSON object.

    Args:
        path: File.

    Returns:
        The object; None when the file holds none, or is longer than `MAX_JSON_BYTES`.

    Raises:
        OSError: The file cannot be read.
    """
    if path.stat().st_size > MAX_JSON_BYTES:
        return None
    try:
        loaded = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return None
    return loaded if isinstance(loaded, dict) else None


def require_file(path: Path, name: str) -> None:
    """Refuse a file that is not there.

    Args:
        path: Where it should be.
        name: What the refusal calls it.

    Raises:
        FolderError: CHECKPOINT_FILES_INVALID, with the target when it is a link to nothing.
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
