"""What one rank may use of its host's or its device's memory."""

from __future__ import annotations

import socket
from typing import final

import psutil
import torch
from hvp_core.sharding.collective import Collective

from hvp_workers.allocator import return_freed_memory


@final
class Memory:
    """Bytes; ranks of one host divide it evenly.

    Args:
        collective: How it finds out who else is here.
        device: Where its tensors live.
    """

    def __init__(self, collective: Collective, device: torch.device):
        self._collective = collective
        self._device = device
        host = socket.gethostname()
        self._ranks_here = collective.gather_objects(host).count(host)

    def total(self) -> int:
        """A rank's share of all there is."""
        if self._device.type == "cuda":
            return int(torch.cuda.mem_get_info(self._device)[1])
        return psutil.virtual_memory().total // self._ranks_here

    def give_back(self) -> None:
        """Let others have what was freed here."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        else:
            return_freed_memory()

    def least_available(self) -> int:
        """Its share of what is free now, of the rank that has least; all ranks must call it."""
        self.give_back()
        self._collective.gather_objects(None)  # when all have done so
        shares: list[int] = self._collective.gather_objects(self._available())
        return min(shares)

    def _available(self) -> int:
        if self._device.type == "cuda":
            return int(torch.cuda.mem_get_info(self._device)[0])
        return psutil.virtual_memory().available // self._ranks_here
