"""Which programs are known to be right: in this process, and in a folder for those to come.

A verdict in the folder is an empty file. Its name is a digest of the program's text, of all that
was differentiated, of this package's own source and of what it ran on: a verdict of another version
of anything is never found.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Hashable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import final

import torch

_PACKAGE = "hvp_core"


@final
class Verdicts:
    """A set of programs, each with what it was taken through.

    A folder that cannot be read or written costs comparisons, and nothing else.
    """

    def __init__(self) -> None:
        self._known: set[Hashable] = set()
        self._folder: Path | None = None
        self._device = ""

    def keep_in(self, folder: Path, device: torch.device) -> None:
        """Keep verdicts in a folder too, and believe those that are there.

        Args:
            folder: Folder of this server alone; it is made if it is not there.
            device: Device that programs are compared on.
        """
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._folder = folder
        is_cuda = device.type == "cuda"
        self._device = torch.cuda.get_device_name(device) if is_cuda else _cpu()

    def __contains__(self, key: Hashable) -> bool:
        if key in self._known:
            return True
        path = self._path(key)
        with contextlib.suppress(OSError):
            if path is not None and path.exists():
                self._known.add(key)
                return True
        return False

    def add(self, key: Hashable) -> None:
        """Remember that a program is right."""
        self._known.add(key)
        path = self._path(key)
        with contextlib.suppress(OSError):
            if path is not None:
                path.touch(mode=0o600)

    def _path(self, key: Hashable) -> Path | None:
        """The file of a verdict; None where there is no folder, or no lasting name for the key."""
        if self._folder is None:
            return None
        name = digest(key, f"{_source()} {torch.__version__} {self._device}")
        return None if name is None else self._folder / name


def digest(key: Hashable, beside: str = "") -> str | None:
    """A name for a key that means the same in every process; None where there is none.

    Args:
        key: The key of a program.
        beside: What else the name tells.
    """
    text = _text(key)
    return None if text is None else hashlib.sha256(f"{beside} {text}".encode()).hexdigest()


def _text(key: Hashable) -> str | None:
    """A key in words that mean the same in every process; None where there are none.

    Only what this package declares is told by its fields: a class of somebody else's may come to
    mean something else.
    """
    if isinstance(key, str | int | float | bool | None):
        return repr(key)
    if isinstance(key, tuple):
        parts = [_text(each) for each in key]
        return None if None in parts else f"({', '.join(map(str, parts))})"
    is_own = type(key).__module__.partition(".")[0] == _PACKAGE
    if is_own and is_dataclass(key):
        # Rules are functions, told apart by their name; what they do is in the source.
        values = [getattr(key, each.name) for each in fields(key)]
        named = [getattr(each, "__qualname__", each) for each in values]
        if any("<lambda>" in str(each) for each in named):
            return None
        words = _text(tuple(named))
        return words and f"{type(key).__qualname__}{words}"
    return None


@functools.cache
def _source() -> str:
    """A digest of this package's source files."""
    digest = hashlib.sha256()
    root = Path(__file__).parent.parent
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _cpu() -> str:
    capability: str = torch.backends.cpu.get_cpu_capability()
    return f"cpu {capability}"
