"""Operators known by their products, and operators made of operators."""
