"""What every call has: names, pages, refusals, limits, request ids."""
