"""The blocking side of `hvp_client.awaited.operator`: made of it by `make sdk`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final, overload

import numpy as np

from hvp_client._results import Plan
from hvp_client.awaited.operator import AsyncOperator
from hvp_client.blocking.protocols import SymmetricLinearOperator
from hvp_client.blocking.questions import Questions
from hvp_client.blocking.twins import twin_of
from hvp_client.blocking.vector import Vector


@final
class Operator(Questions, SymmetricLinearOperator, twin=AsyncOperator):
    """The curvature of a loss L(θ) as a symmetric linear operator: products, never a matrix.

    Law: u·Hv == v·Hu and H(au + bv) == aHu + bHv, to rounding of `dtype`. What the properties tell
    does not change while the handle lives.

    An `AsyncOperator`'s products are awaited: `w = await (H @ v)`. An `Operator` is a
    `scipy.sparse.linalg.LinearOperator` where SciPy is installed: SciPy's solvers take it and run
    on this side, with every product travelling, and `H + 1e-3 * I`, `2 * H` or `H @ A` are SciPy's
    operators. The questions of the same names as its solvers, which give a job, run where the
    vectors are.
    """

    _twin: AsyncOperator
    __array_ufunc__ = None

    @property
    def shape(self) -> tuple[int, int]:
        """`(n, n)`, n the number of parameters."""
        return self._twin.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of products and vectors: float32 or float64."""
        return self._twin.dtype

    @property
    def kind(self) -> str:
        """Such as `hessian`, `ggn` or `empirical_fisher_token`."""
        return self._twin.kind

    @property
    def checkpoint(self) -> str:
        """Name of the checkpoint."""
        return self._twin.checkpoint

    @property
    def batch(self) -> str:
        """Name of the data batch."""
        return self._twin.batch

    @property
    def micro_batch_size(self) -> int:
        """Sequences that a rank takes at once; results do not depend on it."""
        return self._twin.micro_batch_size

    @property
    def precision(self) -> str:
        """Of the operands of matrix products: `full`, `tf32` or `bfloat16`."""
        return self._twin.precision

    def loss(self) -> float:
        """L(θ): mean over every supervised target of the batch, nats.

        Returns:
            The loss. Cost: one forward pass.

        Raises:
            OutOfRangeError: `NON_FINITE`; metadata names the first block.
        """
        return self._portal.run(self._twin.loss())

    def gradient(self) -> Vector:
        """∇L(θ), left on the ranks.

        Returns:
            A new vector. Cost: 3 GEMM passes, 4 where memory is short.

        Raises:
            OutOfRangeError: `NON_FINITE`; metadata names the first block.
        """
        result: Vector = self._wait(self._twin.gradient())
        return result

    @overload
    def matvec(self, v: Vector) -> Vector: ...

    @overload
    def matvec(self, v: Any) -> Any: ...

    def matvec(self, v: Vector | Any) -> Vector | Any:
        """Hv.

        Args:
            v: A vector, or real numbers (n,) or (n, 1), in numpy, torch or lists.

        Returns:
            A new vector for a vector. For numbers an array of their shape in `dtype`, and for a
            tensor a tensor on its device; v and Hv travel. Cost: one product.

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
        """HV for k vectors at once, which share the gathering of the weights.

        Args:
            V: A sequence of vectors, or real numbers (n, k), in numpy, torch or lists.

        Returns:
            As many new vectors, or an array or tensor (n, k). Cost: k products; on the ranks 2k
            vectors.

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

    @overload
    def __rmatmul__(self, other: Vector) -> Vector: ...

    @overload
    def __rmatmul__(self, other: Any) -> Any: ...

    def __rmatmul__(self, other: Vector | Any) -> Vector | Any:
        result: Vector | Any = self._wait(self._twin.__rmatmul__(twin_of(other)))
        return result

    def random_vector(
        self, *, seed: int, distribution: str = "rademacher", keep: bool = False
    ) -> Vector:
        """A random probe, expanded on the ranks from its seed.

        Args:
            seed: From 0 to 2**64 − 1; the same vector on any number of ranks.
            distribution: `rademacher` (±1), `gaussian` or `sphere` (uniform, of norm 1).
            keep: As `Vector.keep`.

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
        """The zero vector; `keep` as `Vector.keep`."""
        result: Vector = self._wait(self._twin.zeros(keep=keep))
        return result

    def parameters(self, *, keep: bool = False) -> Vector:
        """θ, the model's own parameters; `keep` as `Vector.keep`."""
        result: Vector = self._wait(self._twin.parameters(keep=keep))
        return result

    def vector(self, array: Any, *, keep: bool = False) -> Vector:
        """Bring an array to the ranks.

        Args:
            array: Real finite numbers (n,): numpy, torch, or anything `np.asarray` takes.
            keep: As `Vector.keep`.

        Returns:
            A new vector of the operator's dtype.

        Raises:
            InvalidArgumentError: `SHAPE_MISMATCH`, `NON_FINITE` or `DTYPE_UNSUPPORTED`.
            ResourceExhaustedError: `VECTOR_MEMORY`.
        """
        result: Vector = self._wait(self._twin.vector(array, keep=keep))
        return result

    def plan(self, operation: str, **values: Any) -> Plan:
        """Tell what a question would take, without queueing anything.

        Args:
            operation: Name of the question, which is a method of this class.
            values: As that method takes them, by name.

        Returns:
            Products, bytes on each rank, seconds where the pace is known, and whether it fits.

        Raises:
            InvalidArgumentError: `OPERATION_UNKNOWN`, or as the question itself.
        """
        return self._portal.run(self._twin.plan(operation, **values))

    def __repr__(self) -> str:
        size = f"n={self.shape[0]:,}"
        return f"<{type(self).__name__} {self.kind} {size} {self.dtype} of {self.checkpoint}>"
