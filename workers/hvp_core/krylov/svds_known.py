"""Singular triplets that an earlier search has verified, and how another one begins with them.

Where all residuals Av − σu and Aᵀu − σv of triplets (U, Σ, V) are small they are those of a matrix
A' = A − R₁Vᵀ − UR₂ᵀ(I − VVᵀ) near A: A'V = UΣ and A'ᵀU = VΣ, because UᵀR₁ and R₂ᵀV are the same
(Kahan, Parlett and Jiang, "Residual bounds on approximate eigensystems of nonnormal matrices", SIAM
J. Numer. Anal. 19 (1982)). And what a fresh run goes on, (I − UUᵀ) A (I − VVᵀ), is the same matrix
of A and of A'. So such triplets are taken for the first vectors of the bases without a product: of
A' they leak nothing, and what is then shown complete is shown of A', whose singular values are
those of A to ‖R₁‖ + ‖R₂‖. (With other right vectors X in the bases, whose products are A's, it is
shown of A − R₁Vᵀ − UR₂ᵀ(I − VVᵀ − XXᵀ), which is as near.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from hvp_operations.svds import SvdsResult
from torch import Tensor

from hvp_core.krylov.bidiagonal_basis import BidiagonalBasis
from hvp_core.krylov.orthogonality import combinations
from hvp_core.vectors.vector_space import VectorSpace

#: Triplets are settled if all together are off by this part of the tolerance on either side.
_SETTLED = 1 / 4


@final
@dataclass(frozen=True)
class Triplets:
    """Singular triplets of an earlier search.

    Attributes:
        result: Its figures.
        left: Singular vectors on the side that has the longer ones, (local,) each; read only.
        right: Those on the other side.
    """

    result: SvdsResult
    left: Sequence[Tensor]
    right: Sequence[Tensor]

    def begin(self, domain: VectorSpace, basis: BidiagonalBasis, tol: float) -> float:
        """Begin bases with the triplets that are settled, and go on from the sum of the others.

        Args:
            domain: Space of the right vectors.
            basis: Bases without a product.
            tol: The largest residual that counts as converged, relative to the largest value; with
                0 none is settled.

        Returns:
            ‖R₁‖ + ‖R₂‖ of those that are settled, or more.

        Raises:
            CurvatureError: NON_FINITE.
        """
        result, count = self.result, len(self.result.singular_values)
        scale = max(result.singular_values)
        if not scale:  # vectors of the matrix 0 show nothing of it
            return 0.0
        most = _SETTLED * tol * scale / math.sqrt(count) if result.error_bounds else 0.0
        both = list(zip(result.residuals, result.transposed_residuals, strict=True))
        settled = [index for index in range(count) if max(both[index]) < most]
        settled = settled[: min(len(basis.B), basis.dimension) - 1]  # a step has to follow
        others = [self.right[index] for index in range(count) if index not in settled]
        basis.settle(
            domain,
            [result.singular_values[index] for index in settled],
            [self.left[index] for index in settled],
            [self.right[index] for index in settled],
            combinations(domain, others, 1)[0] if others else None,
        )
        return sum(math.hypot(*(both[index][side] for index in settled)) for side in (0, 1))
