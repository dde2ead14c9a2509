"""What ranks exchange: scalars in a fixed order, gathered segments, scattered sums.

One interface has three implementations: one rank alone; any `torch.distributed` group; and CPU
ranks on one host, which pass segments through a small shared-memory window instead of sockets (gloo
over loopback moves 0.2 to 0.5 GB/s, a copy through memory 7 to 11).
"""

from __future__ import annotations

import mmap
import os
import pickle
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import torch
import torch.distributed as dist

from hvp_core.errors import CurvatureError

WINDOW_BYTES = (
    8 << 20
)  # per rank and buffer: a few L2 caches, and within a container's 64 MiB /dev/shm
_LENGTH_BYTES = 8
_FIRST_BYTES = 4096  # of an object's message, which travel with its length


class Collective(ABC):
    """Communication between the ranks of a group.

    Law: every method is called by all ranks in the same order, and returns bit-identical scalars on
    all of them.
    """

    rank: int
    world_size: int

    @abstractmethod
    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of a float64 CPU tensor over the ranks, added in order of rank."""

    @abstractmethod
    def gather(self, chunk: torch.Tensor) -> torch.Tensor:
        """Chunks (c,) of all ranks as one tensor (world_size * c,); may alias `chunk`."""

    @abstractmethod
    def scatter_sum(self, flat: torch.Tensor, out: torch.Tensor) -> None:
        """Add this rank's chunk of the sum over ranks of `flat` (world_size * c,) to `out` (c,).

        `out` may be of a narrower type.
        """

    @abstractmethod
    def gather_objects(self, value: Any) -> list[Any]:
        """Small picklable values of all ranks, in order of rank."""

    @contextmanager
    def same_fate(self, explain: Callable[[Exception], CurvatureError]) -> Iterator[None]:
        """If the body fails on one rank, fail on all, so that nobody waits for ever.

        The body must not communicate. Nobody leaves before everybody has finished it.

        Args:
            explain: Makes a CurvatureError from any other exception of the body.

        Raises:
            CurvatureError: This rank's own error; otherwise that of the first rank that failed.
        """
        failure: CurvatureError | None = None
        try:
            yield
        except CurvatureError as error:
            failure = error
        except Exception as error:
            failure = explain(error)
        for rank, each in enumerate(self.gather_objects(failure)):
            if each is not None:
                raise each if failure is None or rank != self.rank else failure


@final
class Alone(Collective):
    """One rank: nothing to exchange."""

    rank = 0
    world_size = 1

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The values themselves."""
        return values

    def gather(self, chunk: torch.Tensor) -> torch.Tensor:
        """The chunk itself, not a copy."""
        return chunk

    def scatter_sum(self, flat: torch.Tensor, out: torch.Tensor) -> None:
        """Add all of `flat`."""
        out += flat

    def gather_objects(self, value: Any) -> list[Any]:
        """The value alone."""
        return [value]


class Distributed(Collective):
    """Ranks of the default `torch.distributed` group, over gloo or NCCL."""

    def __init__(self, device: torch.device):
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self._device = device

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Gathered and added in order of rank, which an all-reduce does not promise."""
        local = values.to(self._device)
        parts = [torch.empty_like(local) for _ in range(self.world_size)]
        dist.all_gather(parts, local)
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total.cpu()

    def gather(self, chunk: torch.Tensor) -> torch.Tensor:
        """One all-gather into new memory."""
        flat = chunk.new_empty(self.world_size * chunk.numel())
        dist.all_gather_into_tensor(flat, chunk.contiguous())
        return flat

    def scatter_sum(self, flat: torch.Tensor, out: torch.Tensor) -> None:
        """One reduce-scatter; where torch is to be deterministic, an exchange and a sum by rank.

        A reduce-scatter promises no order. As many bytes travel either way.
        """
        if torch.are_deterministic_algorithms_enabled():
            parts = torch.empty_like(flat)
            dist.all_to_all_single(parts, flat.contiguous())
            out += parts.view(self.world_size, -1).sum(0)
            return
        part = torch.empty_like(out, dtype=flat.dtype)
        dist.reduce_scatter_tensor(part, flat)
        out += part

    def gather_objects(self, value: Any) -> list[Any]:
        """Pickled, through the group: in one exchange where all are small, otherwise in two."""
        data = pickle.dumps(value)
        message = len(data).to_bytes(_LENGTH_BYTES, "little") + data
        found = self._gather_bytes(message[:_FIRST_BYTES], _FIRST_BYTES)
        lengths = [int.from_bytes(each[:_LENGTH_BYTES], "little") for each in found]
        more = _LENGTH_BYTES + max(lengths) - _FIRST_BYTES
        if more > 0:
            rest = self._gather_bytes(message[_FIRST_BYTES:], more)
            found = [first + after for first, after in zip(found, rest, strict=True)]
        # A message ends where its pickle ends; they come from this group's own ranks.
        return [pickle.loads(each[_LENGTH_BYTES:]) for each in found]  # noqa: S301

    def _gather_bytes(self, data: bytes, size: int) -> list[bytes]:
        """The bytes of all ranks, in order of rank, with zeros behind them up to a size."""
        own = torch.frombuffer(bytearray(data.ljust(size, b"\0")), dtype=torch.uint8)
        parts = Distributed.gather(self, own.to(self._device)).cpu().view(self.world_size, size)
        return [part.numpy().tobytes() for part in parts]


@final
class SharedMemory(Distributed):
    """CPU ranks on one host: bulk through a window in shared memory, scalars through the group.

    Two buffers are used in turn, so one barrier per piece is enough: a rank writes piece i only
    after the barrier of piece i - 1, which every rank reaches after it has read piece i - 2.
    """

    def __init__(self, session: str):
        super().__init__(torch.device("cpu"))
        path = Path(f"/dev/shm/hvp-{session}")  # noqa: S108 (shared memory is the purpose)
        size = 2 * self.world_size * WINDOW_BYTES
        if self.rank == 0:
            # All gathered weights pass through it: for this user alone, whatever the umask.
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                os.posix_fallocate(descriptor, 0, size)
            finally:
                os.close(descriptor)
        dist.barrier()
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), size)
        dist.barrier()
        if self.rank == 0:
            path.unlink()  # the mapping lives on; nothing is left behind, however the ranks end
        window = torch.frombuffer(self._map, dtype=torch.uint8)
        self._buffers = window.view(2, self.world_size, WINDOW_BYTES)
        self._turn = 0

    def _next_buffer(self, dtype: torch.dtype) -> torch.Tensor:
        self._turn ^= 1
        return self._buffers[self._turn].view(dtype)  # (world_size, elements)

    def gather(self, chunk: torch.Tensor) -> torch.Tensor:
        """Each rank writes its piece, then copies everybody's."""
        flat = chunk.new_empty(self.world_size, chunk.numel())
        step = WINDOW_BYTES // chunk.element_size()
        for start in range(0, chunk.numel(), step):
            piece = chunk[start : start + step]
            buffer = self._next_buffer(chunk.dtype)[:, : piece.numel()]
            buffer[self.rank] = piece
            dist.barrier()
            flat[:, start : start + step] = buffer
        return flat.view(-1)

    def scatter_sum(self, flat: torch.Tensor, out: torch.Tensor) -> None:
        """Each rank writes a piece for everybody, then adds up its own in order of rank."""
        parts = flat.view(self.world_size, -1)
        step = WINDOW_BYTES // flat.element_size() // self.world_size
        for start in range(0, parts.shape[1], step):
            piece = parts[:, start : start + step]
            buffer = self._next_buffer(flat.dtype)[:, : piece.numel()]
            buffer[self.rank].view(piece.shape).copy_(piece)
            dist.barrier()
            total = buffer.view(self.world_size, *piece.shape)[:, self.rank].sum(0)
            out[start : start + step] += total


def open_collective(
    *, rank: int, world_size: int, device: torch.device, same_host: bool, session: str
) -> Collective:
    """The fastest way for these ranks to exchange tensors.

    Args:
        rank: Number of this process in the group, from 0.
        world_size: Number of ranks; above one, `torch.distributed` must be initialised.
        device: The device that holds this rank's tensors.
        same_host: All ranks share one machine.
        session: A name that no other group on the machine uses.
    """
    if world_size == 1:
        return Alone()
    if same_host and device.type == "cpu":
        return SharedMemory(session)
    return Distributed(device)
