"""Traces of diagonal blocks, as results hold them."""

from __future__ import annotations

from typing import NamedTuple

from hvp_operations.trace import TracePart
from torch import Tensor

from hvp_core.stochastic.probing import Probing


class Standing(NamedTuple):
    """What is known of the whole and of each block, (1 + blocks,) float64 each.

    Attributes:
        value: The estimate.
        error: Its standard error.
        half: Half the width of the interval, without rounding.
    """

    value: Tensor
    error: Tensor
    half: Tensor


def block_traces(run: Probing, standing: Standing, noise: float) -> tuple[TracePart, ...]:
    """The traces of the diagonal blocks that were asked for.

    Args:
        run: The run.
        standing: What is known of them.
        noise: What the rounding of products can have moved the whole trace by.
    """
    sizes = list(run.space.parts().values())
    parts = []
    for index, (name, numbers) in enumerate(run.blocks.items(), 1):
        order = sum(sizes[number] for number in numbers)
        value, error, half = (float(each[index]) for each in standing)
        margin = half + noise * (order / run.space.dimension) ** 0.5
        parts.append(
            TracePart(
                name=name,
                num_parameters=order,
                value=value,
                standard_error=error,
                low=value - margin,
                high=value + margin,
            )
        )
    return tuple(parts)
