"""Finds the first block that makes a loss infinite or undefined."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

from hvp_core.autodiff.executor import ParamsAndTangents
from hvp_core.autodiff.sums import Accumulator
from hvp_core.curvature.executors import Executors
from hvp_core.curvature.sweep import ParameterFeed, sweep
from hvp_core.errors import CurvatureError
from hvp_core.model.chain import Chain, MicroBatch, function_of


def first_non_finite_block(
    chain: Chain, feed: ParameterFeed, executors: Executors, batches: Sequence[MicroBatch]
) -> CurvatureError:
    """Walk again, looking at every block's output; all ranks come to the same answer.

    Cost: 1 GEMM pass over the data.

    Args:
        chain: The model.
        feed: Brings the parameters of each block.
        executors: Executors that are prepared for the loss.
        batches: This rank's micro-batches.

    Returns:
        The error to raise: NON_FINITE, naming the block.
    """
    names = [block.name for block in chain.blocks]
    first = len(names)
    xs = [chain.first_input(batch) for batch in batches]

    def visit(index: int, weights: ParamsAndTangents, _: Sequence[Accumulator]) -> None:
        nonlocal first
        p = weights.p
        for batch, x in enumerate(xs):
            if index < len(names) - 1:
                xs[batch] = executors.executor(index, batch, p, x).value(p, x)
            else:
                xs[batch] = function_of(executors.body(index, batch, True))(p, x)
        if first == len(names) and not all(bool(x.isfinite().all()) for x in xs):
            first = index

    sweep(feed, range(len(names)), visit, lambda _: nullcontext())
    first = min(feed.space.collective.gather_objects(first))
    name = names[first] if first < len(names) else "loss"
    return CurvatureError(
        "NON_FINITE",
        f"the loss is not finite; the first block with such a value is {name}. Check its "
        "parameters, or use float64",
        {"block": name},
    )
