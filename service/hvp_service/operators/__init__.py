"""Operators: their losses, gradients and products, and the names and data that define them."""
