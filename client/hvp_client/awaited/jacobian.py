"""The Jacobian of a model's outputs as a linear operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from hvp_protos.v1 import operator_pb2

from hvp_client._checkpoints import tensors_from_proto
from hvp_client._selections import in_words
from hvp_client._session import Session
from hvp_client._spaces import VectorSpace
from hvp_client.awaited.linear_map import AsyncLinearMap, describe_operator


async def open_jacobian(session: Session, spec: operator_pb2.OperatorSpec) -> AsyncJacobian:
    """Check a Jacobian on the server and fill in its defaults; see Client.jacobian."""
    answer = await describe_operator(session, spec)
    parameters, outputs = VectorSpace.of_operator(answer)
    tensors = tensors_from_proto(answer.parameters)
    return AsyncJacobian(session, answer.operator, parameters, outputs, tensors)


@final
class AsyncJacobian(AsyncLinearMap):
    """J = ∂(outputs)/∂θ of a model on a batch: products both ways, never a matrix.

    Of a language model the outputs are the logits at every position, whether its label counts or
    not, as vectors (sequences × positions × vocabulary), row-major. `J @ v` is their derivative
    along v, `J.T @ u` the gradient of u·outputs; an `AsyncJacobian`'s products are awaited. Cost:
    3 GEMM passes either way.

    Law: u·(J v) == (Jᵀu)·v, to rounding of `dtype`. What the properties tell does not change while
    the handle lives.
    """

    @property
    def T(self) -> AsyncJacobian:  # noqa: N802 (numpy's name)
        """The transpose, which takes outputs to parameters."""
        return AsyncJacobian(
            self._session,
            self._spec,
            self._codomain,
            self._domain,
            self._tensors,
            transposed=not self._transposed,
        )

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of the outputs: of a language model `(sequences, positions, vocabulary)`."""
        return (self._domain if self._transposed else self._codomain).shape

    async def restrict(self, *globs: str | Sequence[str]) -> AsyncJacobian:
        """The Jacobian in some of its own parameters; all others are constants.

        Args:
            globs: Patterns, one by one or in one list, as `parameters` of `client.operator`; they
                select among the parameters that this Jacobian has.

        Returns:
            The Jacobian of the selection; the restriction of a transpose is a transpose.

        Raises:
            InvalidArgumentError: `PARAMETERS_NOT_FOUND`: a pattern selects nothing; the message
                lists the nearest names.
        """
        found = await open_jacobian(self._session, self._restricted(globs))
        return found.T if self._transposed else found

    def __repr__(self) -> str:
        m, n = self.shape
        of = f"of {self.checkpoint} on {self.batch}{in_words(self.selection)}"
        return f"<{type(self).__name__} ({m:,}, {n:,}) {self.dtype} {of}>"
