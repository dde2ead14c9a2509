"""Operators that are small dense matrices or functions, and the space of their vectors."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hvp_core.linop.linear_operator import LinearOperator
from hvp_core.vectors.probes import fill
from hvp_core.vectors.vector_space import Distribution, VectorSpace
from torch import Tensor


@dataclass(frozen=True)
class DenseSpace(VectorSpace):
    """Vectors of length n that lie whole in this process."""

    n: int
    dtype: torch.dtype = torch.float64

    @property
    def dimension(self) -> int:
        return self.n

    def zeros(self) -> Tensor:
        return torch.zeros(self.n, dtype=self.dtype)

    def dots(self, rows: Tensor, vector: Tensor) -> Tensor:
        return rows.double() @ vector.double()

    def random(self, seed: int, distribution: Distribution) -> Tensor:
        vector = self.zeros()
        fill(vector, 0, seed, "rademacher" if distribution == "rademacher" else "gaussian")
        return vector / vector.norm() if distribution == "sphere" else vector

    def coordinate(self, index: int) -> Tensor:
        vector = self.zeros()
        vector[index] = 1
        return vector

    def agree(self, found: Any) -> Any:
        return found


class QuickSpace(DenseSpace):
    """The same, with signs drawn without Philox, which takes most of a small run's time."""

    def random(self, seed: int, distribution: Distribution) -> Tensor:
        if distribution != "rademacher":
            return super().random(seed, distribution)
        bits = np.random.default_rng(seed).integers(0, 2, self.n)
        return torch.from_numpy(2.0 * bits - 1)


class InParts(QuickSpace):
    """Vectors that consist of parts.

    Args:
        sizes: Numbers of elements of the parts, by name.
        dtype: The dtype.
    """

    def __init__(self, sizes: Mapping[str, int], dtype: torch.dtype = torch.float64):
        super().__init__(sum(sizes.values()), dtype)
        object.__setattr__(self, "sizes", dict(sizes))

    def parts(self) -> Mapping[str, int]:
        sizes: Mapping[str, int] = vars(self)["sizes"]
        return sizes

    def random(self, seed: int, distribution: Distribution) -> Tensor:
        return super().random(seed, distribution).to(self.dtype)

    def dots_by_part(self, left: Tensor, right: Tensor) -> Tensor:
        products = left.double() * right.double()
        return torch.stack([each.sum() for each in products.split(list(self.parts().values()))])

    def only(self, vector: Tensor, parts: Collection[int]) -> Tensor:
        pieces = vector.split(list(self.parts().values()))
        return torch.cat(
            [
                piece if number in parts else torch.zeros_like(piece)
                for number, piece in enumerate(pieces)
            ]
        )


class DenseOperator(LinearOperator):
    """A matrix, or a function on vectors.

    Args:
        a: The matrix (n, n), or the function.
        space: Of its vectors; that of a matrix is its own.
        semidefinite: Whether it is known to have no negative eigenvalue.
        noise: Relative error of a product that is more than rounding.
        exact: The function without that noise; None where there is none. By default it has none.

    Attributes:
        count: Products so far.
    """

    symmetric = True

    def __init__(
        self,
        a: Tensor | Callable[[Tensor], Tensor],
        space: VectorSpace | None = None,
        *,
        semidefinite: bool = False,
        noise: float = 0.0,
        exact: Callable[[Tensor], Tensor] | str | None = "itself",
    ):
        if isinstance(a, Tensor):
            self._product: Callable[[Tensor], Tensor] = a.__matmul__
            space = space or DenseSpace(len(a), a.dtype)
        else:
            self._product = a
        assert space is not None
        self.domain = self.codomain = space
        self.semidefinite, self.noise, self._exact = semidefinite, noise, exact
        self.count = 0

    def apply(self, vectors: Sequence[Tensor], *, borrow: bool = False) -> list[Tensor]:
        self.count += len(vectors)
        products = [self._product(vector) for vector in vectors]
        return products if borrow else [product.clone() for product in products]

    def exact(self) -> LinearOperator | None:
        if isinstance(self._exact, str):
            return self
        return self._exact and DenseOperator(self._exact, self.domain)


class DenseMap(LinearOperator):
    """A matrix (m, n) between two spaces.

    Args:
        a: The matrix.
        noise: Relative error of a product that is more than rounding.
        exact: The matrix without that noise; None where there is none. By default it has none.

    Attributes:
        count: Products so far, with the matrix and with its transpose.
    """

    def __init__(self, a: Tensor, *, noise: float = 0.0, exact: Tensor | str | None = "itself"):
        self._a, self._exact, self.noise = a, exact, noise
        self.codomain, self.domain = (DenseSpace(size, a.dtype) for size in a.shape)
        self.count = 0

    def apply(self, vectors: Sequence[Tensor], *, borrow: bool = False) -> list[Tensor]:
        self.count += len(vectors)
        return [self._a @ vector for vector in vectors]

    def apply_transposed(self, vectors: Sequence[Tensor], *, borrow: bool = False) -> list[Tensor]:
        self.count += len(vectors)
        return [self._a.T @ vector for vector in vectors]

    def exact(self) -> LinearOperator | None:
        if isinstance(self._exact, str):
            return self
        return None if self._exact is None else DenseMap(self._exact)
