"""How a parameter space is numbered and cut.

The canonical flat index runs over the parameters in the order of `named_parameters()`, a tied
tensor once, each row-major. The index range is divided into *segments*, runs of parameters that the
same blocks use, and each segment is cut into one equal chunk per rank. A rank's shard is its chunks
laid end to end; the padding that rounds a segment up to whole chunks is zero in every vector, so
that inner products need not know of it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch


@final
@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One tensor of the parameter space."""

    name: str
    shape: tuple[int, ...]
    offset: int  # first flat index

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@final
@dataclass(frozen=True, kw_only=True)
class Segment:
    """Parameters [start, stop) of the flat index, gathered together."""

    start: int
    stop: int
    parameters: tuple[Parameter, ...]
    chunk: int  # elements per rank, padding included
    shard_offset: int  # where this segment's chunk begins in a shard

    def views(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """Parameters as views of a gathered segment, shape (world_size * chunk,)."""
        return {
            parameter.name: flat[
                parameter.offset - self.start : parameter.offset - self.start + parameter.numel
            ].view(parameter.shape)
            for parameter in self.parameters
        }


@final
@dataclass(frozen=True, kw_only=True)
class Run:
    """A stretch of a shard that is contiguous in the flat index."""

    shard_offset: int
    flat_start: int
    flat_stop: int


@final
class Layout:
    """The canonical order and its cut over `world_size` ranks.

    Args:
        shapes: Shape of each parameter, in canonical order.
        users: Names of the parameters of each block; decides the segments.
        world_size: Number of ranks.
    """

    def __init__(
        self,
        shapes: Mapping[str, Sequence[int]],
        users: Sequence[Iterable[str]],
        world_size: int,
    ):
        self.world_size = world_size
        self._users = [tuple(names) for names in users]
        offset = 0
        parameters = []
        for name, shape in shapes.items():
            parameters.append(Parameter(name=name, shape=tuple(shape), offset=offset))
            offset += parameters[-1].numel
        self.parameters = tuple(parameters)
        self.numel = offset
        used_by: dict[str, list[int]] = {name: [] for name in shapes}
        for block, names in enumerate(self._users):
            for name in names:
                used_by[name].append(block)
        groups: list[list[Parameter]] = []
        for parameter in parameters:
            if groups and used_by[groups[-1][0].name] == used_by[parameter.name]:
                groups[-1].append(parameter)
            else:
                groups.append([parameter])
        self.segments: tuple[Segment, ...] = tuple(self._cut(groups))
        self.shard_numel = sum(segment.chunk for segment in self.segments)
        segment_of = {
            parameter.name: index
            for index, segment in enumerate(self.segments)
            for parameter in segment.parameters
        }
        #: For each block, the indices of the segments it needs.
        self.block_segments: tuple[tuple[int, ...], ...] = tuple(
            tuple(sorted({segment_of[name] for name in names})) for names in self._users
        )

    def part(self, names: Collection[str]) -> Layout:
        """The layout of some of the parameters, in the same order; this one, where these are all.

        Args:
            names: Names of the parameters, which are numbered from zero and cut by themselves.
        """
        shapes = {each.name: each.shape for each in self.parameters if each.name in names}
        if len(shapes) == len(self.parameters):
            return self
        users = [[name for name in user if name in shapes] for user in self._users]
        return Layout(shapes, users, self.world_size)

    def for_blocks(self, users: Sequence[Iterable[str]]) -> Layout:
        """The same cut for other blocks of the same model, such as a part of a chain.

        Args:
            users: Names of the parameters of each of these blocks; any that this layout lacks are
                left out.
        """
        found = copy.copy(self)
        of = {
            each.name: i for i, segment in enumerate(self.segments) for each in segment.parameters
        }
        found.block_segments = tuple(
            tuple(sorted({of[name] for name in names if name in of})) for names in users
        )
        return found

    def _cut(self, groups: list[list[Parameter]]) -> Iterator[Segment]:
        shard_offset = 0
        for group in groups:
            start, stop = group[0].offset, group[-1].offset + group[-1].numel
            chunk = -(-(stop - start) // self.world_size)
            yield Segment(
                start=start,
                stop=stop,
                parameters=tuple(group),
                chunk=chunk,
                shard_offset=shard_offset,
            )
            shard_offset += chunk

    def runs(self, rank: int) -> list[Run]:
        """The stretches of one rank's shard, padding left out."""
        runs = []
        for segment in self.segments:
            start = min(segment.start + rank * segment.chunk, segment.stop)
            stop = min(start + segment.chunk, segment.stop)
            if start < stop:
                runs.append(
                    Run(shard_offset=segment.shard_offset, flat_start=start, flat_stop=stop)
                )
        return runs
