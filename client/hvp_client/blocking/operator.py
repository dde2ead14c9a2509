"""The blocking side of `hvp_client.awaited.operator`: made of it by `make sdk`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final, overload

from hvp_operations.low_rank.record import LowRankResult

from hvp_client._selections import in_words
from hvp_client.awaited.operator import AsyncOperator
from hvp_client.blocking.asked import Asked
from hvp_client.blocking.functional import Functional
from hvp_client.blocking.functions import Functions
from hvp_client.blocking.protocols import SymmetricLinearOperator
from hvp_client.blocking.twins import twin_of
from hvp_client.blocking.vector import Vector


@final
class Operator(Functional, Asked, Functions, SymmetricLinearOperator, twin=AsyncOperator):
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

    _twin: AsyncOperator

    @property
    def kind(self) -> str:
        """Which matrix: `hessian`, `ggn` and others as `client.operator` takes them.

        Of a sum it is the formula, such as `2 hessian + 0.001 identity`.
        """
        return self._twin.kind

    @property
    def sample_seed(self) -> int | None:
        """Seed of the labels of a `fisher`; None where no labels are drawn."""
        return self._twin.sample_seed

    @property
    def num_samples(self) -> int | None:
        """Labels that a `fisher` draws for each target; None where no labels are drawn."""
        return self._twin.num_samples

    @property
    def micro_batch_size(self) -> int:
        """Sequences that a rank takes at once; results do not depend on it."""
        return self._twin.micro_batch_size

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

    def __add__(self, other: Operator | Any) -> Operator:
        result: Operator = self._blocking(self._twin.__add__(twin_of(other)))
        return result

    def __radd__(self, other: Operator | Any) -> Operator:
        result: Operator = self._blocking(self._twin.__radd__(twin_of(other)))
        return result

    def __sub__(self, other: Operator | Any) -> Operator:
        result: Operator = self._blocking(self._twin.__sub__(twin_of(other)))
        return result

    def __neg__(self) -> Operator:
        result: Operator = self._blocking(self._twin.__neg__())
        return result

    def __mul__(self, other: float | Any) -> Operator:
        result: Operator = self._blocking(self._twin.__mul__(other))
        return result

    def __rmul__(self, other: float | Any) -> Operator:
        result: Operator = self._blocking(self._twin.__rmul__(other))
        return result

    def __truediv__(self, other: float | Any) -> Operator:
        result: Operator = self._blocking(self._twin.__truediv__(other))
        return result

    def preconditioned(self, d: Vector | Any) -> Operator:
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
        result: Operator = self._wait(self._twin.preconditioned(twin_of(d)))
        return result

    def restrict(self, *globs: str | Sequence[str]) -> Operator:
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

    def block_diagonal(self, by: str | Sequence[Any] | Mapping[str, Any] = "layer") -> Operator:
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
        result: Operator = self._wait(self._twin.block_diagonal(by))
        return result

    def load_low_rank(self, path: str | Path) -> LowRankResult[Vector]:
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
        result: LowRankResult[Vector] = self._wait(self._twin.load_low_rank(path))
        return result

    def __repr__(self) -> str:
        size, of = (f"n={self.shape[0]:,}", f"of {self.checkpoint}{in_words(self.selection)}")
        drawn = f" (seed {self.sample_seed}, {self.num_samples} drawn)" if self.num_samples else ""
        kind = self.kind if " " not in self.kind else f"({self.kind})"
        return f"<{type(self).__name__} {kind}{drawn} {size} {self.dtype} {of}>"
