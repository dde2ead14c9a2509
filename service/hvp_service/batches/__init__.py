"""Data batches: rows of statistics; the data are a blob."""
