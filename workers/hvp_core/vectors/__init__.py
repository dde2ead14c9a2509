"""Spaces of vectors that lie in parts on the ranks."""
