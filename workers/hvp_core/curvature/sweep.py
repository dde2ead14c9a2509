"""One pass over the blocks: a block's parameters arrive, it is visited, its parameters go again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import final

from torch import Tensor

from hvp_core.autodiff.executor import ParamsAndTangents
from hvp_core.autodiff.sums import Accumulator
from hvp_core.curvature.shards import Collector, gathered
from hvp_core.model.chain import Block
from hvp_core.vectors.space import ParameterSpace

#: A visit to a block: (its index, its parameters and their tangents, sums of derivatives, one for
#: each result).
Visit = Callable[[int, ParamsAndTangents, Sequence[Accumulator]], None]
#: A context around each visit, which decides what becomes of the errors that the visit raises.
Guard = Callable[[Block], AbstractContextManager[object]]


@final
class ParameterFeed:
    """Brings the parameters of a block: gathered from the shards of all ranks, block by block.

    Law: every rank asks for the same blocks in the same order.

    Args:
        space: Space of all parameters.
        blocks: The chain's blocks, in their order.
        theta: θ, this rank's shard, of the type of the operands of products.
        vectors: Space of the tangents, which have some of the parameters or all.
    """

    def __init__(
        self, space: ParameterSpace, blocks: Sequence[Block], theta: Tensor, vectors: ParameterSpace
    ):
        self.space, self.blocks, self._theta, self._vectors = space, blocks, theta, vectors

    @contextmanager
    def block(self, index: int, tangents: Sequence[Tensor] = ()) -> Iterator[ParamsAndTangents]:
        """A block's parameters, and tangents of the selected ones in each probe.

        The tensors are there until the context ends. All ranks enter it together.

        Args:
            index: Index of the block.
            tangents: Vectors, this rank's shards.
        """
        block = self.blocks[index]
        if not block.parameters:
            yield ParamsAndTangents({}, [{} for _ in tangents])
            return
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
    results: Collector | None = None,
) -> None:
    """Visit blocks one after the other; no more than one has its parameters here at a time.

    Exchanges between ranks lie outside the guard: a rank whose visit fails stays in step.

    Args:
        feed: Brings the parameters of each block.
        order: Indices of the blocks to visit.
        visit: Called once for each block.
        guard: Makes the context of each visit.
        tangents: Vectors whose parts are gathered too, this rank's shards.
        results: Adds up the derivatives that visits find. They are summed over the ranks when a
            block is through.
    """
    for index in order:
        with ExitStack() as stack:
            weights = stack.enter_context(feed.block(index, tangents))
            sums = [] if results is None else stack.enter_context(results.block(index))
            with guard(feed.blocks[index]):
                visit(index, weights, sums)
