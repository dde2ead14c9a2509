"""Vectors: rows that say how to make one again, and the ranks that hold the elements."""
