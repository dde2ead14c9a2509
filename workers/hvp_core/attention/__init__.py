"""Attention with every derivative of it."""

from hvp_core.attention.seam import NAME, attention, register, use

__all__ = ["NAME", "attention", "register", "use"]
