"""Python SDK and command line of the `hvp` service."""
