"""Attention with every derivative of it."""

from hvp_core.attention.math import NAME, attention, register

__all__ = ["NAME", "attention", "register"]
