"""A block's derivatives: traced, cut, compiled, compared with torch's own."""
