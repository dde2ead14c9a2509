"""The space of a model's outputs on a batch: vectors cut by rows over the ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, final

import torch
from torch import Tensor

from hvp_core.collective import Collective
from hvp_core.linear_operator import VectorSpace
from hvp_core.probes import Distribution, fill
from hvp_core.space import partial_products


@final
class OutputSpace(VectorSpace):
    """What a model gives for every row of a batch, as one vector.

    The canonical index is row-major over (rows of the batch, ...), in the batch's own order: for a
    language model (rows, positions, vocabulary), padding and ignored labels included. A rank holds
    the rows of its own micro-batches, one behind the other, as (local,); none if it has none.

    Args:
        num_rows: Of the whole batch.
        shape: Of one row of the output: (positions, vocabulary), say.
        own: Rows of the batch that this rank holds, in order.
        collective: Of the ranks.
        dtype: Of the vectors.
        device: Where they are.
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
        self.own = tuple(own)
        self.dtype = dtype
        self.device = device
        self._collective = collective

    @property
    def dimension(self) -> int:
        """Rows times numbers in a row."""
        return math.prod(self.shape)

    @property
    def local_rows(self) -> int:
        """Rows that this rank holds."""
        return sum(len(each) for each in self.own)

    @property
    def _row_numel(self) -> int:
        return math.prod(self.shape[1:])

    def zeros(self) -> Tensor:
        """The zero vector, (local,)."""
        numel = self.local_rows * self._row_numel
        return torch.zeros(numel, dtype=self.dtype, device=self.device)

    def by_row(self, vector: Tensor) -> Tensor:
        """A vector (local,) as (local rows, ...): a view."""
        return vector.view(self.local_rows, *self.shape[1:])

    def dots(self, rows: Tensor, vector: Tensor) -> Tensor:
        """Inner products (m,) float64 on the CPU of the vectors in `rows` (m, local) with one."""
        return self._collective.sum(partial_products(rows, vector))

    def random(self, seed: int, distribution: Distribution) -> Tensor:
        """The seeded vector, (local,): the same for any number of ranks and any micro-batches."""
        vector = self.zeros()
        law: Literal["rademacher", "gaussian"]
        law = "rademacher" if distribution == "rademacher" else "gaussian"
        for start, part in self._pieces(vector):
            fill(part, start, seed, law)
        if distribution == "sphere":
            vector /= math.sqrt(float(self.dots(vector.unsqueeze(0), vector)[0]))
        return vector

    def agree(self, found: Any) -> Any:
        """Rank 0's answer, on every rank."""
        return self._collective.gather_objects(found)[0]

    def to_whole(self, vector: Tensor) -> Tensor:
        """The outputs (rows, ...) on every rank, on the CPU: for small ones and tests."""
        flat = torch.zeros(self.dimension, dtype=self.dtype)
        for start, part in self._pieces(vector):
            flat[start : start + part.numel()] = part.cpu()
        parts = self._collective.gather_objects(flat)
        total: Tensor = sum(parts[1:], start=parts[0])
        return total.view(self.shape)

    def from_whole(self, outputs: Tensor) -> Tensor:
        """This rank's part (local,) of outputs (rows, ...)."""
        vector = self.zeros()
        for start, part in self._pieces(vector):
            part.copy_(outputs.reshape(-1)[start : start + part.numel()])
        return vector

    def _pieces(self, vector: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(canonical index, view) of each stretch of rows."""
        offset = 0
        for rows in self.own:
            numel = len(rows) * self._row_numel
            yield rows.start * self._row_numel, vector[offset : offset + numel]
            offset += numel
