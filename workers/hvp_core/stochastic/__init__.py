"""Estimates from random probes."""
