"""Package `hvp.v1` of the wire format."""
