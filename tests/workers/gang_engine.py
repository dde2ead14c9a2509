"""A real engine for tests of groups: sums over the ranks, and the ways in which a rank can fail."""

from __future__ import annotations

import os
import threading
import time
from typing import final

import torch
from hvp_core.sharding.collective import Collective
from hvp_workers.backend import BackendError, Tuning


@final
class GangEngine:
    """What tests ask of a rank; every method but `fail_on` is entered by all ranks alike."""

    def __init__(self, collective: Collective, device: str, tuning: Tuning):
        self._collective = collective
        self._device = device
        self._tuning = tuning
        self._history: list[int] = []

    def pid(self) -> int:
        return os.getpid()

    def environment(self, *names: str) -> list[str | None]:
        return [os.environ.get(name) for name in names]

    def threads(self) -> int:
        return torch.get_num_threads()

    def total(self, values: list[float]) -> list[float]:
        """Sum over ranks of (rank + 1) * values."""
        local = torch.tensor(values, dtype=torch.float64) * (self._collective.rank + 1)
        return [float(value) for value in self._collective.sum(local).tolist()]

    def gather(self, size: int) -> list[float]:
        """Everybody's chunk of `size` copies of its rank, through the bulk path."""
        chunk = torch.full((size,), float(self._collective.rank), device=self._device)
        return [float(value) for value in self._collective.gather(chunk).cpu().tolist()]

    def append(self, value: int, wait_s: float) -> list[int]:
        """Note a call; ranks wait differently long, and agree by a collective."""
        time.sleep(wait_s * self._collective.rank)
        self._history.append(value)
        return [int(value) for value in self.total([float(value)])]

    def history(self) -> list[int]:
        return self._history

    def fail_on(self, ranks: list[int], reason: str) -> list[float]:
        """Refuse on some ranks; the others wait for them in a collective."""
        if self._collective.rank in ranks:
            raise BackendError(reason, "The test asked for it.", {"layer": "block 3"})
        return self.total([1.0])

    def fail_apart(self) -> None:
        """Refuse on every rank, for different reasons."""
        raise BackendError(["SHAPE_MISMATCH", "NON_FINITE"][self._collective.rank], "As asked.")

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def crash(self) -> None:
        """An error nobody thought of."""
        raise ZeroDivisionError("float division by zero")

    def unsendable(self) -> object:
        """An answer that cannot be pickled."""
        return threading.Lock()

    def exit_on(self, rank: int) -> list[float]:
        """End one rank's process at once; the others wait for it in a collective."""
        if self._collective.rank == rank:
            os._exit(3)
        return self.total([1.0])
