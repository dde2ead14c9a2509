"""The blocking side of `hvp_client.awaited.linear_map`: made of it by `make sdk`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import numpy as np

from hvp_client._checkpoints import ParameterTensor
from hvp_client.awaited.linear_map import AsyncLinearMap
from hvp_client.blocking.twins import Blocking, twin_of
from hvp_client.blocking.vector import Vector


class LinearMap(Blocking, twin=AsyncLinearMap):
    """A linear map that the server holds: it gives products with vectors, never a matrix.

    Law: A(au + bv) == aAu + bAv, to rounding of `dtype`.
    """

    _twin: AsyncLinearMap
    __array_ufunc__ = None

    @property
    def shape(self) -> tuple[int, int]:
        """`(m, n)`: the map takes vectors of n elements and gives vectors of m elements."""
        return self._twin.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of vectors and products: float32 or float64."""
        return self._twin.dtype

    @property
    def checkpoint(self) -> str:
        """Name of the checkpoint."""
        return self._twin.checkpoint

    @property
    def batch(self) -> str:
        """Name of the data batch."""
        return self._twin.batch

    @property
    def precision(self) -> str:
        """Precision of the operands of matrix products: `full`, `tf32` or `bfloat16`."""
        return self._twin.precision

    @property
    def deterministic(self) -> bool:
        """Whether every result has the same bits each time it is asked for."""
        return self._twin.deterministic

    @property
    def selection(self) -> tuple[str, ...]:
        """Patterns by which the parameters were selected; empty where all of them are."""
        return self._twin.selection

    @property
    def parameter_tensors(self) -> tuple[ParameterTensor, ...]:
        """The selected parameters: name, shape and offset in the operator's vectors."""
        return self._twin.parameter_tensors

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """Names of the selected parameters, in the order of the operator's vectors."""
        return self._twin.parameter_names

    @overload
    def matvec(self, v: Vector) -> Vector: ...

    @overload
    def matvec(self, v: Any) -> Any: ...

    def matvec(self, v: Vector | Any) -> Vector | Any:
        """Multiply one vector.

        Args:
            v: A vector of the domain, or real numbers (n,) or (n, 1), in numpy, torch or lists;
                outputs of a model also in their own shape.

        Returns:
            For a vector a new vector, which stays on the ranks. For numbers an array (m,) or (m, 1)
            in `dtype`, and for a tensor a tensor on its device: these travel, as `v` does. Cost:
            one product; in GEMM passes 6 to 11 for a Hessian and 4 to 6 for a GGN or Fisher matrix,
            by the server's schedule, and 3 for a Jacobian.

        Raises:
            InvalidArgumentError: `SHAPE_MISMATCH`, `NON_FINITE`, `DTYPE_UNSUPPORTED` or
                `VECTOR_SPACE_MISMATCH`; `field` is `v`.
            OutOfRangeError: `NON_FINITE`: the product is not finite.
        """
        result: Vector | Any = self._wait(self._twin.matvec(twin_of(v)))
        return result

    @overload
    def matmat(self, V: Sequence[Vector]) -> list[Vector]: ...

    @overload
    def matmat(self, V: Any) -> Any: ...

    def matmat(self, V: Sequence[Vector] | Any) -> list[Vector] | Any:
        """Multiply k vectors at once; they share the gathering of the weights.

        Args:
            V: A sequence of k vectors, or real numbers (n, k), in numpy, torch or lists.

        Returns:
            For vectors a list of k new vectors; for numbers an array or tensor (m, k). Cost: k
            products, and memory for 2k vectors on the ranks.

        Raises:
            InvalidArgumentError: As for matvec.
            ResourceExhaustedError: `VECTOR_MEMORY`: give fewer at once.
        """
        result: list[Vector] | Any = self._wait(self._twin.matmat(twin_of(V)))
        return result

    @overload
    def __matmul__(self, other: Vector) -> Vector: ...

    @overload
    def __matmul__(self, other: list[Vector] | tuple[Vector, ...]) -> list[Vector]: ...

    @overload
    def __matmul__(self, other: Any) -> Any: ...

    def __matmul__(self, other: Vector | Sequence[Vector] | Any) -> Vector | list[Vector] | Any:
        result: Vector | list[Vector] | Any = self._wait(self._twin.__matmul__(twin_of(other)))
        return result

    def random_vector(
        self, *, seed: int, distribution: str = "rademacher", keep: bool = False
    ) -> Vector:
        """A random vector of the domain, expanded on the ranks from its seed.

        Args:
            seed: From 0 to 2**64 − 1; a seed gives the same vector on any number of ranks.
            distribution: `rademacher` (±1), `gaussian` or `sphere` (uniform, of norm 1).
            keep: Whether to keep the vector at once, as `Vector.keep` does.

        Returns:
            A new vector; nothing but the seed travels.

        Raises:
            InvalidArgumentError: `SEED_INVALID` or `DISTRIBUTION_UNSPECIFIED`.
            ResourceExhaustedError: `VECTOR_MEMORY`.
        """
        result: Vector = self._wait(
            self._twin.random_vector(seed=seed, distribution=distribution, keep=keep)
        )
        return result

    def zeros(self, *, keep: bool = False) -> Vector:
        """The zero vector of the domain; `keep` as `Vector.keep`."""
        result: Vector = self._wait(self._twin.zeros(keep=keep))
        return result

    def vector(self, array: Any, *, keep: bool = False) -> Vector:
        """Bring an array to the ranks, as a vector of the domain.

        Args:
            array: Real finite numbers (n,), outputs of a model also in their own shape: numpy,
                torch, or anything `np.asarray` takes.
            keep: Whether to keep the vector at once, as `Vector.keep` does.

        Returns:
            A new vector of the operator's dtype.

        Raises:
            InvalidArgumentError: `SHAPE_MISMATCH`, `NON_FINITE` or `DTYPE_UNSUPPORTED`.
            ResourceExhaustedError: `VECTOR_MEMORY`.
        """
        result: Vector = self._wait(self._twin.vector(array, keep=keep))
        return result
