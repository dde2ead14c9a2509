"""The blocking handle of an operator: its awaitable twin and the wait."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final, overload

from hvp_client._async_operator import AsyncOperator
from hvp_client._async_vector import AsyncVector
from hvp_client._handles import OperatorFields, is_sequence_of
from hvp_client._job import Job
from hvp_client._linear_operator import SymmetricLinearOperator
from hvp_client._portal import Portal
from hvp_client._questions import BlockingQuestions
from hvp_client._vector import Vector


@final
class Operator(OperatorFields, BlockingQuestions, SymmetricLinearOperator):
    """The curvature of a loss L(θ) as a symmetric linear operator: products, never a matrix.

    Law: u·Hv == v·Hu and H(au + bv) == aHu + bHv, to rounding of `dtype`.

    Where SciPy is installed it is a `scipy.sparse.linalg.LinearOperator`: SciPy's solvers take it
    and run on this side, with every product travelling, and `H + 1e-3 * I`, `2 * H` or `H @ A` are
    SciPy's operators. The questions of the same names as its solvers, which give a job, run where
    the vectors are.
    """

    def __init__(self, portal: Portal, twin: AsyncOperator):
        super().__init__(twin._description)
        self._portal = portal
        self._twin = twin

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
        return self._wrap(self._portal.run(self._twin.gradient()))

    @overload
    def matvec(self, v: Vector) -> Vector: ...
    @overload
    def matvec(self, v: Any) -> Any: ...
    def matvec(self, v: Any) -> Any:
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
        if isinstance(v, Vector):
            return self._wrap(self._portal.run(self._twin.matvec(v._twin)))
        return self._portal.run(self._twin.matvec(v))

    @overload
    def matmat(self, V: Sequence[Vector]) -> list[Vector]: ...
    @overload
    def matmat(self, V: Any) -> Any: ...
    def matmat(self, V: Any) -> Any:
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
        if is_sequence_of(V, Vector):
            twins = self._portal.run(self._twin.matmat([v._twin for v in V]))
            return [self._wrap(twin) for twin in twins]
        return self._portal.run(self._twin.matmat(V))

    @overload
    def __matmul__(self, other: Vector) -> Vector: ...
    @overload
    def __matmul__(self, other: list[Vector] | tuple[Vector, ...]) -> list[Vector]: ...
    @overload
    def __matmul__(self, other: Any) -> Any: ...
    def __matmul__(self, other: Any) -> Any:
        if isinstance(other, Vector):
            return self.matvec(other)
        if is_sequence_of(other, Vector):
            return self.matmat(other)
        return self._portal.run(self._twin @ other)

    @overload
    def __rmatmul__(self, other: Vector) -> Vector: ...
    @overload
    def __rmatmul__(self, other: Any) -> Any: ...
    def __rmatmul__(self, other: Any) -> Any:
        if isinstance(other, Vector) or is_sequence_of(other, Vector):
            return self @ other
        return self._portal.run(self._twin.__rmatmul__(other))

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
        twin = self._twin.random_vector(seed=seed, distribution=distribution, keep=keep)
        return self._wrap(self._portal.run(twin))

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
        return self._wrap(self._portal.run(self._twin.vector(array, keep=keep)))

    def zeros(self, *, keep: bool = False) -> Vector:
        """The zero vector; `keep` as `Vector.keep`."""
        return self._wrap(self._portal.run(self._twin.zeros(keep=keep)))

    def parameters(self, *, keep: bool = False) -> Vector:
        """θ, the model's own parameters; `keep` as `Vector.keep`."""
        return self._wrap(self._portal.run(self._twin.parameters(keep=keep)))

    def _ask(
        self, operation: str, values: Mapping[str, Any], labels: Mapping[str, str] | None
    ) -> Job[Any]:
        return Job(self._portal, self._portal.run(self._twin._ask(operation, values, labels)))

    def _wrap(self, twin: AsyncVector) -> Vector:
        return Vector(self._portal, twin)
