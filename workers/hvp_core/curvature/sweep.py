"""One pass over the blocks: the parameters of each arrive, something is done, they go again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import final

from torch import Tensor

from hvp_core.autodiff.executor import ParamsAndTangents
from hvp_core.autodiff.sums import Sums
from hvp_core.curvature.shards import Results, gathered
from hvp_core.model.chain import Block
from hvp_core.vectors.space import ParameterSpace

#: What is done at a block: (index, its parameters and their tangents, where to add derivatives).
Visit = Callable[[int, ParamsAndTangents, Sequence[Sums]], None]
#: Around what is done at a block: what becomes of what it raises.
Guard = Callable[[Block], AbstractContextManager[object]]


@final
class ParameterFeed:
    """How the parameters of a block arrive: gathered from the shards of all ranks, block by block.

    Law: every rank asks for the same blocks in the same order.

    Args:
        space: Of all parameters.
        blocks: Whose.
        theta: θ, this rank's shard, of the type of the operands of products.
        vectors: Space of the tangents: of some of the parameters, or of all.
    """

    def __init__(
        self, space: ParameterSpace, blocks: Sequence[Block], theta: Tensor, vectors: ParameterSpace
    ):
        self.space, self.blocks, self._theta, self._vectors = space, blocks, theta, vectors

    @contextmanager
    def block(self, index: int, tangents: Sequence[Tensor] = ()) -> Iterator[ParamsAndTangents]:
        """A block's parameters, and tangents of the selected ones in each probe.

        They are there for as long as they are needed.

        Args:
            index: Of the block.
            tangents: Vectors, this rank's shards.
        """
        block = self.blocks[index]
        with (
            gathered(self.space, index, block, [self._theta]) as (p,),
            gathered(self._vectors, index, block, tangents) as vs,
        ):
            yield ParamsAndTangents(p, vs)


def sweep(
    feed: ParameterFeed,
    order: Iterable[int],
    visit: Visit,
    guard: Guard,
    tangents: Sequence[Tensor] = (),
    results: Results | None = None,
) -> None:
    """Visit blocks one after the other; no more than one has its parameters here at a time.

    Exchanges between ranks lie outside the guard: a rank whose visit fails stays in step.

    Args:
        feed: Of the parameters.
        order: Indices of the blocks to visit.
        visit: What to do at each.
        guard: Around each visit.
        tangents: Vectors whose parts are gathered too.
        results: Where the visits add derivatives; summed over the ranks when a block is through.
    """
    for index in order:
        with ExitStack() as stack:
            weights = stack.enter_context(feed.block(index, tangents))
            sums = [] if results is None else stack.enter_context(results.block(index))
            with guard(feed.blocks[index]):
                visit(index, weights, sums)
