"""Models as chains of blocks."""
