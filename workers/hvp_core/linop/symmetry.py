"""A check of the products that a run makes anyway: u·Av = v·Au."""

from __future__ import annotations

import math
from typing import ClassVar, final

import torch
from torch import Tensor

from hvp_core.errors import CurvatureError
from hvp_core.vectors.vector_space import VectorSpace

#: Units of roundoff of the vectors' dtype, and of the products' own precision, that the two numbers
#: may differ by, relative to the products' norms. Errors of many operations add up as in a random
#: walk. [meas] float32, SmolLM2-135M: less than one unit; bfloat16, 96 tiny decoders with weights
#: of several sizes: 3 at most, and of a deep model more are to be expected.
_ROUNDOFFS, _NOISES = 200, 64
_LOOKS = 6  # products that are looked at


@final
class SymmetryCheck:
    """Compares the first products of an operator that is known to be symmetric, each with the last.

    What a run multiplies next is most often made of its last product, as in Lanczos and in
    conjugate gradients. Then u·Av is soon of the size of Av, and a wrong kernel shows: in the real
    dtype, with the real kernels, and without a product more. Cost: two vectors until the check is
    over.

    Args:
        space: Space of the vectors.
        noise: Relative error of one product where that is more than rounding; else 0.
    """

    NUM_VECTORS: ClassVar[int] = 2  # that are held until the check is over

    def __init__(self, space: VectorSpace, noise: float):
        self._space = space
        self._allowed = _ROUNDOFFS * torch.finfo(space.dtype).eps + _NOISES * noise
        self._last: tuple[Tensor, Tensor] | None = None
        self._left = _LOOKS

    def see(self, vector: Tensor, product: Tensor) -> None:
        """Take a look at a product.

        Args:
            vector: v, (local,).
            product: Av, (local,).

        Raises:
            CurvatureError: SYMMETRY_BROKEN.
        """
        if self._left == 0:
            return
        self._left -= 1
        before, self._last = self._last, None
        if self._left > 0:
            self._last = vector.clone(), product.clone()
        if before is not None:
            self._compare(*before, vector, product)

    def _compare(self, u: Tensor, of_u: Tensor, vector: Tensor, product: Tensor) -> None:
        here, there = self._dot(u, product), self._dot(vector, of_u)
        size = max(
            self._norm(u) * self._norm(product),
            self._norm(vector) * self._norm(of_u),
        )
        defect = abs(here - there) / size if size else 0.0
        if defect > self._allowed:
            raise CurvatureError(
                "SYMMETRY_BROKEN",
                f"u·Av = {here:.6g} and v·Au = {there:.6g} differ by {defect:.1e} of the products' "
                f"size, and rounding explains {self._allowed:.1e}: a kernel or the model's own "
                "code computes something else than derivatives; `hvp verify` says more, and "
                "precision `full` or dtype float64 may avoid it",
                {"defect": f"{defect:.3e}", "allowed": f"{self._allowed:.3e}"},
            )

    def _dot(self, left: Tensor, right: Tensor) -> float:
        return float(self._space.dots(left.unsqueeze(0), right)[0])

    def _norm(self, vector: Tensor) -> float:
        return math.sqrt(self._dot(vector, vector))
