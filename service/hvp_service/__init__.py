"""The gRPC front end: resources, uploads, jobs; it reaches the workers through one interface."""
