"""Inner products that are finite, and what a vector has outside of orthonormal ones.

Vectors are made orthogonal to all before them, twice ("twice is enough": Parlett, "The Symmetric
Eigenvalue Problem", section 6.9).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hvp_core.errors import CurvatureError
from hvp_core.vectors.vector_space import VectorSpace

#: eps to this power is what rounding leaves of a vector that should vanish, relative to ‖T‖: 1e-6
#: in float32, 5e-14 in float64. A smaller β means that the Krylov space is exhausted.
_ROUNDING_POWER = 0.85
_PASSES = 3  # of a vector that is no product against the others
_MOST_STARTS = 20  # random vectors looked at before one keeps its length


def rounding(eps: float) -> float:
    """The norm that errors of eps leave of a vector that should vanish, relative to ‖A‖."""
    return float(eps**_ROUNDING_POWER)


def finite_dots(space: VectorSpace, rows: Tensor, vector: Tensor) -> Tensor:
    """Inner products (m,) float64 of the vectors in `rows` (m, local) with `vector` (local,).

    Raises:
        CurvatureError: NON_FINITE: an inner product is infinite or NaN.
    """
    return finite(space.dots(rows, vector))


def finite(numbers: Tensor) -> Tensor:
    """Numbers that are made of products, if none is infinite or NaN.

    Raises:
        CurvatureError: NON_FINITE.
    """
    if not bool(numbers.isfinite().all()):
        raise CurvatureError(
            "NON_FINITE",
            "an inner product is not finite: a product with the operator overflows or is NaN; use "
            "float64 or full precision",
        )
    return numbers


def finite_norm(space: VectorSpace, vector: Tensor) -> float:
    """Euclidean norm of a whole vector.

    Raises:
        CurvatureError: NON_FINITE.
    """
    return math.sqrt(float(finite_dots(space, vector.unsqueeze(0), vector)[0]))


def orthogonalise(
    space: VectorSpace, known: Tensor, w: Tensor, *, out: Tensor
) -> tuple[Tensor, Tensor]:
    """Take a vector's parts along orthonormal vectors out of it, twice.

    Args:
        space: Space of the vectors.
        known: The orthonormal vectors, (m, local).
        w: The vector, (local,); read only.
        out: Takes the rest of the vector, (local,).

    Returns:
        The coefficients (m,) float64 of the first pass, and of the second.

    Raises:
        CurvatureError: NON_FINITE.
    """
    first = finite_dots(space, known, w)
    torch.addmv(w, known.T, first.to(w), alpha=-1, out=out)
    second = finite_dots(space, known, out)
    out.addmv_(known.T, second.to(w), alpha=-1)
    return first, second


def part_outside(space: VectorSpace, known: Tensor, vector: Tensor) -> Tensor | None:
    """What a vector has outside of orthonormal ones, of norm 1; None if that is only rounding.

    Args:
        space: Space of the vectors.
        known: The orthonormal vectors, (m, local).
        vector: The vector, (local,); read only.

    Raises:
        CurvatureError: NON_FINITE.
    """
    w = vector.clone()
    return w if leave_outside(space, known, w) else None


def leave_outside(space: VectorSpace, known: Tensor, w: Tensor) -> bool:
    """Leave of a vector what it has outside of orthonormal ones, of norm 1, in its own place.

    Args:
        space: Space of the vectors.
        known: The orthonormal vectors, (m, local).
        w: The vector, (local,); takes the result.

    Returns:
        Whether there is more outside than rounding; if not, the vector holds nothing of use.

    Raises:
        CurvatureError: NON_FINITE.
    """
    norm = finite_norm(space, w)
    if norm == 0:
        return False
    w.div_(norm)
    for _ in range(_PASSES):
        w.addmv_(known.T, finite_dots(space, known, w).to(w), alpha=-1)
        left = finite_norm(space, w)
        if left <= rounding(torch.finfo(w.dtype).eps):
            return False
        w.div_(left)
    return True


def combinations(space: VectorSpace, vectors: Sequence[Tensor], count: int) -> list[Tensor]:
    """Combinations of vectors that are scaled to norm 1: their sum, and others.

    The weights are those of a discrete cosine transform.

    Args:
        space: Space of the vectors.
        vectors: (local,) each, not zero; read only.
        count: Number of combinations.

    Returns:
        The combinations, (local,) each.

    Raises:
        CurvatureError: NON_FINITE.
    """
    found = [space.zeros() for _ in range(count)]
    for place, vector in enumerate(vectors):
        norm = finite_norm(space, vector)
        for wave, combination in enumerate(found):
            weight = math.cos(math.pi * (place + 0.5) * wave / len(vectors))
            combination.add_(vector, alpha=weight / norm)
    return found


def distance(space: VectorSpace, vectors: Sequence[Tensor], w: Tensor) -> float:
    """The norm of what a vector has outside of the span of others.

    Args:
        space: Space of the vectors.
        vectors: (local,) each; read only.
        w: The vector, (local,); read only.

    Raises:
        CurvatureError: NON_FINITE.
    """
    products = [
        torch.cat([finite_dots(space, each[None], other) for each in vectors])
        for other in (*vectors, w)
    ]
    inverse = space.agree(torch.linalg.pinv(torch.stack(products[:-1]), hermitian=True))
    rest = w.clone()
    for weight, vector in zip((inverse @ products[-1]).tolist(), vectors, strict=True):
        rest.add_(vector, alpha=-weight)
    return finite_norm(space, rest)


def random_outside(
    space: VectorSpace, known: Tensor, draw: Callable[[int], Tensor], index: int
) -> tuple[Tensor, int]:
    """A random vector of norm 1, orthogonal to orthonormal ones.

    Args:
        space: Space of the vectors.
        known: The orthonormal vectors, (m, local).
        draw: Gives the random vector (local,) of an index.
        index: Index of the first one that may be taken.

    Returns:
        The vector (local,), and the index of the random vector that it was made of.

    Raises:
        CurvatureError: NON_FINITE: an inner product is not finite, or no random vector has a part
            outside.
    """
    for number in range(index, index + _MOST_STARTS):
        w = draw(number)
        norm = finite_norm(space, w)
        for _ in range(_PASSES if len(known) else 0):
            w = w / norm
            w.addmv_(known.T, finite_dots(space, known, w).to(w), alpha=-1)
            norm = finite_norm(space, w)
        if norm > 0.5 or not len(known):  # it kept its length: orthogonal to rounding
            return w / norm, number
    raise CurvatureError(
        "NON_FINITE",
        f"none of {_MOST_STARTS} random vectors has a part outside {len(known)} basis vectors of a "
        f"space of {space.dimension} dimensions: inner products are wrong; use float64",
    )
