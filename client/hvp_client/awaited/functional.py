"""What an operator tells in numbers: its loss, slopes and quadratic forms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias, overload

import numpy as np
from hvp_protos.v1 import operator_pb2
from numpy.typing import NDArray

from hvp_client._algebra import matrix_of
from hvp_client._batches import Batch
from hvp_client._bulk import as_real
from hvp_client._handles import is_sequence_of, require_handle
from hvp_client._landscape import LossAlong, checked_grid, points_of
from hvp_client._over_data import OverData, checked_batches
from hvp_client._session import new_request_id
from hvp_client.awaited.linear_map import AsyncLinearMap
from hvp_client.awaited.vector import AsyncVector

_Form: TypeAlias = operator_pb2.EvaluateFormsRequest.Form.ValueType
_QUADRATIC = operator_pb2.EvaluateFormsRequest.FORM_QUADRATIC
_SLOPE = operator_pb2.EvaluateFormsRequest.FORM_SLOPE
_POINTS_AT_ONCE = 8  # of a grid: a call that is cut off loses no more


class AsyncFunctional(AsyncLinearMap):
    """A loss L(θ) whose curvature is a linear map: what it tells in numbers, at θ and around."""

    async def loss(self) -> float:
        """L(θ), the mean over every supervised target of the batch, in nats.

        Returns:
            The loss. Cost: one forward pass.

        Raises:
            OutOfRangeError: `NON_FINITE`; metadata names the first block.
        """
        return (await self._loss(self._spec)).loss

    async def gradient(self) -> AsyncVector:
        """The gradient ∇L(θ), which stays on the ranks.

        Returns:
            A new vector. Cost: 3 GEMM passes, 4 where memory is short.

        Raises:
            OutOfRangeError: `NON_FINITE`; metadata names the first block.
        """

        async def call(owner: str) -> operator_pb2.ComputeGradientResponse:
            return await self._session.wire.unary(
                "OperatorService/ComputeGradient",
                operator_pb2.ComputeGradientRequest(
                    operator=self._spec, request_id=new_request_id(), session=owner
                ),
                operator_pb2.ComputeGradientResponse,
                timeout_s=self._session.wire.timeout.compute_s,
            )

        answer = await self._session.make(call)
        return AsyncVector(self._session, answer.gradient, temporary=True)

    @overload
    async def quadratic(self, v: AsyncVector) -> float: ...
    @overload
    async def quadratic(self, v: Sequence[AsyncVector]) -> NDArray[np.float64]: ...
    @overload
    async def quadratic(self, v: Any) -> float | NDArray[np.float64]: ...
    async def quadratic(
        self, v: AsyncVector | Sequence[AsyncVector] | Any
    ) -> float | NDArray[np.float64]:
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
        return await self._evaluate(_QUADRATIC, v)

    @overload
    async def slope(self, v: AsyncVector) -> float: ...
    @overload
    async def slope(self, v: Sequence[AsyncVector]) -> NDArray[np.float64]: ...
    @overload
    async def slope(self, v: Any) -> float | NDArray[np.float64]: ...
    async def slope(
        self, v: AsyncVector | Sequence[AsyncVector] | Any
    ) -> float | NDArray[np.float64]:
        """The derivative ∇L·v of the loss along v, by forward passes and without a gradient.

        Args:
            v: As for `quadratic`.

        Returns:
            The number, or for k vectors an array (k,) of float64. Cost: 1 + 2k GEMM passes.

        Raises:
            InvalidArgumentError: As for matvec.
            OutOfRangeError: `NON_FINITE`: a number is not finite.
        """
        return await self._evaluate(_SLOPE, v)

    async def loss_along(
        self, directions: AsyncVector | Sequence[AsyncVector] | Any, grid: Any
    ) -> LossAlong:
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
        async with self._vectors(directions, "directions") as vectors:
            return await self._loss_along(vectors, grid)

    async def over_data(
        self, v: AsyncVector | Sequence[AsyncVector] | Any, batches: Sequence[Batch | str]
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
        specs = [self._on_batch(name) for name in checked_batches(batches)]
        async with self._vectors(v, "v") as vectors:
            forms = [await self._numbers(_QUADRATIC, vectors, spec) for spec in specs]
        losses = [await self._loss(spec) for spec in specs]
        return OverData(
            kind=str(matrix_of(self._spec)),
            forms=np.stack(forms),
            losses=np.array([each.loss for each in losses]),
            num_targets=np.array([each.num_targets for each in losses]),
        )

    def _on_batch(self, name: str) -> operator_pb2.OperatorSpec:
        """The same operator of another batch."""
        spec = operator_pb2.OperatorSpec()
        spec.CopyFrom(self._spec)
        spec.data_batch = name
        return spec

    async def _loss(self, spec: operator_pb2.OperatorSpec) -> operator_pb2.EvaluateLossResponse:
        return await self._session.wire.unary(
            "OperatorService/EvaluateLoss",
            operator_pb2.EvaluateLossRequest(operator=spec),
            operator_pb2.EvaluateLossResponse,
            timeout_s=self._session.wire.timeout.compute_s,
        )

    async def _loss_along(self, directions: Sequence[AsyncVector], grid: Any) -> LossAlong:
        steps = checked_grid(grid, len(directions))
        losses = await self._losses(directions, points_of(steps).tolist())
        curvatures = np.empty((len(directions), len(directions)))
        for i, product in enumerate(await self._apply(directions)):
            async with product:
                curvatures[:, i] = [await each.dot(product) for each in directions]
        return LossAlong(
            kind=str(matrix_of(self._spec)),
            steps=steps,
            losses=np.array(losses).reshape([len(each) for each in steps]),
            loss=await self.loss(),
            slopes=np.asarray(await self.slope(list(directions))),
            curvatures=(curvatures + curvatures.T) / 2,
        )

    async def _losses(
        self, directions: Sequence[AsyncVector], points: Sequence[Sequence[float]]
    ) -> list[float]:
        """L(θ + Σ aᵢ dᵢ) at each point."""
        names = [require_handle(each, AsyncVector, "directions").name for each in directions]
        losses: list[float] = []
        for start in range(0, len(points), _POINTS_AT_ONCE):
            answer = await self._session.wire.unary(
                "OperatorService/EvaluateLossAlong",
                operator_pb2.EvaluateLossAlongRequest(
                    operator=self._spec,
                    directions=names,
                    coefficients=[
                        a for each in points[start : start + _POINTS_AT_ONCE] for a in each
                    ],
                ),
                operator_pb2.EvaluateLossAlongResponse,
                timeout_s=self._session.wire.timeout.compute_s,
            )
            losses += answer.losses
        return losses

    async def _evaluate(self, form: _Form, v: Any) -> float | NDArray[np.float64]:
        given = (
            v if isinstance(v, AsyncVector) or is_sequence_of(v, AsyncVector) else as_real(v, "v")
        )
        async with self._vectors(given, "v") as vectors:
            numbers = await self._numbers(form, vectors, self._spec)
        is_one = isinstance(given, AsyncVector) or (
            isinstance(given, np.ndarray) and given.ndim == 1
        )
        return float(numbers[0]) if is_one else numbers

    async def _numbers(
        self, form: _Form, vectors: Sequence[AsyncVector], spec: operator_pb2.OperatorSpec
    ) -> NDArray[np.float64]:
        names = [require_handle(vector, AsyncVector, "v").name for vector in vectors]
        if not names:
            return np.empty(0)
        answer = await self._session.wire.unary(
            "OperatorService/EvaluateForms",
            operator_pb2.EvaluateFormsRequest(operator=spec, form=form, vectors=names),
            operator_pb2.EvaluateFormsResponse,
            timeout_s=self._session.wire.timeout.compute_s,
        )
        return np.array(answer.values)
