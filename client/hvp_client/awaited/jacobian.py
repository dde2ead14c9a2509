"""The Jacobian of a model's outputs as a linear operator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

from hvp_protos.v1 import job_pb2, operator_pb2

from hvp_client._checkpoints import tensors_from_proto
from hvp_client._exceptions import InvalidArgumentError
from hvp_client._selections import in_words
from hvp_client._session import Session
from hvp_client._spaces import VectorSpace
from hvp_client.awaited.asked import AsyncAsked
from hvp_client.awaited.linear_map import describe_operator
from hvp_client.awaited.questions import AsyncJacobianQuestions


async def open_jacobian(session: Session, spec: operator_pb2.OperatorSpec) -> AsyncJacobian:
    """Check a Jacobian on the server and fill in its defaults; see Client.jacobian."""
    answer = await describe_operator(session, spec)
    parameters, outputs = VectorSpace.of_operator(answer)
    tensors = tensors_from_proto(answer.parameters)
    return AsyncJacobian(session, answer.operator, parameters, outputs, tensors)


@final
class AsyncJacobian(AsyncAsked, AsyncJacobianQuestions):
    """J = ∂(output)/∂(input) of a model on a batch: products both ways, never a matrix.

    The output is that of the model, or of a submodule; the input is θ, another submodule's output,
    or the submodule's own input. Of a language model the outputs are the logits at every position,
    whether its label counts or not, as vectors (sequences × positions × vocabulary), row-major.
    `J @ v` is their derivative along v, `J.T @ u` the gradient of u·outputs; an `AsyncJacobian`'s
    products are awaited. Cost: 3 GEMM passes either way, of the part of the model that lies
    between; 2 where the input is no parameter.

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

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of the input: `(n,)` of parameters, or that of the activation."""
        return (self._codomain if self._transposed else self._domain).shape

    @property
    def output(self) -> str:
        """What it is the derivative of: `logits`, or the name of a submodule."""
        return self._spec.output_module or "logits"

    @property
    def input(self) -> str:
        """What it is taken by: `parameters`, the name of a submodule, or `input`."""
        return "input" if self._spec.own_input else self._spec.input_module or "parameters"

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

    async def _create_job(
        self,
        operation: str,
        values: Mapping[str, Any],
        *,
        labels: Mapping[str, str] | None = None,
        validate_only: bool = False,
    ) -> job_pb2.CreateJobResponse:
        if self._transposed:  # the question on the wire is one about J
            raise InvalidArgumentError(
                f"{operation} is asked of a Jacobian and not of its transpose: ask the `.T` of "
                "this transpose, which is the Jacobian; u and v change places",
                reason="OPERATOR_TRANSPOSED",
                field="operator",
            )
        return await super()._create_job(
            operation, values, labels=labels, validate_only=validate_only
        )

    def __repr__(self) -> str:
        m, n = self.shape
        of = f"of {self.checkpoint} on {self.batch}{in_words(self.selection)}"
        if (self.output, self.input) != ("logits", "parameters"):
            of = f"of {self.output} by {self.input} {of}"
        return f"<{type(self).__name__} ({m:,}, {n:,}) {self.dtype} {of}>"
