"""Algorithms that run in steps, and their states written down."""
