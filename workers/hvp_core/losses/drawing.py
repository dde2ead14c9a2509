"""Draws from the distributions that outputs stand for, made of uniform numbers."""

from __future__ import annotations

import math

import torch

_AT_ONCE = 1 << 24  # probabilities in float64


def draw_classes(logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Classes with the probabilities softmax(z), by inversion of their sums in float64.

    Args:
        logits: z, (m, C).
        uniform: Numbers between 0 and 1, float64 (m, S).

    Returns:
        S classes for each row, int64 (m, S). A class without probability is never drawn.
    """
    found = torch.empty(uniform.shape, dtype=torch.int64, device=logits.device)
    step = max(1, _AT_ONCE // logits.shape[-1])
    for start in range(0, len(logits), step):
        here = slice(start, start + step)
        sums = logits[here].double().softmax(-1).cumsum(-1)
        found[here] = torch.searchsorted(sums, uniform[here] * sums[:, -1:], right=True)
    return found.clamp_(max=logits.shape[-1] - 1)


def draw_gaussian(mean: torch.Tensor, variance: float, uniform: torch.Tensor) -> torch.Tensor:
    """Gaussian numbers, by Box and Muller.

    Args:
        mean: Means of any shape.
        variance: The variance of all.
        uniform: Numbers between 0 and 1, float64, shaped as the means with (S, 2) behind.

    Returns:
        S numbers for each mean, in one more dimension (..., S), of the means' dtype.
    """
    radius = torch.sqrt(-2 * variance * torch.log(uniform[..., 0]))
    noise = radius * torch.cos(2 * math.pi * uniform[..., 1])
    return (mean.double().unsqueeze(-1) + noise).to(mean.dtype)
