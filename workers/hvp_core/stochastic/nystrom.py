"""Randomised Nyström approximation of a semidefinite operator, from its products alone.

With l random vectors Ω and Y = AΩ, Â = Y (ΩᵀY)⁻¹ Yᵀ is semidefinite, at most A, and A itself where
A's rank is at most l. It is computed for A + νI with a ν above the rounding of products, which is
taken off the eigenvalues at the end (Tropp, Yurtsever, Udell and Cevher, "Fixed-rank approximation
of a positive-semidefinite matrix from streaming data", NeurIPS 30 (2017); Frangella, Tropp and
Udell, "Randomized Nyström preconditioning", SIAM J. Matrix Anal. Appl. 44 (2023)). Here Y + νΩ = QR
with an orthonormal Q is factored in place, and all else is small matrices: with the eigenpairs
(D, V) of Ωᵀ(Y + νΩ), the singular values σ of R V D^(-1/2) and its left vectors P give
Â = QP max(σ² − ν, 0) (QP)ᵀ. Ω is never held: each vector of it is drawn again from its seed.

An approximation A_k ≤ A is made better by that of the rest A − A_k, which is semidefinite too: the
sum is at most A, and A − (A_k + B̂) = (A − A_k) − B̂ has the error of Nyström's method on the rest.
Without a truncation it would be the approximation of both sketches together (the Schur complement
of a Schur complement is that of the whole), so that no product of the first one is taken again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from hvp_core.errors import CurvatureError
from hvp_core.krylov.krylov_basis import rotate
from hvp_core.krylov.orthogonality import finite, finite_dots, finite_norm, orthogonalise, rounding
from hvp_core.vectors.vector_space import VectorSpace

#: Combinations of random vectors whose form with A + νI is this part of ν are left out: they are
#: nearly dependent, and rounding is all that they show.
_NEGLIGIBLE = 1e-2
_MOST_PASSES = 20  # of a vector against the basis, before one keeps its length


@final
@dataclass(frozen=True)
class Factors:
    """An approximation in factors; its vectors are the first rows of the sketch.

    Attributes:
        eigenvalues: Ascending, (k,) float64.
        shift: ν.
        orthogonality: ‖UᵀU − I‖₂.
    """

    eigenvalues: Tensor
    shift: float
    orthogonality: float


def factored(
    space: VectorSpace,
    rows: Tensor,
    k: int,
    draw: Callable[[int], Tensor],
    noise: float,
    rounded_by: float = 0.0,
) -> Factors:
    """Make the k leading eigenvectors of Â of products with random vectors, in place.

    Cost: about 7 l² n multiplications, and one vector of memory.

    Args:
        space: Space of the vectors.
        rows: Y, the products (l, local), l ≤ n; the first k of them become the eigenvectors.
        k: Number of eigenpairs, k ≤ l.
        draw: Gives the vector (local,) of Ω of an index, of norm 1.
        noise: Relative error of a product where that is more than rounding; else 0.
        rounded_by: What the rounding of the products goes by, where they are differences of larger
            vectors: the root of the sum of these vectors' squared norms.

    Raises:
        CurvatureError: NON_FINITE.
    """
    size = math.sqrt(sum(finite_norm(space, row) ** 2 for row in rows))
    size = max(size, rounded_by)
    shift = max(rounding(torch.finfo(rows.dtype).eps), noise) * size
    if not size:  # nothing is known of an operator of zero but that it is zero
        for index, row in enumerate(rows):
            row.copy_(draw(index))
        orthonormalise(space, rows)
        distance = distance_from_orthonormal(space, rows[:k])
        return Factors(torch.zeros(k, dtype=torch.float64), shift, distance)
    core = _shifted(space, rows, draw, shift)
    r = orthonormalise(space, rows)
    forms, vectors = torch.linalg.eigh(core)
    kept = forms > _NEGLIGIBLE * shift
    root = r @ (vectors[:, kept] / forms[kept].sqrt())
    p, sigma, _ = space.agree(tuple(torch.linalg.svd(root)))
    eigenvalues = torch.zeros(len(rows), dtype=torch.float64)
    eigenvalues[: len(sigma)] = (sigma.square() - shift).clamp_min(0)
    rotate(rows, p[:, :k].flip(1))
    return Factors(eigenvalues[:k].flip(0), shift, distance_from_orthonormal(space, rows[:k]))


def joined(space: VectorSpace, rows: Tensor, first: Tensor, second: Tensor, k: int) -> Tensor:
    """Make the k leading eigenvectors of a sum of two low-rank matrices, in place.

    Cost: about 4 l² n multiplications for l vectors, and one vector of memory.

    Args:
        space: Space of the vectors.
        rows: Orthonormal eigenvectors of the one matrix and then of the other, (l, local), l ≤ n;
            the first k of them become those of the sum.
        first: Eigenvalues of the one matrix, float64.
        second: Those of the other.
        k: Number of eigenpairs, k ≤ l.

    Returns:
        The eigenvalues, ascending, (k,) float64.

    Raises:
        CurvatureError: NON_FINITE.
    """
    r = orthonormalise(space, rows)
    core = (r * torch.cat((first, second))) @ r.T
    values, vectors = space.agree(tuple(torch.linalg.eigh(core)))
    rotate(rows, vectors[:, -k:])
    leading: Tensor = values[-k:].clamp_min(0)
    return leading


def _shifted(
    space: VectorSpace, rows: Tensor, draw: Callable[[int], Tensor], shift: float
) -> Tensor:
    """Add νΩ to the products Y, and give Ωᵀ(Y + νΩ), (l, l) float64."""
    core = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for index, row in enumerate(rows):
        vector = draw(index)
        row.add_(vector, alpha=shift)
        dots = finite_dots(space, rows[: index + 1], vector)
        core[: index + 1, index] = core[index, : index + 1] = dots
    return core


def orthonormalise(space: VectorSpace, rows: Tensor) -> Tensor:
    """Make vectors orthonormal in place, each against those before it.

    Args:
        space: Space of the vectors.
        rows: The vectors, (l, local), l ≤ n; they become Q, with the old ones QR.

    Returns:
        R, upper triangular, (l, l) float64.

    Raises:
        CurvatureError: NON_FINITE: an inner product is not finite, or a vector is zero.
    """
    r = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    rest = torch.empty_like(rows[0])
    for index, row in enumerate(rows):
        size = finite_norm(space, row)
        for _ in range(_MOST_PASSES):
            before = size
            first, second = orthogonalise(space, rows[:index], row, out=rest)
            r[:index, index] += first + second
            row.copy_(rest)
            size = finite_norm(space, row)
            if 2 * size > before or not size:  # it kept its length: orthogonal to rounding
                break
        if not size:
            raise CurvatureError(
                "NON_FINITE",
                f"vector {index} of {len(rows)} has no part outside those before it: products are "
                "wrong, or underflow; use float64",
            )
        r[index, index] = size
        row.div_(size)
    return r


def distance_from_orthonormal(space: VectorSpace, rows: Tensor) -> float:
    """‖UᵀU − I‖₂ of vectors (k, local).

    Raises:
        CurvatureError: NON_FINITE.
    """
    gram = torch.stack([finite_dots(space, rows, row) for row in rows])
    defect = finite(gram) - torch.eye(len(rows), dtype=torch.float64)
    return float(space.agree(float(torch.linalg.matrix_norm(defect, 2))))
