"""The worker group, kept alive, and what the server tells of itself."""
