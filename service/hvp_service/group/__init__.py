"""The worker group, which is kept alive, and the server's report of itself."""
