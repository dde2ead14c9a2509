"""The real engine with a gate before its products, which a test opens from outside."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

from hvp_core.sharding.collective import Collective
from hvp_workers.backend import Operator, Tuning
from hvp_workers.engine import RankEngine


@final
class GatedEngine:
    """Its gate is a file in the folder for compiled code, the one thing a test can tell a rank."""

    def __init__(self, collective: Collective, device: str, tuning: Tuning):
        assert tuning.compile_cache is not None
        self._folder = tuning.compile_cache
        self._rank = collective.rank
        self._engine = RankEngine(collective, device, tuning)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def apply(
        self, operator: Operator, inputs: Sequence[str], outputs: Sequence[str]
    ) -> Mapping[str, str]:
        """A product that begins when the gate is open."""
        waiting(self._folder, self._rank).touch()
        while not gate(self._folder).exists():
            time.sleep(0.01)
        return self._engine.apply(operator, inputs, outputs)


def gate(folder: Path) -> Path:
    """The file that opens the gate."""
    return folder / "open"


def waiting(folder: Path, rank: int) -> Path:
    """The file by which a rank says that it is at the gate."""
    return folder / f"waiting-{rank}"
