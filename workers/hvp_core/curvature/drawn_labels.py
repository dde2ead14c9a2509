"""Labels drawn from the model: the same whatever the number of ranks and the size of a micro-batch.

The numbers that a label is made of are Philox4x32-10 with the seed as key, and the canonical index
of its target in the whole batch and the number of the draw as counter. What is drawn with them is a
function of the model's output there, so that ranks and micro-batches matter as far as they change
how that is rounded: a label then becomes another where its number is that close to a boundary.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import final

import torch
from torch import Tensor

from hvp_core.autodiff.product_spec import Draws
from hvp_core.vectors.probes import philox4x32

_KEPT = 4  # sets of labels, each a number for each target and draw
_MASK = 0xFFFFFFFF
_OF_LABELS = 1  # the counter's last word; it is 0 for random vectors
_BITS = 52  # of each number: with a half behind them they are no 0 and no 1


def uniform_numbers(
    draws: Draws, rows: range, shape: Sequence[int], device: torch.device
) -> Tensor:
    """The numbers that labels are made of, for some rows of a batch.

    Args:
        draws: The seed, and S.
        rows: The rows, by their place in the whole batch.
        shape: Shape of the targets of one row.
        device: Where to make them.

    Returns:
        Independent pairs of numbers between 0 and 1, float64 (rows, *shape, S, 2).
    """
    count = torch.Size(shape).numel()
    index = torch.arange(rows.start * count, rows.stop * count, device=device).unsqueeze(1)
    sample = torch.arange(draws.num_samples, device=device).expand(len(index), -1)
    words = (index & _MASK, index >> 32, sample, torch.full_like(sample, _OF_LABELS))
    counter = torch.stack([each.expand_as(sample).reshape(-1) for each in words])
    high, low = philox4x32(counter, draws.seed).view(2, 2, -1).unbind(1)
    whole = (high << (_BITS - 32)) | (low >> (64 - _BITS))
    numbers: Tensor = (whole.double() + 0.5) / 2**_BITS
    return numbers.T.reshape(len(rows), *shape, draws.num_samples, 2)


@final
class DrawnLabels:
    """The drawn labels of this rank's micro-batches. The latest sets are kept.

    Args:
        draw: Draws a set: for each micro-batch the targets, with the draws in one more dimension
            (rows, ..., S). All ranks call it together.
    """

    def __init__(self, draw: Callable[[Draws], list[Tensor]]):
        self._draw = draw
        self._found: OrderedDict[Draws, list[Tensor]] = OrderedDict()

    def draw(self, draws: Draws) -> list[Tensor]:
        """The set, drawn where it is not kept. All ranks call it together.

        Raises:
            CurvatureError: LOSS_HAS_NO_DISTRIBUTION; the errors of a block's code.
        """
        if draws not in self._found:
            found = self._draw(draws)
            while len(self._found) >= _KEPT:
                self._found.popitem(last=False)
            self._found[draws] = found
        self._found.move_to_end(draws)
        return self._found[draws]

    def __contains__(self, draws: Draws) -> bool:
        return draws in self._found

    def __getitem__(self, draws: Draws) -> list[Tensor]:
        return self._found[draws]

    def drop(self) -> None:
        """Forget all sets: the model is another."""
        self._found.clear()
