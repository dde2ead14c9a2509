"""The space of a model's outputs on a batch, whose vectors are cut by rows over the ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from hvp_core.sharding.collective import Collective
from hvp_core.sharding.layout import Run
from hvp_core.vectors.space import ShardedSpace


@final
class OutputSpace(ShardedSpace):
    """A model's outputs for every row of a batch, as one vector.

    The canonical index is row-major over (rows of the batch, ...), in the batch's own order: for a
    language model (rows, positions, vocabulary), padding and ignored labels included. A rank holds
    the rows of its own micro-batches, one behind the other, as (local,); none if it has none.

    Args:
        num_rows: Number of rows of the whole batch.
        shape: Shape of one row of the output, such as (positions, vocabulary).
        own: Rows of the batch that this rank holds, in order.
        collective: The exchange between the ranks.
        dtype: The dtype of the vectors.
        device: The device that holds the vectors.
    """

    def __init__(
        self,
        num_rows: int,
        shape: Sequence[int],
        own: Sequence[range],
        collective: Collective,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.shape = (num_rows, *shape)
        self.local_rows = sum(map(len, own))
        numel = math.prod(shape)
        offset, runs = 0, []
        for rows in own:
            runs.append(
                Run(
                    shard_offset=offset,
                    flat_start=rows.start * numel,
                    flat_stop=rows.stop * numel,
                )
            )
            offset += len(rows) * numel
        super().__init__(num_rows * numel, runs, offset, collective, dtype, device)

    def by_row(self, vector: Tensor) -> Tensor:
        """A view of a vector (local,) as a tensor (local rows, ...)."""
        return vector.view(self.local_rows, *self.shape[1:])

    def to_whole(self, vector: Tensor) -> Tensor:
        """The outputs (rows, ...) on every rank, on the CPU: for small ones and tests."""
        return self.to_flat(vector).view(self.shape)

    def from_whole(self, outputs: Tensor) -> Tensor:
        """This rank's part (local,) of outputs (rows, ...)."""
        return self.from_flat(outputs.reshape(-1))
