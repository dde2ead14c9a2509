"""The folder that a user names, and the files of it that are the model."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import final

from hvp_folders.config import read_config
from hvp_folders.refusal import FolderError, files_invalid
from hvp_folders.weights import CONFIG, WEIGHTS_SUFFIX, choose_weights

from hvp_client._exceptions import InvalidArgumentError

_PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})


@final
@dataclass(frozen=True, kw_only=True)
class CheckpointFolder:
    """The files of a checkpoint's folder, sorted into the model's and others.

    Attributes:
        files: Files to upload: the config, then an index where there is one, then the weights.
        ignored: Names of files that look like weights and are no part of the model.
    """

    files: tuple[Path, ...]
    ignored: tuple[str, ...]


def open_folder(directory: str | os.PathLike[str]) -> CheckpointFolder:
    """Find the files that make up the model in a folder, as transformers would.

    Args:
        directory: Folder of config.json and safetensors, or a model's folder in a Hugging Face
            cache (`models--org--name`), whose current snapshot is taken.

    Returns:
        The files.

    Raises:
        InvalidArgumentError: `CHECKPOINT_FILES_INVALID`, `PICKLE_REFUSED`, `CONFIG_INVALID` or
            `QUANTIZATION_UNSUPPORTED`.
    """
    folder = Path(directory)
    try:
        return _open(folder)
    except FolderError as error:
        raise InvalidArgumentError(
            f"{folder}: {error.message}",
            reason=error.reason,
            field="directory",
            metadata=error.metadata,
        ) from None


def _open(folder: Path) -> CheckpointFolder:
    if not folder.is_dir():
        raise files_invalid("This is not a folder; give the one that holds config.json")
    if (folder / "snapshots").is_dir() and not (folder / CONFIG).exists():
        folder = _snapshot(folder)
    paths = {path.name: path for path in folder.iterdir() if path.is_symlink() or path.is_file()}
    _refuse_pickles(paths)
    config = read_config(paths[CONFIG]) if CONFIG in paths else None
    weights = choose_weights(paths, config)
    if config is None:
        raise files_invalid("There is no config.json; add the one that the model came with", CONFIG)
    return CheckpointFolder(
        files=tuple(paths[name] for name in (CONFIG, *weights.files)), ignored=weights.ignored
    )


def _snapshot(cache: Path) -> Path:
    """The folder of files inside a model's folder of a Hugging Face cache."""
    snapshots = sorted(path.name for path in (cache / "snapshots").iterdir() if path.is_dir())
    main = cache / "refs" / "main"
    if main.is_file():
        commit = main.read_text(encoding="utf-8").strip()
        if commit not in snapshots:
            raise files_invalid(
                f"This is a Hugging Face cache whose refs/main is {commit[:40]!r}, and there "
                "is no such snapshot; download the model again, or give a folder below snapshots/"
            )
        return cache / "snapshots" / commit
    if len(snapshots) != 1:
        raise files_invalid(
            f"This is a Hugging Face cache without refs/main, with {len(snapshots)} snapshots; "
            "give one of the folders below snapshots/, or download the model again"
        )
    return cache / "snapshots" / snapshots[0]


def _refuse_pickles(paths: dict[str, Path]) -> None:
    """Refuse a folder that has its weights in pickles alone."""
    if any(name.endswith(WEIGHTS_SUFFIX) for name in paths):
        return
    pickles = sorted(name for name, path in paths.items() if path.suffix in _PICKLE_SUFFIXES)
    if pickles:
        raise FolderError(
            "PICKLE_REFUSED",
            f"There are only pickle files ({', '.join(pickles[:3])}), which can run any program "
            "when they are opened; load the model where you trust it and write it with "
            "`model.save_pretrained(folder, safe_serialization=True)`",
            {"path": pickles[0]},
        )
