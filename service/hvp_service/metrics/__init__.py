"""Figures of a running server for Prometheus: what is counted, and what is looked up when asked."""
