"""A block's parameters gathered from the ranks' shards, and its results scattered back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import final

import torch
from torch import Tensor

from hvp_core.chain import Block
from hvp_core.parts import Term
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


@final
class Sums:
    """Where the derivatives of a block's parameters are added up.

    Args:
        views: By name.
        fresh: Names to which nothing has been added, whose tensors hold no particular values.
            Shared by all blocks of a product: a tied tensor is written by more than one.
    """

    def __init__(self, views: Mapping[str, Tensor], fresh: set[str]):
        self._views, self._fresh = views, fresh

    def add(self, name: str, terms: Sequence[Term], results: Mapping[str, Tensor]) -> None:
        """Add terms of a part's results."""
        for term in terms:
            term.add_to(self._views[name], results, fresh=name in self._fresh)
            self._fresh.discard(name)

    def add_dense(self, parts: Mapping[str, Tensor]) -> None:
        """Add tensors."""
        for name, part in parts.items():
            if name in self._fresh:
                self._views[name].copy_(part)
                self._fresh.discard(name)
            else:
                self._views[name].add_(part)

    def finish(self) -> None:
        """Make what nobody has added to zero."""
        for name, view in self._views.items():
            if name in self._fresh:
                view.zero_()
                self._fresh.discard(name)


@final
class Results:
    """The products of one walk: this rank's shards.

    Args:
        space: Of the vectors.
        count: How many.
        into: Shards to use, whatever they hold; None for new ones.
    """

    def __init__(self, space: Space, count: int, into: Sequence[Tensor] | None = None):
        self._space = space
        alone = space.layout.world_size == 1
        like = torch.empty if alone else torch.zeros
        self.shards = list(into or []) or [
            like(space.layout.shard_numel, dtype=space.dtype, device=space.device)
            for _ in range(count)
        ]
        if not alone and into:
            for shard in self.shards:
                shard.zero_()
        names = {parameter.name for parameter in space.layout.parameters} if alone else set()
        self._fresh = [set(names) for _ in range(count)]

    @contextmanager
    def block(self, index: int) -> Iterator[list[Sums]]:
        """Where to add up a block's part of each; at the end it is summed over the ranks.

        A rank alone adds to the result itself: nothing of its size is allocated.
        """
        space, layout = self._space, self._space.layout
        segments = [layout.segments[i] for i in layout.block_segments[index]]
        places = [slice(each.shard_offset, each.shard_offset + each.chunk) for each in segments]
        alone = layout.world_size == 1
        flats = [
            [
                shard[place] if alone else shard.new_zeros(layout.world_size * segment.chunk)
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
        if not alone:
            for shard, each in zip(self.shards, flats, strict=True):
                for place, flat in zip(places, each, strict=True):
                    space.collective.scatter_sum(flat, shard[place])

    def finish(self) -> list[Tensor]:
        """The products, complete."""
        if self._space.layout.world_size > 1:
            return self.shards
        for index in range(len(self._space.layout.block_segments)):
            with self.block(index) as sums:
                for each in sums:
                    each.finish()
        return self.shards
