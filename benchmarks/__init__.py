"""What a product costs in time, memory and digits, beside every other way to compute it."""
