"""Vectors that lie in parts on the ranks, and those of a parameter space among them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, final

import psutil
import torch

from hvp_core.errors import CurvatureError
from hvp_core.precision import exact_products
from hvp_core.sharding.collective import Collective
from hvp_core.sharding.layout import Layout, Run
from hvp_core.vectors.probes import fill
from hvp_core.vectors.vector_space import Distribution, VectorSpace

_PIECE = 1 << 18  # products that are added in their own dtype before float64 takes over
_PIECE_ON_GPU = 1 << 24  # where sums are trees, and each piece is a launch
_FILE_PIECE = 1 << 22


@exact_products()
def partial_products(rows: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """This rank's part of rows @ vector, float64.

    Args:
        rows: (m, shard_numel).
        vector: (shard_numel,).

    Returns:
        (m,) float64 on the CPU: each piece is summed in the vectors' dtype, the pieces in float64.
        On a CPU a piece is summed in pairs of pairs: its products of matrices add one by one, which
        loses 1e-4 of a norm in float32 where a few elements are large, and 1e-12 in float64 where
        all elements are ± the same, as a random vector's of signs are: each sum is then rounded the
        same way as the last. [meas] eigenvectors of SmolLM2's G, n = 7e6, float32: 1e-4 that way,
        1e-8 this way; signs, n = 1e6, float64: 7e-13 and 5e-16; for 1.5 (m = 1) to 2.5 (m = 40)
        times the time.
    """
    total = torch.zeros(rows.shape[0], dtype=torch.float64, device=vector.device)
    if vector.device.type == "cpu":
        piece = max(1, _PIECE // max(1, len(rows)))
        for start in range(0, vector.numel(), piece):
            stop = start + piece
            total += torch.mul(rows[:, start:stop], vector[start:stop]).sum(1)
        return total
    for start in range(0, vector.numel(), _PIECE_ON_GPU):
        stop = start + _PIECE_ON_GPU
        total += rows[:, start:stop] @ vector[start:stop]
    return total.cpu()


def _refused(reason: str) -> Callable[[Exception], CurvatureError]:
    return lambda error: CurvatureError(reason, f"a rank's file system refused: {error}")


class ShardedSpace(VectorSpace):
    """Vectors with a canonical flat index, of which each rank holds some stretches.

    A vector is a tensor (local,) on each rank, zero where a rank's part is padded. Sums of vectors
    are local; inner products are a local sum and one exchange of scalars.

    Args:
        dimension: n, the length of a whole vector.
        runs: The stretches of this rank's part.
        local: Number of elements of this rank's part, padding included.
        collective: The exchange between the ranks.
        dtype: The dtype of the vectors.
        device: The device that holds the vectors.
    """

    def __init__(
        self,
        dimension: int,
        runs: Sequence[Run],
        local: int,
        collective: Collective,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.collective = collective
        self.dtype = dtype
        self.device = device
        self._dimension = dimension
        self._runs = tuple(runs)
        self._local = local

    @property
    def dimension(self) -> int:
        """n, the length of a whole vector."""
        return self._dimension

    def agree(self, found: Any) -> Any:
        """Rank 0's answer, on every rank."""
        return self.collective.gather_objects(found)[0]

    @property
    def vector_bytes(self) -> int:
        """Bytes of one vector on this rank."""
        return self._local * self.dtype.itemsize

    def free_bytes(self) -> int:
        """Bytes that are free where the vectors are, for all processes together."""
        if self.device.type != "cuda":
            return int(psutil.virtual_memory().available)
        cached = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return int(torch.cuda.mem_get_info(self.device)[0]) + cached

    def zeros(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The zero vector, of the space's type or another."""
        return torch.zeros(self._local, dtype=dtype or self.dtype, device=self.device)

    def dots(self, rows: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        """Inner products (m,) float64 of the vectors in `rows` (m, local) with `vector`."""
        return self.collective.sum(partial_products(rows, vector))

    def dots_of(self, vectors: Sequence[torch.Tensor], vector: torch.Tensor) -> torch.Tensor:
        """Inner products (m,) float64 of `vector` with each of these, in one exchange."""
        found = [partial_products(each.unsqueeze(0), vector) for each in vectors]
        return self.collective.sum(torch.cat(found))

    def dot(self, left: torch.Tensor, right: torch.Tensor) -> float:
        """Inner product of two vectors (local,), accumulated in float64."""
        return float(self.dots(left.unsqueeze(0), right)[0])

    def norm(self, vector: torch.Tensor) -> float:
        """Euclidean norm of a vector (local,)."""
        return math.sqrt(self.dot(vector, vector))

    def random(self, seed: int, distribution: Distribution) -> torch.Tensor:
        """The vector (local,) of this seed: the same for any number of ranks."""
        vector = self.zeros()
        law: Literal["rademacher", "gaussian"]
        law = "rademacher" if distribution == "rademacher" else "gaussian"
        for run in self._runs:
            stop = run.shard_offset + run.flat_stop - run.flat_start
            fill(vector[run.shard_offset : stop], run.flat_start, seed, law)
        if distribution == "sphere":
            vector /= self.norm(vector)
        return vector

    def read(self, path: Path) -> torch.Tensor:
        """A vector from a file of raw little-endian elements in canonical order.

        Raises:
            CurvatureError: SHAPE_MISMATCH for a file of another length; NON_FINITE, with the first
                index, for NaN or infinity. On all ranks alike.
        """
        expected = self._dimension * self.dtype.itemsize
        size = path.stat().st_size
        if size != expected:
            raise CurvatureError(
                "SHAPE_MISMATCH",
                f"{size // self.dtype.itemsize} elements where a vector of this space has "
                f"{self._dimension}; give one for each",
            )
        vector = self.zeros()
        first_bad = self._dimension
        with self.collective.same_fate(_refused("INPUT_MISSING")), path.open("rb") as file:
            for flat, part in self._pieces(vector):
                # On a CPU the bytes go where they belong, into no memory on the way.
                there = part if part.device.type == "cpu" else torch.empty_like(part, device="cpu")
                view = there.view(torch.uint8).numpy()
                if os.preadv(file.fileno(), [view.data], flat * part.itemsize) != view.size:
                    raise OSError(f"{path} ends early")
                part.copy_(there)
                if not bool(part.isfinite().all()):
                    first_bad = min(first_bad, flat + int((~part.isfinite()).nonzero()[0]))
        first_bad = min(self.collective.gather_objects(first_bad))
        if first_bad < self._dimension:
            raise CurvatureError(
                "NON_FINITE",
                f"element {first_bad} of the vector is not finite; products with it mean nothing",
                {"index": str(first_bad)},
            )
        return vector

    def write(
        self, vector: torch.Tensor, path: Path, start: int = 0, stop: int | None = None
    ) -> None:
        """Write elements of a vector; every rank writes its part of the one file.

        Whoever needs the file after a power cut makes it durable.

        Args:
            vector: This rank's part (local,).
            path: File that will hold the range and nothing else; `read` takes a file of all
                elements.
            start: First flat index.
            stop: Flat index behind the last; None for all that follow.

        Raises:
            CurvatureError: DISK_FULL, on all ranks alike.
        """
        stop = self._dimension if stop is None else stop
        with self.collective.same_fate(_refused("DISK_FULL")):
            file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
            try:
                os.ftruncate(file, (stop - start) * self.dtype.itemsize)
                for flat, part in self._pieces(vector, start, stop):
                    data = part.cpu().contiguous().view(torch.uint8).numpy()
                    os.pwrite(file, data.data, (flat - start) * part.itemsize)
            finally:
                os.close(file)

    def _pieces(
        self, vector: torch.Tensor, start: int = 0, stop: int | None = None
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """(flat index, view) of stretches of a range that are contiguous in shard and file."""
        stop = self._dimension if stop is None else stop
        for run in self._runs:
            offset = run.shard_offset - run.flat_start
            first, last = max(start, run.flat_start), min(stop, run.flat_stop)
            for flat in range(first, last, _FILE_PIECE):
                yield flat, vector[offset + flat : offset + min(flat + _FILE_PIECE, last)]

    def to_flat(self, vector: torch.Tensor) -> torch.Tensor:
        """The whole vector (n,) on every rank: for small models and tests."""
        flat = torch.zeros(self._dimension, dtype=self.dtype)
        for flat_start, part in self._pieces(vector):
            flat[flat_start : flat_start + part.numel()] = part.cpu()
        parts = self.collective.gather_objects(flat)
        total: torch.Tensor = sum(parts[1:], start=parts[0])
        return total

    def from_flat(self, flat: torch.Tensor) -> torch.Tensor:
        """This rank's shard of a whole vector (n,)."""
        vector = self.zeros()
        for flat_start, part in self._pieces(vector):
            part.copy_(flat[flat_start : flat_start + part.numel()])
        return vector

    def first(
        self, vector: torch.Tensor, condition: Callable[[torch.Tensor], torch.Tensor]
    ) -> int | None:
        """Canonical index of the first element that meets a condition; None where none does.

        Args:
            vector: This rank's part (local,). All ranks call it together.
            condition: Tells of some elements (m,) which meet it, bool (m,).
        """
        found = self._dimension
        for flat, part in self._pieces(vector):
            met = condition(part).nonzero()
            if len(met):
                found = min(found, flat + int(met[0]))
        found = min(self.collective.gather_objects(found))
        return found if found < self._dimension else None

    def fill(self, vector: torch.Tensor, start: int, elements: torch.Tensor) -> None:
        """Put elements (m,) where they belong in a vector, as far as this rank holds them.

        Args:
            vector: This rank's part (local,); changed.
            start: Flat index of the first element.
            elements: The elements (m,), the same on every rank.
        """
        for flat, part in self._pieces(vector, start, start + elements.numel()):
            part.copy_(elements[flat - start : flat - start + part.numel()])

    def coordinate(self, index: int) -> torch.Tensor:
        """See VectorSpace."""
        vector = self.zeros()
        self.fill(vector, index, torch.ones(1, dtype=self.dtype))
        return vector

    def combine(self, terms: Sequence[tuple[float, torch.Tensor]]) -> torch.Tensor:
        """Σ coefficient · vector, over pairs of both."""
        total = self.zeros()
        for coefficient, vector in terms:
            total.add_(vector, alpha=coefficient)
        return total


@final
class ParameterSpace(ShardedSpace):
    """The parameter space of one model in one dtype, cut over the ranks as its layout says."""

    def __init__(
        self, layout: Layout, collective: Collective, dtype: torch.dtype, device: torch.device
    ):
        super().__init__(
            layout.numel,
            layout.runs(collective.rank),
            layout.shard_numel,
            collective,
            dtype,
            device,
        )
        self.layout = layout

    def parts(self) -> Mapping[str, int]:
        """Number of elements of each tensor, by name."""
        return {each.name: each.numel for each in self.layout.parameters}

    @cached_property
    def stretches(self) -> list[tuple[int, slice]]:
        """Stretches of this rank's part that are of one tensor each, with the tensor's number."""
        found = []
        for run in self._runs:
            offset = run.shard_offset - run.flat_start
            for number, each in enumerate(self.layout.parameters):
                start = max(run.flat_start, each.offset)
                stop = min(run.flat_stop, each.offset + each.numel)
                if start < stop:
                    found.append((number, slice(offset + start, offset + stop)))
        return found

    def dots_by_part(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """What each tensor adds to an inner product, (tensors,) float64: see VectorSpace."""
        total = torch.zeros(len(self.layout.parameters), dtype=torch.float64)
        for number, here in self.stretches:
            total[number] += partial_products(left[here].unsqueeze(0), right[here])[0]
        return self.collective.sum(total)

    def only(self, vector: torch.Tensor, parts: Collection[int]) -> torch.Tensor:
        """See VectorSpace; parts are tensors."""
        kept, found = set(parts), torch.zeros_like(vector)
        for number, here in self.stretches:
            if number in kept:
                found[here] = vector[here]
        return found

    def part(self, names: Collection[str]) -> ParameterSpace:
        """The space of some of the parameters; this one, where these are all."""
        layout = self.layout.part(names)
        if layout is self.layout:
            return self
        return ParameterSpace(layout, self.collective, self.dtype, self.device)

    def for_blocks(self, users: Sequence[Sequence[str]]) -> ParameterSpace:
        """The same vectors, for a chain of other blocks; see `Layout.for_blocks`."""
        return ParameterSpace(
            self.layout.for_blocks(users), self.collective, self.dtype, self.device
        )
