"""The ranks' parts of vectors, and the exchanges between ranks."""
