"""The interface of a space of vectors, for algorithms that compute with vectors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, dtype

Distribution = Literal["rademacher", "gaussian", "sphere"]


class VectorSpace(ABC):
    """Vectors of one length and dtype, of which this process holds a part.

    Law: `dots` is an inner product of whole vectors, the same number on every process; what
    `random` gives for a seed does not depend on how many processes there are.
    """

    dtype: dtype

    @property
    @abstractmethod
    def dimension(self) -> int:
        """n, the length of a whole vector."""

    @abstractmethod
    def zeros(self) -> Tensor:
        """The zero vector, (local,)."""

    @abstractmethod
    def dots(self, rows: Tensor, vector: Tensor) -> Tensor:
        """Inner products (m,) of `rows` (m, local) with `vector` (local,): float64, on the CPU."""

    def dots_of(self, vectors: Sequence[Tensor], vector: Tensor) -> Tensor:
        """Inner products (m,) of vectors (local,) that lie apart, as `dots` gives them of rows."""
        return torch.cat([self.dots(each.unsqueeze(0), vector) for each in vectors])

    @abstractmethod
    def random(self, seed: int, distribution: Distribution) -> Tensor:
        """The vector (local,) of this seed and distribution."""

    @abstractmethod
    def coordinate(self, index: int) -> Tensor:
        """The unit vector (local,) of a canonical index."""

    def parts(self) -> Mapping[str, int]:
        """Number of coordinates of each part that vectors consist of, by name, in canonical order.

        By default the whole is the only part, and has no name.
        """
        return {"": self.dimension}

    def dots_by_part(self, left: Tensor, right: Tensor) -> Tensor:
        """What each part of two vectors (local,) adds to their inner product.

        Returns:
            One number for each of `parts`, (p,) float64 on the CPU.
        """
        return self.dots(left.unsqueeze(0), right)

    def only(self, vector: Tensor, parts: Collection[int]) -> Tensor:
        """A new vector (local,): this one on some of the parts, and zero on all others.

        Args:
            vector: The vector, (local,).
            parts: Numbers of the parts, in the order of `parts`.
        """
        return vector.clone() if parts else torch.zeros_like(vector)

    @abstractmethod
    def agree(self, found: Any) -> Any:
        """One answer from those of all processes.

        Two machines may solve the same small eigenproblem with other signs, and each would rotate
        its part of a basis its own way.
        """
