"""What each method does: plain async functions that know nothing of gRPC."""
