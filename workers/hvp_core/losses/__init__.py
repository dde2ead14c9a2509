"""Losses, and what products make of a model's output."""
