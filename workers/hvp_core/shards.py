"""A block's parameters gathered from the ranks' shards, and its results scattered back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from hvp_core.chain import Block
from hvp_core.space import Space


@contextmanager
def gathered(
    space: Space, index: int, block: Block, shards: Sequence[Tensor]
) -> Iterator[list[dict[str, Tensor]]]:
    """The block's parameters in each of these vectors, by name, for as long as needed.

    Args:
        space: Of the vectors.
        index: Of the block in the chain.
        block: Whose parameters.
        shards: Vectors, of any dtype.
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


@contextmanager
def scattered(
    space: Space, index: int, results: Sequence[Tensor]
) -> Iterator[list[dict[str, Tensor]]]:
    """Where to add up the block's part of each result; at the end it is summed over the ranks.

    A rank alone adds to the result itself: nothing of its size is allocated.
    """
    segments = [space.layout.segments[i] for i in space.layout.block_segments[index]]
    places = [slice(each.shard_offset, each.shard_offset + each.chunk) for each in segments]
    alone = space.layout.world_size == 1
    sums = [
        [
            result[place] if alone else result.new_zeros(space.layout.world_size * segment.chunk)
            for segment, place in zip(segments, places, strict=True)
        ]
        for result in results
    ]
    yield [
        {
            name: view
            for segment, flat in zip(segments, flats, strict=True)
            for name, view in segment.views(flat).items()
        }
        for flats in sums
    ]
    if not alone:
        for result, flats in zip(results, sums, strict=True):
            for place, flat in zip(places, flats, strict=True):
                space.collective.scatter_sum(flat, result[place])
