"""The blocking side of `hvp_client.awaited.jacobian`: made of it by `make sdk`."""

from __future__ import annotations

from typing import final

from hvp_client.awaited.jacobian import AsyncJacobian
from hvp_client.blocking.linear_map import LinearMap


@final
class Jacobian(LinearMap, twin=AsyncJacobian):
    """J = ∂(outputs)/∂θ of a model on a batch: products both ways, never a matrix.

    Of a language model the outputs are the logits at every position, whether its label counts or
    not, as vectors (sequences × positions × vocabulary), row-major. `J @ v` is their derivative
    along v, `J.T @ u` the gradient of u·outputs; an `AsyncJacobian`'s products are awaited. Cost:
    3 GEMM passes either way.

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
        """`(sequences, positions, vocabulary)`."""
        return self._twin.output_shape

    def __repr__(self) -> str:
        m, n = self.shape
        of = f"of {self.checkpoint} on {self.batch}"
        return f"<{type(self).__name__} ({m:,}, {n:,}) {self.dtype} {of}>"
