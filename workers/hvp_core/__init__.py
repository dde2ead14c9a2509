"""The mathematics of curvature products: blocks, duals, walks, Lanczos, sharded vectors."""
