"""Operators: losses, gradients, products, and what names and data they are of."""
