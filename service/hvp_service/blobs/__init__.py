"""Blobs: immutable files named by their SHA-256."""
