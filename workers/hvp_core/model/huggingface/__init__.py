"""Models of transformers: the one room that imports it."""
