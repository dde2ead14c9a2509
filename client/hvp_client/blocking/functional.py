"""The blocking side of `hvp_client.awaited.functional`: made of it by `make sdk`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from hvp_client._batches import Batch
from hvp_client._landscape import LossAlong
from hvp_client._over_data import OverData
from hvp_client.awaited.functional import AsyncFunctional
from hvp_client.blocking.linear_map import LinearMap
from hvp_client.blocking.twins import twin_of
from hvp_client.blocking.vector import Vector


class Functional(LinearMap, twin=AsyncFunctional):
    """A loss L(θ) whose curvature is a linear map: what it tells in numbers, at θ and around."""

    _twin: AsyncFunctional

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

    def over_data(
        self, v: Vector | Sequence[Vector] | Any, batches: Sequence[Batch | str]
    ) -> OverData:
        """The forms v·Av on each of several batches, and their mean with its error over the data.

        With the eigenvectors of a result it tells how far their eigenvalues would move with other
        data, which is apart from the error of the search; with random vectors, the same of a trace.

        Args:
            v: As for `quadratic`.
            batches: Two batches or more, or their names. The operator's own counts only if it is
                among them.

        Returns:
            The forms, with `values`, `standard_errors`, `intervals` and `table()`. Cost: for each
            batch a forward pass, and `quadratic`.

        Raises:
            InvalidArgumentError: `BATCHES_INVALID`: fewer than two batches, or one of them twice;
                otherwise as for `quadratic`.
            NotFoundError: No such batch.
        """
        return self._portal.run(self._twin.over_data(twin_of(v), batches))
