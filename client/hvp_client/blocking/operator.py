"""The blocking side of `hvp_client.awaited.operator`: made of it by `make sdk`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final, overload

import numpy as np
from numpy.typing import NDArray

from hvp_client._landscape import LossAlong
from hvp_client._results import Plan
from hvp_client._selections import in_words
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
        """Which matrix, as `client.operator` takes it: `hessian`, `ggn` and others."""
        return self._twin.kind

    @property
    def micro_batch_size(self) -> int:
        """Sequences that a rank takes at once; results do not depend on it."""
        return self._twin.micro_batch_size

    def loss(self) -> float:
        """L(θ), the mean over every supervised target of the batch, in nats.

        Returns:
            The loss. Cost: one forward pass.

        Raises:
            OutOfRangeError: `NON_FINITE`; metadata names the first block.
        """
        return self._portal.run(self._twin.loss())

    def gradient(self) -> Vector:
        """The gradient ∇L(θ), which stays on the ranks.

        Returns:
            A new vector. Cost: 3 GEMM passes, 4 where memory is short.

        Raises:
            OutOfRangeError: `NON_FINITE`; metadata names the first block.
        """
        result: Vector = self._wait(self._twin.gradient())
        return result

    @overload
    def quadratic(self, v: Vector) -> float: ...

    @overload
    def quadratic(self, v: Sequence[Vector]) -> NDArray[np.float64]: ...

    @overload
    def quadratic(self, v: Any) -> float | NDArray[np.float64]: ...

    def quadratic(self, v: Vector | Sequence[Vector] | Any) -> float | NDArray[np.float64]:
        """The quadratic form v·Hv; only the number leaves the ranks.

        Args:
            v: A vector or a sequence of k vectors; or real numbers (n,) or (n, k), in numpy, torch
                or lists, which travel to the ranks.

        Returns:
            The number, or for k vectors an array (k,) of float64. Cost: for a GGN or Fisher matrix
            1 + 2k GEMM passes, all of them forward; for a Hessian k products.

        Raises:
            InvalidArgumentError: As for matvec.
            OutOfRangeError: `NON_FINITE`: a number is not finite.
            ResourceExhaustedError: `VECTOR_MEMORY`: there is no room for a product on the ranks.
        """
        result: float | NDArray[np.float64] = self._portal.run(self._twin.quadratic(twin_of(v)))
        return result

    @overload
    def slope(self, v: Vector) -> float: ...

    @overload
    def slope(self, v: Sequence[Vector]) -> NDArray[np.float64]: ...

    @overload
    def slope(self, v: Any) -> float | NDArray[np.float64]: ...

    def slope(self, v: Vector | Sequence[Vector] | Any) -> float | NDArray[np.float64]:
        """The derivative ∇L·v of the loss along v, by forward passes and without a gradient.

        Args:
            v: As for `quadratic`.

        Returns:
            The number, or for k vectors an array (k,) of float64. Cost: 1 + 2k GEMM passes.

        Raises:
            InvalidArgumentError: As for matvec.
            OutOfRangeError: `NON_FINITE`: a number is not finite.
        """
        result: float | NDArray[np.float64] = self._portal.run(self._twin.slope(twin_of(v)))
        return result

    def loss_along(self, directions: Vector | Sequence[Vector] | Any, grid: Any) -> LossAlong:
        """The loss at θ + Σ aᵢ dᵢ on a grid, beside what slope and curvature at θ predict.

        The losses are those of the operator's own precision: the displaced parameters are rounded
        to the type of the operands of matrix products. Take float64 for small steps.

        Args:
            directions: One direction or two: vectors, as the eigenvectors of a result; or real
                numbers (n,) or (n, 2), in numpy, torch or lists, which travel to the ranks.
            grid: The steps aᵢ: numbers (m,) for one direction, a pair of such arrays for two.

        Returns:
            The losses, with `predicted`, `measured_curvature()` and `plot(path)`. Cost: one forward
            pass for each point, the slopes, and a product for each direction.

        Raises:
            InvalidArgumentError: `POINTS_INVALID`; otherwise as for matvec.
        """
        return self._portal.run(self._twin.loss_along(twin_of(directions), grid))

    @overload
    def __rmatmul__(self, other: Vector) -> Vector: ...

    @overload
    def __rmatmul__(self, other: Any) -> Any: ...

    def __rmatmul__(self, other: Vector | Any) -> Vector | Any:
        result: Vector | Any = self._wait(self._twin.__rmatmul__(twin_of(other)))
        return result

    def parameters(self, *, keep: bool = False) -> Vector:
        """The values θ of the operator's parameters, as a new vector; `keep` as `Vector.keep`."""
        result: Vector = self._wait(self._twin.parameters(keep=keep))
        return result

    def restrict(self, *globs: str) -> Operator:
        """The operator on some of its own parameters: these rows and columns of the matrix.

        Args:
            globs: Patterns, as `parameters` of `client.operator`; they select among the parameters
                that this operator has.

        Returns:
            An operator whose vectors have the length of the selection. Its products cost what the
            selection needs, and no more.

        Raises:
            InvalidArgumentError: `PARAMETERS_NOT_FOUND`: a pattern selects nothing; the message
                lists the nearest names.
        """
        result: Operator = self._wait(self._twin.restrict(*globs))
        return result

    def blocks(self, by: str | Sequence[Any] | Mapping[str, Any] = "layer") -> dict[str, Operator]:
        """The diagonal blocks of the matrix, each as an operator of its own.

        Args:
            by: How to group the parameters. `layer`: those whose names agree up to the first
                number, as in `model.layers.3`, are one block, and of the others those of one
                module. `tensor`: each parameter is a block. Or the patterns of each block: a list
                of lists, or a dict by the names that the blocks are to have.

        Returns:
            Operators by the names of the blocks, in order. Every parameter is in one of them.

        Raises:
            InvalidArgumentError: `PARAMETERS_NOT_FOUND`: a pattern selects nothing.
                `PARAMETERS_INVALID`: a parameter is in two blocks, or in none.
        """
        result: dict[str, Operator] = self._wait(self._twin.blocks(by))
        return result

    def plan(self, operation: str, **values: Any) -> Plan:
        """Tell what a question would cost, without queueing anything.

        Args:
            operation: Name of the question, which is a method of this class.
            values: Arguments of that method, by name.

        Returns:
            Products, bytes on each rank, seconds where the pace is known, and whether the job fits.

        Raises:
            InvalidArgumentError: `OPERATION_UNKNOWN`, or as the question itself.
        """
        return self._portal.run(self._twin.plan(operation, **values))

    def __repr__(self) -> str:
        size, of = (f"n={self.shape[0]:,}", f"of {self.checkpoint}{in_words(self.selection)}")
        return f"<{type(self).__name__} {self.kind} {size} {self.dtype} {of}>"
