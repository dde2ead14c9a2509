"""A check of the products that a run makes anyway: u·Av = v·Au, or u·Jv = v·Jᵀu."""

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
    """Compares the first products of an operator, each with the last: u·Av with v·Aᵀu.

    What a run multiplies next is most often made of its last product, as in Lanczos and in
    conjugate gradients, and of a Jacobian with the transpose of the one before. Then u·Av is soon
    of the size of Av, and a wrong kernel shows: in the real dtype, with the real kernels, and
    without a product more. Cost: two vectors until the check is over.

    Args:
        domain: Space of the vectors that the operator takes.
        noise: Relative error of one product where that is more than rounding; else 0.
        codomain: Space of its products; None for a symmetric operator, which is its own transpose.
    """

    NUM_VECTORS: ClassVar[int] = 2  # that are held until the check is over

    def __init__(self, domain: VectorSpace, noise: float, codomain: VectorSpace | None = None):
        self._domain, self._codomain = domain, codomain or domain
        self._symmetric = codomain is None
        self._allowed = _ROUNDOFFS * torch.finfo(domain.dtype).eps + _NOISES * noise
        self._last: tuple[Tensor, Tensor, bool] | None = None
        self._left = _LOOKS

    def see(self, vector: Tensor, product: Tensor, *, transposed: bool = False) -> None:
        """Take a look at a product.

        Args:
            vector: v, (local,).
            product: Av or, transposed, Aᵀv, (local,).
            transposed: The product is one with the transpose.

        Raises:
            CurvatureError: SYMMETRY_BROKEN.
        """
        if self._left == 0:
            return
        self._left -= 1
        before, self._last = self._last, None
        if self._left > 0:
            self._last = vector.clone(), product.clone(), transposed
        # Two products the same way of an operator that is not symmetric say nothing together.
        if before is not None and (self._symmetric or before[2] != transposed):
            u, of_u, _ = before
            spaces = self._domain, self._codomain
            self._compare(*(spaces[::-1] if transposed else spaces), vector, product, u, of_u)

    def _compare(
        self,
        domain: VectorSpace,
        codomain: VectorSpace,
        v: Tensor,
        of_v: Tensor,
        u: Tensor,
        of_u: Tensor,
    ) -> None:
        """Compare u·Av with v·Aᵀu; v and Aᵀu are of the domain, u and Av of the codomain."""
        here, there = _dot(codomain, u, of_v), _dot(domain, v, of_u)
        size = max(
            _norm(codomain, u) * _norm(codomain, of_v), _norm(domain, v) * _norm(domain, of_u)
        )
        defect = abs(here - there) / size if size else 0.0
        if defect > self._allowed:
            names = ("u·Av", "v·Au") if self._symmetric else ("u·Jv", "v·Jᵀu")
            raise CurvatureError(
                "SYMMETRY_BROKEN",
                f"{names[0]} = {here:.6g} and {names[1]} = {there:.6g} differ by {defect:.1e} of "
                f"the products' size, and rounding explains {self._allowed:.1e}: a kernel or the "
                "model's own code computes something else than derivatives; `hvp verify` says "
                "more, and precision `full` or dtype float64 may avoid it",
                {"defect": f"{defect:.3e}", "allowed": f"{self._allowed:.3e}"},
            )


def _dot(space: VectorSpace, left: Tensor, right: Tensor) -> float:
    return float(space.dots(left.unsqueeze(0), right)[0])


def _norm(space: VectorSpace, vector: Tensor) -> float:
    return math.sqrt(_dot(space, vector, vector))
