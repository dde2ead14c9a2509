"""The memory of its host or its device that one rank may use."""

from __future__ import annotations

import socket
from typing import final

import psutil
import torch
from hvp_core.sharding.collective import Collective

from hvp_workers.allocator import return_freed_memory


@final
class Memory:
    """One rank's share of memory, in bytes: ranks of one host divide it evenly.

    All ranks make theirs together.

    Args:
        collective: The exchange between the ranks, by which those of one host are counted.
        device: The device that holds the rank's tensors.
    """

    def __init__(self, collective: Collective, device: torch.device):
        self._collective = collective
        self._device = device
        host = socket.gethostname()
        self._ranks_here = collective.gather_objects(host).count(host)

    def total(self) -> int:
        """This rank's share of all memory, in bytes, whether it is free or not."""
        if self._device.type == "cuda":
            return int(torch.cuda.mem_get_info(self._device)[1])
        return psutil.virtual_memory().total // self._ranks_here

    def give_back(self) -> None:
        """Give memory that was freed here back, so that other processes can use it."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        else:
            return_freed_memory()

    def least_available(self) -> int:
        """Bytes of a rank's share of free memory, on the rank that has least.

        All ranks must call it together.
        """
        self.give_back()
        self._collective.gather_objects(None)  # when all have done so
        shares: list[int] = self._collective.gather_objects(self._available())
        return min(shares)

    def _available(self) -> int:
        if self._device.type == "cuda":
            return int(torch.cuda.mem_get_info(self._device)[0])
        return psutil.virtual_memory().available // self._ranks_here
