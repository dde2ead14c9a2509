"""The `hvp` command."""
