"""The choice of the kernels that compute an attention."""

from __future__ import annotations

import functools
import logging

import torch

from hvp_core.attention.flash import Flash
from hvp_core.attention.rule import Attention, Pattern, Qkv, Span
from hvp_core.attention.tiled import Tiled
from hvp_core.settings import Precision

logger = logging.getLogger(__name__)
_said: set[str] = set()


def choose(x: Qkv, pattern: Pattern, span: Span | None, precision: Precision) -> Attention:
    """Triton kernels where the device and the shape allow them, else plain torch in tiles.

    Args:
        x: Query, key and value; only their shapes, dtypes and devices matter.
        pattern: Pattern of the mask, with scale and cap of the scores.
        span: Keys of each row that are no padding; None for all.
        precision: Precision of matrix products; `tf32` rounds float32 operands.
    """
    if x.q.device.type != "cuda" or x.q.dtype == torch.float64:
        return Tiled()
    flash = _flash(precision == "tf32")
    why = flash.supports(x, pattern, span)
    if why is None:
        return flash
    if why not in _said:
        _said.add(why)
        logger.warning("attention %s: it is computed in tiles by torch, which is slower", why)
    return Tiled()


@functools.cache
def _flash(rounded: bool) -> Flash:
    """The kernels for all calls of a precision: they remember which tiles fitted."""
    return Flash(input_precision="tf32" if rounded else "ieee")
