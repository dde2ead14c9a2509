"""How much two subspaces that eigenvectors span have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Overlap:
    """Inner products of two orthonormal sets of vectors, and what they say of their spans.

    Attributes:
        inner_products: (k, m) float64, of each vector of the one set with each of the other.
    """

    inner_products: NDArray[np.float64]

    @classmethod
    def of(cls, rows: Sequence[NDArray[np.float64]]) -> Overlap:
        """Make it of the inner products of each vector of the one set with all of the other."""
        return cls(np.stack(rows))

    @property
    def cosines(self) -> NDArray[np.float64]:
        """(min(k, m),) cosines of the principal angles between the spans, descending.

        They are singular values (Björck and Golub, "Numerical methods for computing angles between
        linear subspaces", Math. Comp. 27 (1973)); 1 is a direction that both have, 0 one that is
        orthogonal to all of the other span.
        """
        found = np.linalg.svd(self.inner_products, compute_uv=False)
        return np.minimum(found.astype(np.float64), 1.0)

    @property
    def angles(self) -> NDArray[np.float64]:
        """(min(k, m),) principal angles in radians, ascending.

        From cosines, so that angles below the root of the vectors' rounding are not told from zero.
        """
        return np.arccos(self.cosines)

    @property
    def mean_squared_cosine(self) -> float:
        """1 where the smaller span lies in the larger one, 0 where they are orthogonal.

        Of two random spans in n dimensions it is max(k, m) / n.
        """
        return float(np.mean(self.cosines**2))
