"""The blocking side of `hvp_client.awaited.operator`: made of it by `make sdk`."""

from __future__ import annotations

from typing import Any, final, overload

from hvp_client._results import Plan
from hvp_client.awaited.operator import AsyncOperator
from hvp_client.blocking.linear_map import LinearMap
from hvp_client.blocking.protocols import SymmetricLinearOperator
from hvp_client.blocking.questions import Questions
from hvp_client.blocking.twins import twin_of
from hvp_client.blocking.vector import Vector


@final
class Operator(LinearMap, Questions, SymmetricLinearOperator, twin=AsyncOperator):
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

    @property
    def kind(self) -> str:
        """Such as `hessian`, `ggn` or `empirical_fisher_token`."""
        return self._twin.kind

    @property
    def micro_batch_size(self) -> int:
        """Sequences that a rank takes at once; results do not depend on it."""
        return self._twin.micro_batch_size

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
    def __rmatmul__(self, other: Vector) -> Vector: ...

    @overload
    def __rmatmul__(self, other: Any) -> Any: ...

    def __rmatmul__(self, other: Vector | Any) -> Vector | Any:
        result: Vector | Any = self._wait(self._twin.__rmatmul__(twin_of(other)))
        return result

    def parameters(self, *, keep: bool = False) -> Vector:
        """θ, the model's own parameters; `keep` as `Vector.keep`."""
        result: Vector = self._wait(self._twin.parameters(keep=keep))
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
