"""Random directions to compare derivatives along, and when two derivatives along one agree."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hvp_core.autodiff.reference import Params
from hvp_core.vectors.space import partial_products

#: Error that a number of size one may have. A derivative below its root times the largest one is
#: weighed as if it were that large: rounding is of that size.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
_LARGE = 1 << 24  # parameters of a block: 128 MiB in float64, four times over


def comparison_dtype(p: Params) -> torch.dtype:
    """The dtype in which a block is compared."""
    numel = sum(each.numel() for each in p.values())
    narrow = all(each.dtype != torch.float64 for each in p.values())
    return torch.float32 if narrow and numel > _LARGE else torch.float64


def noise_like(like: Tensor, seed: int) -> Tensor:
    """A contiguous tensor of this shape, dtype and device, Gaussian by seed.

    It is drawn in float32, which takes a quarter of float64's time: any direction will do.
    """
    generator = torch.Generator(like.device).manual_seed(seed)
    drawn = torch.empty(like.shape, dtype=torch.float32, device=like.device)
    return drawn.normal_(generator=generator).to(like.dtype)


def random_direction(p: Params, seed: int) -> dict[str, Tensor]:
    """A Gaussian tensor for each of these parameters, by name."""
    return {name: noise_like(each, seed + place) for place, (name, each) in enumerate(p.items())}


def weighed_directions(found: Sequence[Tensor], turn: int) -> list[Tensor]:
    """Directions along which each of these derivatives counts about as much as the others.

    Args:
        found: Derivatives; their directions are Gaussian, divided by the derivatives' norms.
        turn: Number of the comparison; each has directions of its own.
    """
    sizes = [norm(each) for each in found]
    known = [size for size in sizes if math.isfinite(size)]
    seed = 20 + 10_000 * turn
    directions = [noise_like(each, seed + place) for place, each in enumerate(found)]
    if len(known) == len(sizes):
        for each, direction, size in zip(found, directions, sizes, strict=True):
            least = max(known) * math.sqrt(tolerance_of(each))
            direction /= max(size, least, 1e-3)
    return directions


def inner_product(found: Sequence[Tensor], directions: Sequence[Tensor]) -> float:
    """Σ ⟨u, x⟩ over pairs of tensors, summed in float64."""
    return sum(
        float(partial_products(u.reshape(1, -1), x.reshape(-1)))
        for u, x in zip(directions, found, strict=True)
    )


def tolerance_of(x: Tensor) -> float:
    """The error that a number of size one may have, in this tensor's dtype."""
    return _TOLERANCE.get(x.dtype, 1e-2)  # a block may round to 16 bits by itself


def are_close(found: Tensor, expected: Tensor) -> bool:
    """Whether a value is the expected one to rounding, or the expected one is no number."""
    size = norm(expected)
    if not math.isfinite(size):
        return True  # the data's fault, not the trace's; the walk says which block
    # False where only the trace has no number.
    return norm(found - expected) <= tolerance_of(found) * max(size, 1e-3)


def norm(x: Tensor) -> float:
    """The Euclidean norm of all elements."""
    return float(torch.linalg.vector_norm(x))
