"""What is shipped and how it is run: the wheel, images, manifests, units."""
