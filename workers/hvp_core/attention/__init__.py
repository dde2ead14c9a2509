"""Attention with every derivative of it."""
