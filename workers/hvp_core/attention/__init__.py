"""Attention with every derivative of it."""

from hvp_core.attention.seam import NAME, attention, register

__all__ = ["NAME", "attention", "register"]
