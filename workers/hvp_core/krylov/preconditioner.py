"""Preconditioners of (A + λI) x = b that are made of given vectors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import final

import torch
from torch import Tensor

from hvp_core.errors import CurvatureError
from hvp_core.krylov.orthogonality import finite
from hvp_core.linop.preconditioner import Preconditioner
from hvp_core.vectors.vector_space import VectorSpace

#: Vectors whose ‖UᵀU − I‖₂ is more than this were not meant as orthonormal; rounding to float32, of
#: thousands of elements or billions, leaves 1e-6.
_ORTHONORMAL = 1e-3


@final
class LowRankPreconditioner(Preconditioner):
    """P = U (Λ + λ) Uᵀ / (λ_k + λ) + (I − UUᵀ), with λ_k the least of the eigenvalues Λ.

    On the span of U it is A + λI as far as U Λ Uᵀ is A, up to the factor 1 / (λ_k + λ), which
    changes no step of a Krylov method; elsewhere it is I (Frangella, Tropp and Udell, "Randomized
    Nyström preconditioning", SIAM J. Matrix Anal. Appl. 44 (2023)). Where rounding has left U not
    quite orthonormal, U (UᵀU)^(-1/2) is in its place: then P⁻¹ is positive definite, however large
    its condition.

    Cost: k (k + 1) / 2 inner products once; 4 k n multiplications and one vector for each call.

    Args:
        space: Space of the vectors.
        vectors: U, k orthonormal vectors (local,).
        values: Λ, k numbers, with λ above 0 each.
        damping: λ.
    """

    def __init__(
        self,
        space: VectorSpace,
        vectors: Sequence[Tensor],
        values: Sequence[float],
        damping: float,
    ):
        self._space, self._vectors = space, vectors
        self._values = torch.tensor(values, dtype=torch.float64) + damping

    def prepare(self) -> None:
        """See Preconditioner."""
        _ = self._factors

    @cached_property
    def _factors(self) -> Tensor:
        """M (k, k) with P⁻¹ = I − U M Uᵀ."""
        gram = finite(
            torch.stack([self._space.dots_of(self._vectors, each) for each in self._vectors])
        )
        values, vectors = self._space.agree(tuple(torch.linalg.eigh((gram + gram.T) / 2)))
        defect = float((values - 1).abs().max())
        if defect > _ORTHONORMAL:
            raise CurvatureError(
                "VECTORS_NOT_ORTHONORMAL",
                f"the {len(self._vectors)} vectors of the preconditioner are not orthonormal: UᵀU "
                f"is {defect:.2g} from the identity; take those of one result, in its order",
                {"distance": f"{defect:.6g}"},
            )
        root = vectors / values.sqrt() @ vectors.T
        taken = 1 - self._values.min() / self._values
        factors: Tensor = root * taken @ root
        return factors

    def __call__(self, vector: Tensor) -> Tensor:
        """See Preconditioner."""
        parts = self._factors @ finite(self._space.dots_of(self._vectors, vector))
        product = vector.clone()
        for part, each in zip(parts.tolist(), self._vectors, strict=True):
            product.add_(each, alpha=-part)
        return product

    def __str__(self) -> str:
        return f"low rank, {len(self._vectors)} vectors"


@final
class DiagonalPreconditioner(Preconditioner):
    """diag(d) + λI.

    Cost: one vector that stays, and one for each call.

    Args:
        space: Space of the vectors.
        diagonal: d (local,), dᵢ ≥ 0.
        damping: λ, with dᵢ + λ > 0.
    """

    def __init__(self, space: VectorSpace, diagonal: Tensor, damping: float):
        self._space, self._diagonal, self._damping = space, diagonal, damping

    def prepare(self) -> None:
        """See Preconditioner."""
        d = self._diagonal
        good = (d >= 0) & (d + self._damping > 0) & d.isfinite()
        # A rank's part is padded by zeros, which are no elements: with λ > 0 they count as good.
        most = self._space.dimension
        if self._damping > 0:
            most = self._number(torch.ones_like(d))
        wrong = most - self._number(good.to(d))
        if wrong:
            least = f" and above {-self._damping:g}" if self._damping < 0 else ""
            positive = "0 or more" if self._damping > 0 else f"above 0{least}"
            raise CurvatureError(
                "PRECONDITIONER_NOT_POSITIVE",
                f"{wrong} of {self._space.dimension} elements of the preconditioner's diagonal are "
                f"negative, zero or not finite; with a damping of {self._damping:g} each has to be "
                f"{positive}",
                {"elements": str(wrong)},
            )

    def _number(self, mask: Tensor) -> int:
        return round(float(self._space.dots(mask.unsqueeze(0), mask)[0]))

    @cached_property
    def _inverse(self) -> Tensor:
        damped = self._diagonal + self._damping
        return torch.where(damped > 0, damped.reciprocal(), 0)

    def __call__(self, vector: Tensor) -> Tensor:
        """See Preconditioner."""
        return self._inverse * vector

    def __str__(self) -> str:
        return "diagonal"
