"""What lies where: the ranks' parts of vectors, and what they exchange."""
