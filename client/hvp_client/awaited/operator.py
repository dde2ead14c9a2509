"""The curvature of a loss as a linear operator."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, final, overload

import numpy as np
from hvp_operations.low_rank.record import LowRankResult, read_saved
from hvp_operations.matrices import Matrix, check_blocks
from hvp_operations.partition import Partition
from hvp_protos.v1 import operator_pb2, vector_pb2

from hvp_client._algebra import is_number, matrix_of, number, with_matrix
from hvp_client._arrays import like
from hvp_client._bulk import as_real
from hvp_client._checkpoints import tensors_from_proto
from hvp_client._exceptions import InvalidArgumentError, UnimplementedError
from hvp_client._handles import is_sequence_of
from hvp_client._selections import in_blocks, in_words, refusals
from hvp_client._session import Session, gather_bounded
from hvp_client._spaces import VectorSpace
from hvp_client.awaited.asked import AsyncAsked
from hvp_client.awaited.functional import AsyncFunctional
from hvp_client.awaited.functions import AsyncFunctions
from hvp_client.awaited.linear_map import describe_operator
from hvp_client.awaited.vector import AsyncVector

_OPENED_AT_ONCE = 8  # operators that are checked on the server at the same time


async def open_operator(session: Session, spec: operator_pb2.OperatorSpec) -> AsyncOperator:
    """Check an operator on the server and fill in its defaults; see Client.operator."""
    answer = await describe_operator(session, spec)
    spaces, tensors = VectorSpace.of_operator(answer), tensors_from_proto(answer.parameters)
    return AsyncOperator(session, answer.operator, *spaces, tensors)


@final
class AsyncOperator(AsyncFunctional, AsyncAsked, AsyncFunctions):
    """The curvature of a loss L(θ) as a symmetric linear operator: products, never a matrix.

    Law: u·Hv == v·Hu and H(au + bv) == aHu + bHv, to rounding of `dtype`. What the properties tell
    does not change while the handle lives.

    An `AsyncOperator`'s products are awaited: `w = await (H @ v)`. An `Operator` is a
    `scipy.sparse.linalg.LinearOperator` where SciPy is installed: SciPy's solvers take it and run
    on this side, with every product travelling, and `H + I` with an operator of SciPy's or `H @ A`
    are SciPy's operators. The questions of the same names as its solvers, which give a job, run
    where the vectors are.

    Multiples of an operator, and sums of operators of one checkpoint, batch, selection, dtype and
    precision, all of them deterministic or none, are operators on the server: `2 * H`, `H - G`,
    `H + 1e-3 * client.identity(H)`.
    """

    _beside: tuple[AsyncVector, ...] = ()  # vectors that it names: they stay while it does

    @property
    def kind(self) -> str:
        """Which matrix: `hessian`, `ggn` and others as `client.operator` takes them.

        Of a sum it is the formula, such as `2 hessian + 0.001 identity`.
        """
        return str(matrix_of(self._spec))

    @property
    def sample_seed(self) -> int | None:
        """Seed of the labels of a `fisher`; None where no labels are drawn."""
        return self._spec.sample_seed if self._spec.num_samples else None

    @property
    def num_samples(self) -> int | None:
        """Labels that a `fisher` draws for each target; None where no labels are drawn."""
        return self._spec.num_samples or None

    @property
    def micro_batch_size(self) -> int:
        """Sequences that a rank takes at once; results do not depend on it."""
        return self._spec.micro_batch_size

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

    def __add__(self, other: AsyncOperator | Any) -> AsyncOperator:
        total: AsyncOperator = self._plus(other, 1.0)
        return total

    def __radd__(self, other: AsyncOperator | Any) -> AsyncOperator:
        # What `sum` begins with.
        return self if is_number(other) and other == 0 else NotImplemented

    def __sub__(self, other: AsyncOperator | Any) -> AsyncOperator:
        difference: AsyncOperator = self._plus(other, -1.0)
        return difference

    def __neg__(self) -> AsyncOperator:
        return self._times(-1.0)

    def __mul__(self, other: float | Any) -> AsyncOperator:
        return self._times(other) if is_number(other) else NotImplemented

    def __rmul__(self, other: float | Any) -> AsyncOperator:
        return self._times(other) if is_number(other) else NotImplemented

    def __truediv__(self, other: float | Any) -> AsyncOperator:
        if not is_number(other):
            return NotImplemented
        return self._times(1 / other if other else math.inf)

    def _times(self, factor: float) -> AsyncOperator:
        factor = number(factor, "factor")
        return self._of(matrix_of(self._spec).times(factor), self._beside)

    def _plus(self, other: Any, sign: float) -> Any:
        if not isinstance(other, AsyncOperator) or not self._shares_loss_with(other):
            return NotImplemented
        total = matrix_of(self._spec).plus(matrix_of(other._spec).times(sign))
        if total is None:
            return NotImplemented
        return self._of(total, (*self._beside, *other._beside))

    def _shares_loss_with(self, other: AsyncOperator) -> bool:
        """Whether both are matrices of one function, in the same parameters, computed alike."""
        here, there = self._spec, other._spec
        return (
            self._session is other._session
            and (here.checkpoint, here.data_batch) == (there.checkpoint, there.data_batch)
            and (here.dtype, here.precision) == (there.dtype, there.precision)
            and here.deterministic == there.deterministic
            and self._tensors == other._tensors
        )

    def _of(self, matrix: Matrix, beside: tuple[AsyncVector, ...]) -> AsyncOperator:
        """Another matrix of the same loss; it keeps vectors from going."""
        spec = with_matrix(self._spec, matrix)
        made = AsyncOperator(self._session, spec, self._domain, self._codomain, self._tensors)
        made._beside = beside
        return made

    async def preconditioned(self, d: AsyncVector | Any) -> AsyncOperator:
        """The operator D^-1/2 A D^-1/2 with a positive diagonal D.

        Where A y = λ D y, its eigenpair is λ with D^1/2 y.

        Args:
            d: The diagonal of D, all of it positive: a vector, or real numbers (n,) in numpy, torch
                or lists. It is needed for as long as the operator is used; a job that names it has
                it until the job has ended.

        Returns:
            The operator. A product costs what that of A costs.

        Raises:
            InvalidArgumentError: `VECTOR_SPACE_MISMATCH`, `SHAPE_MISMATCH`, `NON_FINITE`;
                `TERMS_INVALID`: the operator is preconditioned already. `PRECONDITIONER_INVALID` of
                the first product or job: an element is not positive.
        """
        matrix = matrix_of(self._spec)
        if matrix.precondition:
            raise InvalidArgumentError(
                "the operator is preconditioned already; precondition it once, with the product of "
                "both diagonals",
                reason="TERMS_INVALID",
                field="d",
            )
        vector = d if isinstance(d, AsyncVector) else await self.vector(d)
        beside = (*self._beside, vector)
        made = self._of(replace(matrix, precondition=vector.name), beside)
        opened = await open_operator(self._session, made._spec)
        opened._beside = beside
        return opened

    async def restrict(self, *globs: str | Sequence[str]) -> AsyncOperator:
        """The operator on some of its own parameters: these rows and columns of the matrix.

        Args:
            globs: Patterns, one by one or in one list, as `parameters` of `client.operator`; they
                select among the parameters that this operator has.

        Returns:
            An operator whose vectors have the length of the selection. Its products cost what the
            selection needs, and no more.

        Raises:
            InvalidArgumentError: `PARAMETERS_NOT_FOUND`: a pattern selects nothing; the message
                lists the nearest names. `VECTOR_SPACE_MISMATCH`: the operator is preconditioned,
                with a vector of all its parameters; restrict it before.
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

    async def block_diagonal(
        self, by: str | Sequence[Any] | Mapping[str, Any] = "layer"
    ) -> AsyncOperator:
        """The operator without what couples its diagonal blocks, on all of its parameters.

        Law: B(A) v is the sum over the blocks b of the rows b of A v_b, with the part v_b of v. The
        matrix of a sum is the sum of the matrices, and what is preconditioned, damped or shifted
        stays so.

        Args:
            by: How to group the parameters, as for `blocks`; at most 128 blocks.

        Returns:
            The operator. A product takes a product of this operator's for each block.

        Raises:
            InvalidArgumentError: `PARAMETERS_NOT_FOUND`, `PARAMETERS_INVALID` as for `blocks`;
                `BLOCKS_INVALID`: there are too many. `TERMS_INVALID`: the operator is
                block-diagonal already.
            UnimplementedError: `KIND_UNSUPPORTED`: the server is older.
        """
        matrix = matrix_of(self._spec)
        if matrix.blocks is not None:
            raise InvalidArgumentError(
                "the operator is block-diagonal already; take the blocks of the operator that it "
                "was made of",
                reason="TERMS_INVALID",
                field="by",
            )
        with refusals():
            blocks = Partition.of(by)
            check_blocks(blocks, self.parameter_names, "by")
        made = self._of(replace(matrix, blocks=blocks), self._beside)
        opened = await open_operator(self._session, made._spec)
        if not opened._spec.HasField("blocks"):  # or products would be those of the whole matrix
            raise UnimplementedError(
                "the server does not know block-diagonal operators; install this client's version "
                "of it",
                reason="KIND_UNSUPPORTED",
            )
        opened._beside = self._beside
        return opened

    async def load_low_rank(self, path: str | Path) -> LowRankResult[AsyncVector]:
        """Bring a low-rank matrix back to the ranks that `save` has written to a file.

        Args:
            path: The file.

        Returns:
            The matrix, whose vectors this client has made: they are freed with their handles.

        Raises:
            InvalidArgumentError: `FILE_INVALID`: the file holds something else. `SHAPE_MISMATCH`:
                it is of an operator of another order.
            ResourceExhaustedError: `VECTOR_MEMORY`.
        """
        try:
            figures, rows = read_saved(path)
        except (OSError, ValueError) as error:
            raise InvalidArgumentError(str(error), reason="FILE_INVALID", field="path") from error
        vectors = [
            await self.vector(np.asarray(rows[index : index + 1])[0])
            for index in range(rows.get_shape()[0])
        ]
        return LowRankResult(**figures, eigenvectors=vectors)

    def __repr__(self) -> str:
        size, of = f"n={self.shape[0]:,}", f"of {self.checkpoint}{in_words(self.selection)}"
        drawn = f" (seed {self.sample_seed}, {self.num_samples} drawn)" if self.num_samples else ""
        kind = self.kind if " " not in self.kind else f"({self.kind})"
        return f"<{type(self).__name__} {kind}{drawn} {size} {self.dtype} {of}>"
