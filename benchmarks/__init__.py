"""Speed and memory of the products, measured against the alternatives."""
