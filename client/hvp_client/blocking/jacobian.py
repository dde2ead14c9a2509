"""The blocking side of `hvp_client.awaited.jacobian`: made of it by `make sdk`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from hvp_client._selections import in_words
from hvp_client.awaited.jacobian import AsyncJacobian
from hvp_client.blocking.asked import Asked
from hvp_client.blocking.questions import JacobianQuestions


@final
class Jacobian(Asked, JacobianQuestions, twin=AsyncJacobian):
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

    _twin: AsyncJacobian

    @property
    def T(self) -> Jacobian:
        """The transpose, which takes outputs to parameters."""
        result: Jacobian = self._blocking(self._twin.T)
        return result

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of the outputs: of a language model `(sequences, positions, vocabulary)`."""
        return self._twin.output_shape

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of the input: `(n,)` of parameters, or that of the activation."""
        return self._twin.input_shape

    @property
    def output(self) -> str:
        """What it is the derivative of: `logits`, or the name of a submodule."""
        return self._twin.output

    @property
    def input(self) -> str:
        """What it is taken by: `parameters`, the name of a submodule, or `input`."""
        return self._twin.input

    def restrict(self, *globs: str | Sequence[str]) -> Jacobian:
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
        result: Jacobian = self._wait(self._twin.restrict(*globs))
        return result

    def __repr__(self) -> str:
        m, n = self.shape
        of = f"of {self.checkpoint} on {self.batch}{in_words(self.selection)}"
        if (self.output, self.input) != ("logits", "parameters"):
            of = f"of {self.output} by {self.input} {of}"
        return f"<{type(self).__name__} ({m:,}, {n:,}) {self.dtype} {of}>"
