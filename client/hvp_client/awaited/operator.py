"""The curvature of a loss as a linear operator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, final, overload

import numpy as np
from hvp_protos.v1 import job_pb2, operator_pb2, vector_pb2
from numpy.typing import NDArray

from hvp_client._arrays import like
from hvp_client._bulk import as_real
from hvp_client._checkpoints import tensors_from_proto
from hvp_client._handles import is_sequence_of, require_handle
from hvp_client._kinds import kind_name
from hvp_client._labels import check_labels
from hvp_client._landscape import LossAlong, checked_grid, points_of
from hvp_client._results import Plan, plan_from_proto
from hvp_client._selections import in_blocks, in_words
from hvp_client._session import Session, gather_bounded, new_request_id
from hvp_client._spaces import VectorSpace
from hvp_client._specs import job_spec
from hvp_client.awaited.job import AsyncJob
from hvp_client.awaited.linear_map import AsyncLinearMap, describe_operator
from hvp_client.awaited.questions import AsyncQuestions
from hvp_client.awaited.vector import AsyncVector

_POINTS_AT_ONCE = 8  # of a grid: a call that is cut off loses no more
_OPENED_AT_ONCE = 8  # operators that are checked on the server at the same time


async def open_operator(session: Session, spec: operator_pb2.OperatorSpec) -> AsyncOperator:
    """Check an operator on the server and fill in its defaults; see Client.operator."""
    answer = await describe_operator(session, spec)
    spaces, tensors = VectorSpace.of_operator(answer), tensors_from_proto(answer.parameters)
    return AsyncOperator(session, answer.operator, *spaces, tensors)


@final
class AsyncOperator(AsyncLinearMap, AsyncQuestions):
    """The curvature of a loss L(θ) as a symmetric linear operator: products, never a matrix.

    Law: u·Hv == v·Hu and H(au + bv) == aHu + bHv, to rounding of `dtype`. What the properties tell
    does not change while the handle lives.

    An `AsyncOperator`'s products are awaited: `w = await (H @ v)`. An `Operator` is a
    `scipy.sparse.linalg.LinearOperator` where SciPy is installed: SciPy's solvers take it and run
    on this side, with every product travelling, and `H + 1e-3 * I`, `2 * H` or `H @ A` are SciPy's
    operators. The questions of the same names as its solvers, which give a job, run where the
    vectors are.
    """

    @property
    def kind(self) -> str:
        """Which matrix, as `client.operator` takes it: `hessian`, `ggn` and others."""
        return kind_name(self._spec.kind)

    @property
    def micro_batch_size(self) -> int:
        """Sequences that a rank takes at once; results do not depend on it."""
        return self._spec.micro_batch_size

    async def loss(self) -> float:
        """L(θ), the mean over every supervised target of the batch, in nats.

        Returns:
            The loss. Cost: one forward pass.

        Raises:
            OutOfRangeError: `NON_FINITE`; metadata names the first block.
        """
        answer = await self._session.wire.unary(
            "OperatorService/EvaluateLoss",
            operator_pb2.EvaluateLossRequest(operator=self._spec),
            operator_pb2.EvaluateLossResponse,
            timeout_s=self._session.wire.timeout.compute_s,
        )
        return answer.loss

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
        return await self._evaluate(operator_pb2.EvaluateFormsRequest.FORM_QUADRATIC, v)

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
        return await self._evaluate(operator_pb2.EvaluateFormsRequest.FORM_SLOPE, v)

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
        if isinstance(directions, AsyncVector):
            return await self._loss_along([directions], grid)
        if is_sequence_of(directions, AsyncVector):
            return await self._loss_along(list(directions), grid)
        array = as_real(directions, "directions")
        columns = array[..., np.newaxis] if array.ndim == 1 else array
        async with self._columns(columns) as vectors:
            return await self._loss_along(vectors, grid)

    async def _loss_along(self, directions: Sequence[AsyncVector], grid: Any) -> LossAlong:
        steps = checked_grid(grid, len(directions))
        losses = await self._losses(directions, points_of(steps).tolist())
        curvatures = np.empty((len(directions), len(directions)))
        for i, product in enumerate(await self._apply(directions)):
            async with product:
                curvatures[:, i] = [await each.dot(product) for each in directions]
        return LossAlong(
            kind=self.kind,
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

    @overload
    async def __rmatmul__(self, other: AsyncVector) -> AsyncVector: ...
    @overload
    async def __rmatmul__(self, other: Any) -> Any: ...
    async def __rmatmul__(self, other: AsyncVector | Any) -> AsyncVector | Any:
        # H is symmetric: vᵀH is (Hv)ᵀ, and rows (k, n) give rows.
        if not is_sequence_of(other, AsyncVector) and not isinstance(other, AsyncVector):
            array = as_real(other, "v")
            if array.ndim == 2:
                return like(other, (await self._apply_columns(array.T)).T)
        return await (self @ other)

    async def parameters(self, *, keep: bool = False) -> AsyncVector:
        """The values θ of the operator's parameters, as a new vector; `keep` as `Vector.keep`."""
        source = vector_pb2.VectorSource(parameters=vector_pb2.ParametersSource())
        return await self._create(source, keep=keep)

    async def restrict(self, *globs: str) -> AsyncOperator:
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
        return await open_operator(self._session, self._restricted(globs))

    async def blocks(
        self, by: str | Sequence[Any] | Mapping[str, Any] = "layer"
    ) -> dict[str, AsyncOperator]:
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
        blocks = in_blocks(by, self._tensors)
        opened = await gather_bounded(
            _OPENED_AT_ONCE, [partial(self.restrict, *names) for names in blocks.values()]
        )
        return dict(zip(blocks, opened, strict=True))

    async def plan(self, operation: str, **values: Any) -> Plan:
        """Tell what a question would cost, without queueing anything.

        Args:
            operation: Name of the question, which is a method of this class.
            values: Arguments of that method, by name.

        Returns:
            Products, bytes on each rank, seconds where the pace is known, and whether the job fits.

        Raises:
            InvalidArgumentError: `OPERATION_UNKNOWN`, or as the question itself.
        """
        answer = await self._create_job(operation, values, validate_only=True)
        return plan_from_proto(answer.plan)

    def __repr__(self) -> str:
        size, of = f"n={self.shape[0]:,}", f"of {self.checkpoint}{in_words(self.selection)}"
        return f"<{type(self).__name__} {self.kind} {size} {self.dtype} {of}>"

    async def _evaluate(
        self, form: operator_pb2.EvaluateFormsRequest.Form.ValueType, v: Any
    ) -> float | NDArray[np.float64]:
        if isinstance(v, AsyncVector):
            return float((await self._numbers(form, [v]))[0])
        if is_sequence_of(v, AsyncVector):
            return await self._numbers(form, list(v))
        array = as_real(v, "v")
        columns = array[..., np.newaxis] if array.ndim == 1 else array
        async with self._columns(columns) as vectors:
            numbers = await self._numbers(form, vectors)
        return float(numbers[0]) if array.ndim == 1 else numbers

    async def _numbers(
        self,
        form: operator_pb2.EvaluateFormsRequest.Form.ValueType,
        vectors: Sequence[AsyncVector],
    ) -> NDArray[np.float64]:
        names = [require_handle(vector, AsyncVector, "v").name for vector in vectors]
        if not names:
            return np.empty(0)
        answer = await self._session.wire.unary(
            "OperatorService/EvaluateForms",
            operator_pb2.EvaluateFormsRequest(operator=self._spec, form=form, vectors=names),
            operator_pb2.EvaluateFormsResponse,
            timeout_s=self._session.wire.timeout.compute_s,
        )
        return np.array(answer.values)

    async def _ask(
        self, operation: str, values: Mapping[str, Any], labels: Mapping[str, str] | None
    ) -> AsyncJob[Any]:
        answer = await self._create_job(operation, values, labels=check_labels(labels))
        return AsyncJob(self._session, answer.job)

    async def _create_job(
        self,
        operation: str,
        values: Mapping[str, Any],
        *,
        labels: Mapping[str, str] | None = None,
        validate_only: bool = False,
    ) -> job_pb2.CreateJobResponse:
        return await self._session.wire.unary(
            "JobService/CreateJob",
            job_pb2.CreateJobRequest(
                parent=self._session.parent,
                request_id=new_request_id(),
                spec=job_spec(operation, self._spec, self.shape[0], values),
                labels=labels,
                validate_only=validate_only,
            ),
            job_pb2.CreateJobResponse,
            timeout_s=self._session.wire.timeout.compute_s,
        )
