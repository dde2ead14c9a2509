"""Loss, gradient and curvature products of a sharded model."""
