"""A block's parameters gathered from the ranks' shards, and its results scattered back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import final

import torch
from torch import Tensor

from hvp_core.autodiff.sums import Accumulator, Sums
from hvp_core.model.chain import Block
from hvp_core.vectors.space import ParameterSpace


@contextmanager
def gathered(
    space: ParameterSpace, index: int, block: Block, shards: Sequence[Tensor]
) -> Iterator[list[dict[str, Tensor]]]:
    """A block's parameters in each of these vectors, by name, until the context ends.

    All ranks enter it together. Memory: the block's segments of each vector.

    Args:
        space: Space of the vectors.
        index: Index of the block in the chain.
        block: The block, which names its parameters.
        shards: Vectors, of any dtype, this rank's shards.
    """
    wanted = set(block.parameters)
    found: list[dict[str, Tensor]] = [{} for _ in shards]
    for segment in (space.layout.segments[i] for i in space.layout.block_segments[index]):
        place = slice(segment.shard_offset, segment.shard_offset + segment.chunk)
        for shard, views in zip(shards, found, strict=True):
            flat = space.collective.gather(shard[place])
            views.update(
                (name, view) for name, view in segment.views(flat).items() if name in wanted
            )
    yield found
    for views in found:
        views.clear()


def part_of(whole: ParameterSpace, vector: Tensor, part: ParameterSpace) -> Tensor:
    """Take the elements of some parameters out of a vector of all parameters.

    All ranks call it together. Memory: the result, and the largest segment.

    Args:
        whole: Space of all parameters.
        vector: A vector of that space, this rank's shard.
        part: Space of some of the parameters (see `ParameterSpace.part`).

    Returns:
        This rank's shard of the vector of `part`; `vector` itself, where `part` is the whole.
    """
    if part is whole:
        return vector
    found = part.zeros()
    starts = {parameter.name: parameter.offset for parameter in part.layout.parameters}
    for segment in whole.layout.segments:
        if not any(parameter.name in starts for parameter in segment.parameters):
            continue
        place = slice(segment.shard_offset, segment.shard_offset + segment.chunk)
        views = segment.views(whole.collective.gather(vector[place]))
        for name, view in views.items():
            if name in starts:
                part.fill(found, starts[name], view.reshape(-1))
    return found


class Collector(ABC):
    """Takes the derivatives that a walk finds, block by block.

    Law: every rank visits the same blocks in the same order.
    """

    @abstractmethod
    def block(self, index: int) -> AbstractContextManager[Sequence[Accumulator]]:
        """What takes a block's derivatives, one for each probe, until the context ends."""

    @abstractmethod
    def finish(self) -> list[Tensor]:
        """The products, this rank's shards, when all blocks are through."""


@final
class Results(Collector):
    """The products of one walk: this rank's shards.

    Args:
        space: Space of the products.
        dtypes: The dtype of each product.
        into: Shards to write the products to, whatever they hold; None for new ones.
    """

    def __init__(
        self,
        space: ParameterSpace,
        dtypes: Sequence[torch.dtype],
        into: Sequence[Tensor] | None = None,
    ):
        self._space = space
        alone = space.layout.world_size == 1
        self.shards = list(into or ()) or [
            torch.empty(space.layout.shard_numel, dtype=dtype, device=space.device)
            for dtype in dtypes
        ]
        if not alone:
            for shard in self.shards:
                shard.zero_()
        names = {parameter.name for parameter in space.layout.parameters} if alone else set()
        self._fresh = [set(names) for _ in dtypes]

    @contextmanager
    def block(self, index: int) -> Iterator[Sequence[Sums]]:
        """The sums that take a block's part of each product; summed over the ranks at the end.

        A rank alone adds to the result itself: nothing of the block's size is allocated.
        """
        space, layout = self._space, self._space.layout
        segments = [layout.segments[i] for i in layout.block_segments[index]]
        places = [slice(each.shard_offset, each.shard_offset + each.chunk) for each in segments]
        alone = layout.world_size == 1
        flats = [
            [
                shard[place]
                if alone
                else shard.new_zeros(layout.world_size * segment.chunk, dtype=space.dtype)
                for segment, place in zip(segments, places, strict=True)
            ]
            for shard in self.shards
        ]
        sums = [
            Sums(
                {
                    name: view
                    for segment, flat in zip(segments, each, strict=True)
                    for name, view in segment.views(flat).items()
                },
                fresh,
            )
            for each, fresh in zip(flats, self._fresh, strict=True)
        ]
        yield sums
        for total in sums:
            total.settle()
        if not alone:
            for shard, each in zip(self.shards, flats, strict=True):
                for place, flat in zip(places, each, strict=True):
                    space.collective.scatter_sum(flat, shard[place])

    def finish(self) -> list[Tensor]:
        """The products, complete: a parameter to which nobody has added has a derivative of zero.

        Segments are visited, not blocks: every parameter lies in a segment, and there are
        parameters that no block uses.
        """
        for shard, fresh in zip(self.shards, self._fresh, strict=True):
            for segment in self._space.layout.segments if fresh else ():
                place = slice(segment.shard_offset, segment.shard_offset + segment.chunk)
                for name, view in segment.views(shard[place]).items():
                    if name in fresh:
                        view.zero_()
            fresh.clear()
        return self.shards
