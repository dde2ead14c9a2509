"""gRPC services: messages to values, a handler, and back; nothing is decided here."""
