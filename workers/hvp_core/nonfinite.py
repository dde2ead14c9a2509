"""Where a loss that is no number comes from."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hvp_core.chain import Chain, MicroBatch
from hvp_core.errors import CurvatureError
from hvp_core.itinerary import Itinerary
from hvp_core.routes import function_of
from hvp_core.shards import gathered
from hvp_core.space import Space


def first_non_finite_block(
    chain: Chain,
    space: Space,
    itinerary: Itinerary,
    batches: Sequence[MicroBatch],
    theta: Tensor,
) -> CurvatureError:
    """Walk again, looking at every block; all ranks come to the same answer.

    Args:
        chain: The model.
        space: Of its parameters.
        itinerary: Prepared for the loss.
        batches: This rank's micro-batches.
        theta: θ, this rank's shard.

    Returns:
        NON_FINITE, naming the block.
    """
    names = [block.name for block in chain.blocks]
    first = len(names)
    xs = [chain.first_input(batch) for batch in batches]
    for index, block in enumerate(chain.blocks):
        with gathered(space, index, block, [theta]) as (p,):
            if index < len(names) - 1:
                xs = [itinerary.route(index, batch, p, x).value(p, x) for batch, x in enumerate(xs)]
            else:
                xs = [
                    function_of(itinerary.body(index, batch, True))(p, x)
                    for batch, x in enumerate(xs)
                ]
        if first == len(names) and not all(bool(x.isfinite().all()) for x in xs):
            first = index
    first = min(space.collective.gather_objects(first))
    name = names[first] if first < len(names) else "loss"
    return CurvatureError(
        "NON_FINITE",
        f"the loss is not finite; the first block with such a value is {name}. Check its "
        "parameters, or use float64",
        {"block": name},
    )
